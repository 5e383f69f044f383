"""Where the rule changes its way: every length of a row, every block, every way through columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.compile import pipeline, resolve, slice_rule
from normgraph.graphs import build, kinds, reference

Array = NDArray[Any]

OPERATORS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


def _given(spec: NormSpec, x: Array) -> dict[str, Array]:
    channels = x.shape[-1] if spec.op in ("layer_norm", "rms_norm") else x.shape[1]
    given = {"x": x, "gamma": np.linspace(0.5, 1.5, channels).astype(x.dtype)}
    if spec.op != "rms_norm":
        given["beta"] = np.linspace(-1.0, 1.0, channels).astype(x.dtype)
    if spec.track_running_stats:
        given["running_mean"] = np.zeros(channels, x.dtype)
        given["running_var"] = np.ones(channels, x.dtype)
    return given


def _hold(operator: Any, shape: tuple[int, ...], dtype: str = "float32") -> None:
    """Forward and backward against float64, everything and each output alone."""
    random = np.random.default_rng(sum(shape))
    x, dy = (random.standard_normal(shape).astype(dtype) for _ in range(2))
    given = _given(operator.spec, x)
    want = reference.run(operator.spec, "forward", given)
    found = operator.forward(*given.values())
    _close(found, want, dtype, shape)
    saved = {n: getattr(found, n) for n in ("mean", "inv_std") if hasattr(found, n)}
    arguments = {"dy": dy, "x": x, "gamma": given["gamma"], **saved}
    answers = reference.run(operator.spec, "backward", arguments)
    _close(operator.backward(*arguments.values()), answers, dtype, shape)
    for name in answers:
        alone = operator.backward(*arguments.values(), want=(name,))
        _compare(alone, answers[name], answers[name], dtype, (name, shape))
        total = np.full(answers[name].shape, 2.0, dtype)
        operator.backward(*arguments.values(), want=(name,), out={name: total}, grad_req="add")
        _compare(total, answers[name] + 2.0, answers[name], dtype, (name, shape))


def _close(found: Any, want: dict[str, Array], dtype: str, shape: tuple[int, ...]) -> None:
    for name, answer in want.items():
        _compare(getattr(found, name), answer, answer, dtype, (name, shape))


def _compare(found: Array, want: Array, size: Array, dtype: str, where: object) -> None:
    error = np.max(np.abs(found - want))
    room = (2e-5 if dtype == "float32" else 1e-12) * max(1.0, float(np.max(np.abs(size))))
    assert error <= room, (where, error)


# All that have code for a range of a vector; both ends of ranges of two and of the rest, which ends
# where a row is done alone; around multiples of the registers of a sum.
LENGTHS = (*range(2, 67), 79, 80, 81, 95, 96, 127, 128, 129, 143, 144, 196, 255, 257, 1023, 1025)


@pytest.mark.parametrize("op", ["instance_norm", "batch_norm", "group_norm"])
def test_every_length_of_a_row(op: str, build_operator: Callable[..., Any]) -> None:
    spec = NormSpec(op, groups=3) if op == "group_norm" else NormSpec(op)
    operator = build_operator(spec, ("N", 6, "L"), kinds=("forward", "backward"))
    for length in LENGTHS:
        # Few rows on the calling thread; enough of them for the parallel loop.
        for n in (2, 40000 // (6 * length) + 1):
            _hold(operator, (n, 6, length))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("length", [2, 5, 8, 17, 31, 48, 129])
def test_rows_side_by_side(op: str, length: int, build_operator: Callable[..., Any]) -> None:
    operator = build_operator(NormSpec(op), ("N", length), kinds=("forward", "backward"))
    for n in (1, 3, 5, 63, 66, 40000 // length + 3):
        _hold(operator, (n, length))


@pytest.mark.parametrize("slices", [1, 7, 8, 9, 15, 16, 17, 33, 130])
def test_every_number_of_slices(slices: int, build_operator: Callable[..., Any]) -> None:
    """Blocks that are full, that are not, and one slice to a block."""
    for op in ("instance_norm", "batch_norm"):
        operator = build_operator(NormSpec(op), ("N", slices, "L"), kinds=("forward", "backward"))
        for length in (49, 40000 // slices + 5):
            _hold(operator, (2, slices, length))


@pytest.mark.parametrize(
    ("spec", "declared", "shape"),
    [
        (NormSpec("layer_norm"), (1, 1000), (1, 1000)),
        (NormSpec("layer_norm"), (1, 70001), (1, 70001)),
        (NormSpec("rms_norm"), (1, 1024), (1, 1024)),
        (NormSpec("instance_norm"), (1, 1, "H", "W"), (1, 1, 40, 50)),
        (NormSpec("instance_norm"), (1, 1, 200, 300), (1, 1, 200, 300)),
        (NormSpec("batch_norm"), ("N", 1, "H", "W"), (7, 1, 30, 9)),
        (NormSpec("batch_norm"), (8, 1, 4, 4), (8, 1, 4, 4)),
        (NormSpec("group_norm", groups=1), (1, 4, "H", "W"), (1, 4, 17, 19)),
    ],
)
def test_one_slice(
    spec: NormSpec,
    declared: tuple[int | str, ...],
    shape: tuple[int, ...],
    build_operator: Callable[..., Any],
) -> None:
    _hold(build_operator(spec, declared, kinds=("forward", "backward")), shape)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 64, 65, 130])
def test_matrices(columns: int, build_operator: Callable[..., Any]) -> None:
    """Few rows, one block of columns a task; many rows, all columns together; and serially."""
    spec = NormSpec("batch_norm")
    operator = build_operator(spec, ("N", columns), kinds=("forward", "backward"))
    for rows in (2, 5, 255, 257, 260, 40000 // columns + 7):
        _hold(operator, (rows, columns))


@pytest.mark.parametrize(("channels", "dtype"), [(3, "float32"), (130, "float32"), (37, "float64")])
def test_short_rows_in_columns(
    channels: int, dtype: str, build_operator: Callable[..., Any]
) -> None:
    """Channels of few elements a sample: in blocks, all together, one by one, of one element."""
    spec = NormSpec("batch_norm")
    operator = build_operator(spec, ("N", channels, "L"), dtype, kinds=("forward", "backward"))
    for n, length in (
        (2, 1),
        (5, 1),
        (300, 1),
        (4, 3),  # the calling thread
        (129, 7),  # one run and the beginning of another
        (16, 49),
        (15, 50),  # by rows: just too long for so many of them
        (64, 49),
        (260, 49),
        (256, 63),  # 130 channels: as many columns as are done all together
        (40000 // channels, 2),
    ):
        _hold(operator, (n, channels, length), dtype)


def test_short_rows_with_static_shapes(build_operator: Callable[..., Any]) -> None:
    spec = NormSpec("batch_norm")
    for shape in ((64, 33, 7, 7), (8, 33, 7, 7), (300, 5, 3, 3)):
        _hold(build_operator(spec, shape, kinds=("forward", "backward")), shape)


def test_matrices_of_float64(build_operator: Callable[..., Any]) -> None:
    spec = NormSpec("batch_norm")
    operator = build_operator(spec, ("N", 37), "float64", kinds=("forward", "backward"))
    for rows in (255, 1500):
        _hold(operator, (rows, 37), "float64")


def test_inference_of_a_matrix(build_operator: Callable[..., Any]) -> None:
    spec = NormSpec("batch_norm")
    operator = build_operator(spec, ("N", 70), kinds=("inference",))
    for rows in (1, 3, 300, 1000):
        x = np.random.default_rng(rows).standard_normal((rows, 70)).astype(np.float32)
        given = _given(spec, x)
        want = reference.run(operator.spec, "inference", given)["y"]
        _compare(operator.inference(*given.values()), want, want, "float32", rows)


def test_running_statistics_in_place(build_operator: Callable[..., Any]) -> None:
    """new_running_* may be running_*, also where all columns are done together."""
    spec = NormSpec("batch_norm")
    for shape in ((1000, 70), (8, 70, 5, 5), (3, 70, 61, 67)):
        declared = ("N", 70, *("HW"[: len(shape) - 2]))
        operator = build_operator(spec, declared, kinds=("forward",))
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + np.float32(2)
        given = _given(spec, x)
        want = reference.run(operator.spec, "forward", given)
        mean, var = given["running_mean"].copy(), given["running_var"].copy()
        operator.forward(
            x,
            given["gamma"],
            given["beta"],
            mean,
            var,
            out={"new_running_mean": mean, "new_running_var": var},
        )
        _compare(mean, want["new_running_mean"], want["new_running_mean"], "float32", shape)
        _compare(var, want["new_running_var"], want["new_running_var"], "float32", shape)


def test_results_do_not_depend_on_where_rows_lie(build_operator: Callable[..., Any]) -> None:
    """Each slice has the same result alone and among others: no neighbour leaks into it."""
    operator = build_operator(NormSpec("instance_norm"), ("N", 3, "L"), kinds=("forward",))
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    x = np.random.default_rng(0).standard_normal((300, 3, 49)).astype(np.float32)
    x[1::2] *= np.float32(1e6)
    whole = operator.forward(x, gamma, beta).y
    for n in (0, 1, 17, 299):
        alone = operator.forward(x[n : n + 1], gamma, beta).y
        np.testing.assert_allclose(whole[n : n + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [("N", 3, "H", 8), ("N", 3, 64, "H"), ("N", 3, "H", 5)])
def test_a_symbol_times_a_size(
    dtype: str, shape: tuple[int | str, ...], build_operator: Callable[..., Any]
) -> None:
    """Planes with one open extent build in every type."""
    operator = build_operator(NormSpec("instance_norm"), shape, dtype, kinds=("forward",))
    assert operator.dtype == dtype


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), ("N", 3, 5, 5), (300, 20)])
def test_momentum_given_at_the_call(
    shape: tuple[int | str, ...], build_operator: Callable[..., Any]
) -> None:
    """A scalar input, in a static shape used as it is and in others folded with the count."""
    operator = build_operator(NormSpec("batch_norm", momentum=None), shape, kinds=("forward",))
    sizes = tuple(4 if size == "N" else int(size) for size in shape)
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    given = _given(operator.spec, x)
    for momentum in (0.0, 0.25, 1.0):
        given["momentum"] = np.asarray(momentum, np.float32)
        want = reference.run(operator.spec, "forward", given)
        _close(operator.forward(*given.values()), want, "float32", sizes)
    given["x"] = x * np.float32(1e-5)  # beside a running variance of 1
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    var = given["x"].astype(np.float64).var(axis=axes, ddof=1)
    found = operator.forward(*given.values())
    np.testing.assert_allclose(found.new_running_var, var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_one_element_of_each(op: str, dtype: str, compile_models: Callable[..., Any]) -> None:
    """A static shape of ones has no axis at all, and the rule takes it nevertheless."""
    shape = (1, 1) if op in ("layer_norm", "rms_norm") else (1, 1, 1, 1)
    spec = NormSpec(op, groups=1 if op == "group_norm" else None).resolve(dtype)
    models = {kind: build(spec, kind, shape, dtype) for kind in kinds(spec)}
    for kind, model in models.items():
        made = pipeline.schedule(kind, model, resolve("cpu"), pipeline.Dump(None), _unexpected)
        assert made.rule == slice_rule.NAME
    kernels = compile_models(spec, models)
    for kind in models:
        kernels.check(kind, kernels.inputs(kind, mean=3.0))


def _unexpected(message: str) -> None:
    raise AssertionError(message)
