"""The options of a spec: ranks, parameters left out, correction, conventions, parameter dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.scripts.verify_inputs import Case, Inputs

# One artifact each: spec, dtype, declared shape, two sizes.
CASES = {
    "bare instance norm, rank 3": (
        NormSpec("instance_norm", weight=False, bias=False),
        "float32",
        ("N", "C", "L"),
        ((3, 5, 17), (2, 1, 101)),
    ),
    "weight alone, rank 5": (
        NormSpec("instance_norm", bias=False, eps=1e-3),
        "float32",
        ("N", 3, "D", "H", "W"),
        ((2, 3, 3, 5, 7), (1, 3, 2, 2, 31)),
    ),
    "bias alone, rank 2": (
        NormSpec("batch_norm", weight=False),
        "float32",
        ("N", 11),
        ((13, 11), (129, 11)),
    ),
    "correction 1, batch": (
        NormSpec("batch_norm", correction=1),
        "float32",
        ("N", 5, "L"),
        ((3, 5, 7), (7, 5, 1)),
    ),
    "correction 1, layer": (
        NormSpec("layer_norm", correction=1),
        "float64",
        ("N", 19),
        ((5, 19), (1, 19)),
    ),
    "two normalised dimensions": (
        NormSpec("layer_norm", normalized_ndim=2),
        "float32",
        ("N", "T", 5, 7),
        ((3, 2, 5, 7), (1, 13, 5, 7)),
    ),
    "three normalised dimensions, no weight": (
        NormSpec("rms_norm", normalized_ndim=3, weight=False),
        "float32",
        ("N", "C", "H", "W"),
        ((3, 2, 5, 7), (1, 13, 3, 11)),
    ),
    "rms norm with machine eps": (
        NormSpec("rms_norm", eps=None),
        "float32",
        ("N", 23),
        ((4, 23), (17, 23)),
    ),
    "a group a channel, rank 2": (
        NormSpec("group_norm", groups=3),
        "float32",
        ("N", 51),
        ((5, 51), (1, 51)),
    ),
    "one group, rank 5": (
        NormSpec("group_norm", groups=1, weight=False, bias=False),
        "float32",
        ("N", 4, "D", "H", "W"),
        ((2, 4, 3, 5, 7), (1, 4, 1, 2, 29)),
    ),
    "float32 parameters, float16 x": (
        NormSpec("batch_norm", param_dtype="float32"),
        "float16",
        ("N", 6, "H", "W"),
        ((3, 6, 5, 7), (2, 6, 13, 13)),
    ),
    "float32 parameters, bfloat16 x": (
        NormSpec("layer_norm", param_dtype="float32"),
        "bfloat16",
        ("N", 37),
        ((5, 37), (64, 37)),
    ),
    "onnx convention, a fixed shape": (
        NormSpec("batch_norm", convention="onnx"),
        "float32",
        (3, 5, 7, 11),
        ((3, 5, 7, 11),),
    ),
    "mxnet convention, momentum an input": (
        NormSpec("instance_norm", track_running_stats=True, convention="mxnet", momentum=None),
        "float32",
        ("N", 5, "L"),
        ((3, 5, 7), (1, 5, 64)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_within_its_bound(
    name: str,
    build_operator: Callable[..., Any],
    every_kind_within: Callable[..., None],
) -> None:
    spec, dtype, shape, sizes = CASES[name]
    operator = build_operator(spec, shape, dtype)
    for size in sizes:
        for mean in (0.0, 100.0):
            inputs = Inputs(operator.spec, dtype, Case(size, mean), seed=17)
            every_kind_within(operator, inputs, name)


def test_what_a_spec_lacks_is_not_taken_and_not_given(build_operator: Callable[..., Any]) -> None:
    spec, dtype, shape, _ = CASES["bare instance norm, rank 3"]
    operator = build_operator(spec, shape, dtype)
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    y, mean, inv_std = operator.forward(x)
    dx = operator.backward(x, x, mean, inv_std)
    assert isinstance(dx, np.ndarray)
    np.testing.assert_allclose(y.mean(axis=2), 0.0, atol=1e-6)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_a_first_batch_replaces_the_running_statistics(
    op: str, build_operator: Callable[..., Any]
) -> None:
    """At momentum 1 nothing of the old value is left, and all digits of a small new one are."""
    spec = NormSpec(op, track_running_stats=True, momentum=None)
    operator = build_operator(spec, ("N", 3, "H", "W"), "float32")
    x = np.random.default_rng(0).standard_normal((5, 3, 7, 9)).astype(np.float32)
    x *= np.float32(1e-5)
    ones = np.ones(3, np.float32)
    result = operator.forward(x, ones, ones, ones, ones, 1.0)
    exact = x.astype(np.float64)
    over = (0, 2, 3) if op == "batch_norm" else (2, 3)
    var = exact.var(axis=over, ddof=1)
    var = var if op == "batch_norm" else var.mean(axis=0)
    np.testing.assert_allclose(result.new_running_var, var, rtol=1e-5)
    np.testing.assert_allclose(result.new_running_mean, exact.mean(axis=(0, 2, 3)), atol=1e-11)
