"""Properties over random shapes and values, with kernels compiled once for every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import normgraph.graphs.reference as reference
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_tolerance import allowed

DTYPES = st.sampled_from(["float16", "bfloat16", "float32", "float64"])
Size = tuple[int, int, int]
Drawn = Callable[[str, str, Size, float, int], tuple[Any, Inputs]]
SEEDS = st.integers(0, 2**31 - 1)
# A fixture is the same compiled kernel for every example: nothing to reset.
EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _sizes(n: int, high: int, least: int, wide: int) -> st.SearchStrategy[Size]:
    return st.tuples(st.integers(1, n), st.integers(1, high), st.integers(least, wide))


@pytest.fixture(scope="session")
def drawn(build_row: Callable[..., Any]) -> Drawn:
    """drawn(op, dtype, size, mean, seed): the operator, and inputs of n, height and width."""

    def make(op: str, dtype: str, size: Size, mean: float, seed: int) -> tuple[Any, Inputs]:
        operator = build_row(op, dtype)
        n, high, wide = size
        shape = (n, 6, high, wide) if len(operator.shape) == 4 else (n, high, 37)
        return operator, Inputs(operator.spec, dtype, Case(shape, mean), seed)

    return make


@EXAMPLES
@given(
    dtype=DTYPES,
    size=_sizes(5, 13, 2, 37),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    seed=SEEDS,
)
def test_any_shape_is_within_tolerance(
    op: str,
    drawn: Drawn,
    call: Callable[..., Any],
    names: Callable[..., Any],
    dtype: str,
    size: Size,
    mean: float,
    seed: int,
) -> None:
    operator, inputs = drawn(op, dtype, size, mean, seed)
    for kind in operator.kinds:
        arguments = inputs.take(names(operator, kind))
        want = reference.run(operator.spec, kind, arguments)
        conditions = inputs.conditions(kind)
        for name, got in call(operator, kind, arguments).items():
            bound = allowed(name, got.dtype.name, want[name], conditions)
            error = np.abs(got.astype(np.float64) - want[name])
            assert np.all(error <= bound), f"{kind} {name}: {error.max()} > {bound.max()}"


@EXAMPLES
@given(size=_sizes(4, 9, 2, 33), seed=SEEDS)
def test_a_scaled_input_gives_the_same_output(op: str, drawn: Drawn, size: Size, seed: int) -> None:
    """y(a x + b) = y(x) but for eps (rms_norm: b = 0)."""
    operator, inputs = drawn(op, "float64", size, 0.0, seed)
    v = inputs.values
    shift = 0.0 if op == "rms_norm" else 3.0
    rest = [v["gamma"]] if op == "rms_norm" else [v["gamma"], v["beta"]]
    if operator.spec.track_running_stats:
        rest += [v["running_mean"], v["running_var"]]
    # As x grows eps fades: 1e-5 beside the square of a scale of 1e6.
    one, other = (operator.forward(v["x"] * scale + shift, *rest).y for scale in (1e6, 2e6))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm", "group_norm", "layer_norm"])
@EXAMPLES
@given(size=_sizes(4, 9, 4, 33), seed=SEEDS)
def test_dx_sums_to_zero_over_each_slice(op: str, drawn: Drawn, size: Size, seed: int) -> None:
    """A shift of a slice changes no y, so the gradient along it is zero."""
    operator, inputs = drawn(op, "float64", size, 1.0, seed)
    v = inputs.values
    dx = operator.backward(v["dy"], v["x"], v["gamma"], v["mean"], v["inv_std"], want=("dx",))
    if isinstance(dx, tuple):
        dx = dx[0]
    if op == "group_norm":
        sums = dx.reshape(len(dx), 2, -1).sum(axis=2)
    else:
        axes = {"batch_norm": (0, 2, 3), "instance_norm": (2, 3), "layer_norm": (2,)}[op]
        sums = dx.sum(axis=axes)
    np.testing.assert_allclose(sums, 0.0, atol=1e-10 * max(1.0, float(np.abs(dx).sum())))
