"""Properties over random shapes and values, with kernels compiled once for every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_tolerance import allowed

ROWS = {
    "batch_norm": (NormSpec("batch_norm"), ("N", 6, "H", "W")),
    "instance_norm": (
        NormSpec("instance_norm", track_running_stats=True),
        ("N", 6, "H", "W"),
    ),
    "group_norm": (NormSpec("group_norm", groups=2), ("N", 6, "H", "W")),
    "layer_norm": (NormSpec("layer_norm"), ("N", "T", 37)),
    "rms_norm": (NormSpec("rms_norm"), ("N", "T", 37)),
}
DTYPES = st.sampled_from(["float16", "bfloat16", "float32", "float64"])
SEEDS = st.integers(0, 2**31 - 1)
# A fixture is the same compiled kernel for every example: nothing to reset.
EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _size(op: str, n: int, high: int, wide: int) -> tuple[int, ...]:
    return (n, high, 37) if op in ("layer_norm", "rms_norm") else (n, 6, high, wide)


@pytest.mark.parametrize("op", ROWS)
@EXAMPLES
@given(
    dtype=DTYPES,
    n=st.integers(1, 5),
    high=st.integers(1, 13),
    wide=st.integers(2, 37),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    seed=SEEDS,
)
def test_any_shape_is_within_tolerance(
    op: str,
    build_operator: Callable[..., Any],
    call: Callable[..., Any],
    names: Callable[..., Any],
    dtype: str,
    n: int,
    high: int,
    wide: int,
    mean: float,
    seed: int,
) -> None:
    spec, shape = ROWS[op]
    operator = build_operator(spec, shape, dtype)
    inputs = Inputs(operator.spec, dtype, Case(_size(op, n, high, wide), mean), seed)
    for kind in operator.kinds:
        arguments = inputs.take(names(operator, kind))
        want = reference.run(operator.spec, kind, arguments)
        conditions = inputs.conditions(kind)
        for name, got in call(operator, kind, arguments).items():
            bound = allowed(name, got.dtype.name, want[name], conditions)
            error = np.abs(got.astype(np.float64) - want[name])
            assert np.all(error <= bound), f"{kind} {name}: {error.max()} > {bound.max()}"


@pytest.mark.parametrize("op", ROWS)
@EXAMPLES
@given(n=st.integers(1, 4), high=st.integers(1, 9), wide=st.integers(2, 33), seed=SEEDS)
def test_a_scaled_input_gives_the_same_output(
    op: str,
    build_operator: Callable[..., Any],
    n: int,
    high: int,
    wide: int,
    seed: int,
) -> None:
    """y(a x + b) = y(x) but for eps (rms_norm: b = 0)."""
    spec, shape = ROWS[op]
    operator = build_operator(spec, shape, "float64")
    inputs = Inputs(operator.spec, "float64", Case(_size(op, n, high, wide), 0.0), seed)
    v = inputs.values
    shift = 0.0 if op == "rms_norm" else 3.0
    rest = [v["gamma"]] if op == "rms_norm" else [v["gamma"], v["beta"]]
    if spec.track_running_stats:
        rest += [v["running_mean"], v["running_var"]]
    # As x grows eps fades: 1e-5 beside the square of a scale of 1e6.
    one, other = (operator.forward(v["x"] * scale + shift, *rest).y for scale in (1e6, 2e6))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm", "group_norm", "layer_norm"])
@EXAMPLES
@given(n=st.integers(1, 4), high=st.integers(1, 9), wide=st.integers(4, 33), seed=SEEDS)
def test_dx_sums_to_zero_over_each_slice(
    op: str,
    build_operator: Callable[..., Any],
    n: int,
    high: int,
    wide: int,
    seed: int,
) -> None:
    """A shift of a slice changes no y, so the gradient along it is zero."""
    spec, shape = ROWS[op]
    operator = build_operator(spec, shape, "float64")
    inputs = Inputs(operator.spec, "float64", Case(_size(op, n, high, wide), 1.0), seed)
    v = inputs.values
    dx = operator.backward(v["dy"], v["x"], v["gamma"], v["mean"], v["inv_std"], want=("dx",))
    if isinstance(dx, tuple):
        dx = dx[0]
    if op == "group_norm":
        sums = dx.reshape(n, 2, -1).sum(axis=2)
    else:
        axes = {"batch_norm": (0, 2, 3), "instance_norm": (2, 3), "layer_norm": (2,)}[op]
        sums = dx.sum(axis=axes)
    np.testing.assert_allclose(sums, 0.0, atol=1e-10 * max(1.0, float(np.abs(dx).sum())))
