"""Statistics around a sampled mean: the sample may be as bad as data allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.compile import shifted_sums
from normgraph.compile.slice_plan import plan
from normgraph.graphs import reference

Array = NDArray[Any]
# A sixteenth of each row, in front, is sampled.
ROWS = {"rows": (3, 4, 32, 64), "short rows": (40, 4, 7, 7), "one row": (1, 1, 64, 64)}
OPS = {
    "batch_norm": ("N", 4, "H", "W"),
    "instance_norm": ("N", 4, "H", "W"),
    "layer_norm": ("N", "C", "H", 64),
}


def _check(operator: Any, spec: NormSpec, x: Array, bound: float) -> None:
    """Every output within `bound` of the largest; statistics of float32 x are meant."""
    channels = x.shape[1] if spec.op != "layer_norm" else x.shape[-1]
    given: dict[str, Array] = {
        "x": x,
        "gamma": np.linspace(0.5, 1.5, channels).astype(np.float32),
        "beta": np.linspace(-1.0, 1.0, channels).astype(np.float32),
    }
    if spec.track_running_stats:
        given |= {"running_mean": np.zeros(channels, np.float32)}
        given |= {"running_var": np.ones(channels, np.float32)}
    want = reference.run(spec, "forward", given)
    found = operator.forward(*given.values())
    for name in ("y", "mean", "inv_std"):
        error = np.max(np.abs(getattr(found, name) - want[name]))
        assert error <= bound * np.max(np.abs(want[name])), (name, error)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("far", [3.0, 1e3, 1e6])
def test_a_sample_far_from_the_rest(
    op: str, far: float, build_operator: Callable[..., Any]
) -> None:
    """The sampled elements lie together and `far` from all others, which is the worst there is."""
    spec = NormSpec(op)
    operator = build_operator(spec, OPS[op], kinds=("forward",))
    for shape in ROWS.values():
        if op != "layer_norm":
            shape = (shape[0], 4, *shape[2:])
        elif shape[-1] != 64:
            continue
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        flat = x.reshape(shape[0] * shape[1], -1)
        flat[:, : max(16, flat.shape[1] // 16)] += np.float32(far)
        _check(operator, spec, x, 4e-6)


@pytest.mark.parametrize("op", OPS)
def test_a_constant_slice_has_no_variance(op: str, build_operator: Callable[..., Any]) -> None:
    spec = NormSpec(op)
    operator = build_operator(spec, OPS[op], kinds=("forward",))
    for constant in (0.0, 3.5, 1e6, -1e-3):
        x = np.full((2, 4, 8, 64), constant, np.float32)
        _check(operator, spec, x, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_the_mean_of_half_types(op: str, dtype: str, build_operator: Callable[..., Any]) -> None:
    """Elements of few digits: a centre of more would round all of them the same way."""
    spec = NormSpec(op)
    operator = build_operator(spec, OPS[op], dtype, kinds=("forward",))
    native = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(4)
    for shape, centre in (((4, 4, 224, 224), 0.0), ((4, 4, 224, 224), 0.3), ((8, 4, 40, 40), 7.0)):
        x = (rng.standard_normal(shape) + centre).astype(native)
        parameters = [np.ones(4, native)] * 2
        if spec.track_running_stats:
            parameters += [np.ones(4, np.float32)] * 2
        found = operator.forward(x, *parameters)
        axes = (0, 2, 3) if op == "batch_norm" else (2, 3)
        want = x.astype(np.float64).mean(axis=axes, keepdims=True)
        error = np.max(np.abs(found.mean.reshape(want.shape) - want))
        assert error <= max(2e-9, 1.5e-7 * centre), (shape, error)


def test_the_worst_sample_of_half_types(build_operator: Callable[..., Any]) -> None:
    """All sampled values lie together, near 0 but not there: the others are rounded to one side."""
    spec, shape = NormSpec("instance_norm"), OPS["instance_norm"]
    operator = build_operator(spec, shape, "float16", kinds=("forward",))
    x = np.full((2, 4, 256, 512), 1.0625, np.float16)
    x[..., 1::2] = -1.0625
    flat = x.reshape(8, -1)
    flat[:, : flat.shape[1] // 16] = 1025 * 2.0**-24
    found = operator.forward(x, *[np.ones(4, np.float16)] * 2).mean
    exact = x.astype(np.float64)
    error = np.abs(found - exact.mean(axis=(2, 3), keepdims=True))
    assert np.max(error) <= 2.0**-24 * np.mean(np.abs(exact))


def test_matrices_sample_rows(build_operator: Callable[..., Any]) -> None:
    """With nothing behind the channels the first sixteenth of the rows is sampled."""
    spec = NormSpec("batch_norm")
    operator = build_operator(spec, ("N", 70), kinds=("forward",))
    for rows in (2, 17, 300, 2000):
        x = np.random.default_rng(2).standard_normal((rows, 70)).astype(np.float32)
        x[: max(1, rows // 16)] += np.float32(1e4)
        _check(operator, spec, x, 4e-6)


def test_the_plan_reads_x_once_less(program: Callable[..., Any]) -> None:
    made = plan(program(NormSpec("batch_norm"), "forward", ("N", 4, "H", "W")))
    shifted_sums.apply(made)
    sampled = [step for work in made.passes for step in work.wide if step.sample is not None]
    whole = [step for work in made.passes for step in work.wide if step.sample is None]
    assert len(sampled) == 1
    assert [step.is_sum for step in whole] == [True, True, False]


@pytest.mark.parametrize("kind", ["backward", "backward_frozen", "inference"])
def test_what_takes_no_mean_is_left_alone(kind: str, program: Callable[..., Any]) -> None:
    made = plan(program(NormSpec("batch_norm"), kind, ("N", 4, "H", "W")))
    before = [list(work.wide) for work in made.passes]
    shifted_sums.apply(made)
    assert [list(work.wide) for work in made.passes] == before
