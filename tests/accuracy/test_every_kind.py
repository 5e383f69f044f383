"""Every row of the table, every kind, every dtype: the kernels against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.scripts.verify_inputs import Case, Inputs

KINDS = {
    "batch_norm": 5,
    "instance_norm": 5,
    "group_norm": 4,
    "layer_norm": 4,
    "rms_norm": 4,
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Primes; a plane smaller than a vector; long odd rows; one batch.
IMAGES = ((3, 6, 5, 7), (2, 6, 3, 3), (1, 6, 1, 127), (5, 6, 29, 31))
LINES = ((3, 5, 37), (1, 1, 37), (2, 61, 37))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_within_its_bound(
    op: str,
    dtype: str,
    build_row: Callable[..., Any],
    every_kind_within: Callable[..., None],
) -> None:
    operator = build_row(op, dtype)
    assert len(operator.kinds) == KINDS[op]
    for size in IMAGES if len(operator.shape) == 4 else LINES:
        for mean in (0.0, 100.0):
            inputs = Inputs(operator.spec, dtype, Case(size, mean), seed=3)
            every_kind_within(operator, inputs, f"{op} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-2, 3e-3])
def test_a_variance_near_eps(
    op: str,
    scale: float,
    dtype: str,
    build_row: Callable[..., Any],
    every_kind_within: Callable[..., None],
) -> None:
    """A variance of 1e-4 and of 1e-5, beside an eps of 1e-5, running statistics included."""
    operator = build_row(op, dtype)
    case = Case((3, 6, 29, 31) if len(operator.shape) == 4 else (3, 5, 37), 0.0)
    plain = Inputs(operator.spec, dtype, case, seed=29).values
    data = {
        "x": plain["x"].astype(np.float64) * scale,
        "running_mean": plain["running_mean"] * scale,
        "running_var": plain["running_var"] * scale**2,
    }
    inputs = Inputs(operator.spec, dtype, case, seed=29, data=data)
    every_kind_within(operator, inputs, f"{op} {dtype} scale {scale:g}")


def test_long_rows_far_from_zero(
    op: str,
    rows: dict[str, Any],
    build_operator: Callable[..., Any],
    every_kind_within: Callable[..., None],
) -> None:
    """Slices of 8209 elements or more at mean 100, above the size where threads share the work."""
    spec, shape = rows[op]
    shape, size = (shape, (2, 6, 1, 8209)) if len(shape) == 4 else (("N", 8209), (7, 8209))
    operator = build_operator(spec, shape)
    inputs = Inputs(operator.spec, "float32", Case(size, 100.0), seed=31)
    every_kind_within(operator, inputs, op)


@pytest.mark.parametrize("op", ["instance_norm", "group_norm", "layer_norm"])
def test_the_kept_zero_term_holds_the_accuracy_at_mean_a_million(
    op: str, build_row: Callable[..., Any]
) -> None:
    """x - mean is then off by up to 0.03; without delta y and dx would be off as much."""
    operator = build_row(op)
    size = (2, 6, 29, 31) if len(operator.shape) == 4 else (2, 61, 37)
    inputs = Inputs(operator.spec, "float32", Case(size, 1e6), seed=5)
    v = inputs.values
    gamma, beta = v["gamma"], v["beta"]
    running = (v["running_mean"], v["running_var"]) if operator.spec.track_running_stats else ()
    found = operator.forward(v["x"], gamma, beta, *running)
    exact = reference.run(
        operator.spec,
        "forward",
        inputs.take(["x", "gamma", "beta", *(["running_mean", "running_var"] if running else [])]),
    )
    assert np.max(np.abs(found.y - exact["y"])) < 2e-5 * np.max(np.abs(exact["y"]))
    # The true gradient is that of the exact mean, not of the rounded one the kernel is given.
    true = reference.run(
        operator.spec,
        "backward",
        {"dy": v["dy"], "x": v["x"], "gamma": gamma}
        | {name: exact[name] for name in ("mean", "inv_std")},
    )
    dx, dgamma, _ = operator.backward(v["dy"], v["x"], gamma, found.mean, found.inv_std)
    assert np.max(np.abs(dx - true["dx"])) < 2e-5 * np.max(np.abs(true["dx"]))
    assert np.max(np.abs(dgamma - true["dgamma"])) < 2e-5 * np.max(np.abs(true["dgamma"]))


def test_one_element_a_slice(op: str, build_operator: Callable[..., Any]) -> None:
    """m = 1: y = beta and dx = 0, exactly. rms_norm has no mean: y = gamma * x/sqrt(x^2 + eps)."""
    if op in ("layer_norm", "rms_norm"):
        operator = build_operator(NormSpec(op), ("N", 1), kinds=("forward", "backward"))
        x = np.array([[3.0], [-2.0], [100.25]], np.float32)
    elif op == "group_norm":
        operator = build_operator(NormSpec(op, groups=2), ("N", 2), kinds=("forward", "backward"))
        x = np.array([[3.0, 0.1], [-2.0, 1e4], [100.25, 7.0]], np.float32)
    else:
        # Under the torch convention a forward of one element is refused, as torch does.
        spec = NormSpec(op, track_running_stats=True, convention="onnx")
        operator = build_operator(spec, ("N", 2, "H"), kinds=("forward", "backward"))
        x = np.array([[[3.0], [0.1]]], np.float32)
    count = x.shape[-1] if op in ("layer_norm", "rms_norm") else x.shape[1]
    gamma = np.linspace(0.5, 1.5, count).astype(np.float32)
    beta = np.linspace(-1.0, 1.0, count).astype(np.float32)
    dy = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    if op == "rms_norm":
        y, inv_std = operator.forward(x, gamma)
        np.testing.assert_allclose(y, gamma * np.sign(x), rtol=1e-5)
        dx, _ = operator.backward(dy, x, gamma, inv_std)
        np.testing.assert_allclose(dx, 0.0, atol=1e-5)
        return
    running = [np.zeros(count, np.float32), np.ones(count, np.float32)]
    tracked = operator.spec.track_running_stats
    y, mean, inv_std, *_ = operator.forward(x, gamma, beta, *(running if tracked else ()))
    column = (1, -1) + (1,) * (x.ndim - 2)
    np.testing.assert_array_equal(y, np.broadcast_to(beta.reshape(column), x.shape))
    dx, dgamma, dbeta = operator.backward(dy, x, gamma, mean, inv_std)
    np.testing.assert_array_equal(dx, np.zeros_like(x))
    np.testing.assert_array_equal(dgamma, np.zeros_like(gamma))
    np.testing.assert_allclose(dbeta, dy.sum(axis=(0, *range(2, x.ndim))), rtol=1e-6)
