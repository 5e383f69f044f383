"""Outputs stored past the caches: forced at every size, at every alignment, in every type."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tvm import tirx

import normgraph
from normgraph import NormSpec
from normgraph.compile import cache_size, codegen, pipeline, streaming
from normgraph.compile.knobs import tried
from normgraph.compile.output_row import output_row
from normgraph.compile.row_kernel import RowStore
from normgraph.compile.row_lengths import Length
from normgraph.compile.targets import resolve
from normgraph.graphs import build, reference

Array = NDArray[Any]
# Rows of every length modulo a vector, of one alignment and not; of batch norm also in columns,
# which are streamed where a block has enough of them. Short ones go through memory of their block,
# also where that is less than what lies in front of a line.
CASES: tuple[tuple[str, tuple[int | str, ...], tuple[tuple[int, ...], ...]], ...] = (
    (
        "instance_norm",
        ("N", 5, "H", "W"),
        (
            (3, 5, 61, 67),
            (40, 5, 13, 13),
            (9, 5, 64, 64),
            (9, 5, 18, 18),
            (61, 5, 7, 7),
            (1, 5, 1, 3),
        ),
    ),
    (
        "batch_norm",
        ("N", 5, "H", "W"),
        ((3, 5, 61, 67), (300, 5, 5, 5), (40, 5, 19, 17), (9, 5, 64, 64)),
    ),
    ("group_norm", ("N", 6, "H", "W"), ((9, 6, 31, 37), (41, 6, 3, 5))),
    ("layer_norm", ("N", 1000), ((70, 1000),)),
    ("layer_norm", ("N", 301), ((70, 301), (3, 301))),
    ("layer_norm", ("N", 45), ((333, 45),)),
    ("layer_norm", ("N", 5), ((1, 5), (70, 5))),
    ("rms_norm", ("N", 1024), ((70, 1024),)),
    ("rms_norm", ("N", 105), ((70, 105),)),
)
# For the half types one unit in the last place of the largest value.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds an operator whose outputs count as larger than the caches at any size."""
    monkeypatch.setattr(cache_size, "last_level_cache", lambda: 0)

    def build(spec: NormSpec, shape: tuple[int | str, ...], dtype: str = "float32") -> Any:
        return normgraph.build(
            spec,
            shape=shape,
            dtype=dtype,
            kinds=("forward", "backward"),
            out=tmp_path / "artifact",
        )

    return build


def _placed(shape: tuple[int, ...], dtype: Any, ahead: int) -> Array:
    """An array `ahead` elements behind a 64-byte boundary, surrounded by marks."""
    count = int(np.prod(shape))
    memory = np.full(count + 256, -77.0, dtype)
    first = (-memory.ctypes.data // memory.itemsize) % (64 // memory.itemsize) + 64 + ahead
    return memory[first : first + count].reshape(shape)


def _marks_left(array: Array) -> bool:
    memory = array.base
    assert memory is not None
    first = (array.ctypes.data - memory.ctypes.data) // memory.itemsize
    outside = np.concatenate([memory[:first], memory[first + array.size :]])
    return bool(np.all(outside.astype(np.float32) == -77.0))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "declared", "shapes"), CASES, ids=[f"{op}-{declared[1]}" for op, declared, _ in CASES]
)
def test_every_alignment(
    op: str,
    declared: tuple[int | str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    streamed: Callable[..., Any],
) -> None:
    spec = NormSpec(op, groups=2 if op == "group_norm" else None)
    operator = streamed(spec, declared, dtype)
    own = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    random = np.random.default_rng(0)
    for shape in shapes:
        x, dy = (random.standard_normal(shape).astype(own) for _ in range(2))
        channels = shape[-1] if op in ("layer_norm", "rms_norm") else shape[1]
        gamma = np.linspace(0.5, 1.5, channels).astype(own)
        given = {"x": x, "gamma": gamma}
        if op != "rms_norm":
            given["beta"] = np.linspace(-1.0, 1.0, channels).astype(own)
        if spec.track_running_stats:
            statistic = np.float64 if dtype == "float64" else np.float32
            given["running_mean"] = np.zeros(channels, statistic)
            given["running_var"] = np.ones(channels, statistic)
        want = reference.run(operator.spec, "forward", given)
        first = None
        for ahead in (0, 1, 4, 7, 15):
            y = _placed(shape, own, ahead)
            found = operator.forward(*given.values(), out={"y": y})
            _close(y, want["y"], dtype)
            assert _marks_left(y)
            # What is streamed is rounded like what is not: the alignment changes no bit.
            first = y.copy() if first is None else first
            assert y.tobytes() == first.tobytes()
        saved = {n: getattr(found, n) for n in ("mean", "inv_std") if hasattr(found, n)}
        answers = reference.run(
            operator.spec, "backward", {"dy": dy, "x": x, "gamma": gamma, **saved}
        )
        for ahead in (0, 3, 8):
            dx = _placed(shape, own, ahead)
            gradients = operator.backward(dy, x, gamma, *saved.values(), out={"dx": dx})
            for name, answer in answers.items():
                _close(getattr(gradients, name), answer, dtype)
            assert _marks_left(dx)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    ("op", "declared"),
    [
        ("layer_norm", ("N", 1)),
        ("rms_norm", ("N", 1)),
        ("group_norm", ("N", 4, 1, 1)),
    ],
)
def test_slices_of_one_element_have_outputs_of_several_alignments(
    op: str, declared: tuple[int | str, ...], dtype: str, streamed: Callable[..., Any]
) -> None:
    """The statistics are then as large as y, and lie elsewhere in a line."""
    spec = NormSpec(op, groups=4 if op == "group_norm" else None)
    operator = streamed(spec, declared, dtype)
    own, statistic = np.dtype(dtype), np.dtype("float64" if dtype == "float64" else "float32")
    shape = (1024, *(extent if isinstance(extent, int) else 1 for extent in declared[1:]))
    x = np.random.default_rng(0).standard_normal(shape).astype(own)
    channels = shape[1]
    given = {"x": x, "gamma": np.full(channels, 0.5, own)}
    if op != "rms_norm":
        given["beta"] = np.linspace(-1.0, 1.0, channels).astype(own)
    want = reference.run(operator.spec, "forward", given)
    aligned = {"y": own, "mean": statistic, "inv_std": statistic}
    names = [e["name"] for e in operator.manifest["kinds"]["forward"]["outputs"]]
    for placed in ((0, 0, 0), (0, 1, 3), (5, 0, 2), (4, 4, 4)):
        out = {
            name: _placed(want[name].shape, dtype_, ahead)
            for (name, dtype_), ahead in zip(aligned.items(), placed, strict=True)
            if name in names
        }
        operator.forward(*given.values(), out=out)
        for name, array in out.items():
            np.testing.assert_allclose(array.astype(np.float64), want[name], TOLERANCE[dtype])
            assert _marks_left(array)


def _close(found: Array, want: Array, dtype: str) -> None:
    error = np.max(np.abs(found.astype(np.float64) - want))
    assert error <= TOLERANCE[dtype] * np.max(np.abs(want))


def test_the_caller_sees_what_was_streamed(streamed: Callable[..., Any]) -> None:
    """Streamed stores are fenced before a task ends: no reader of another thread is early."""
    operator = streamed(NormSpec("instance_norm"), ("N", 5, "H", "W"))
    x = np.random.default_rng(0).standard_normal((8, 5, 96, 96)).astype(np.float32)
    gamma, beta = np.ones(5, np.float32), np.zeros(5, np.float32)
    want = operator.forward(x, gamma, beta).y.copy()
    y = np.empty_like(x)
    for _ in range(200):
        y.fill(np.nan)
        operator.forward(x, gamma, beta, out={"y": y})
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 4])
def test_whole_lines_are_streamed(dtype: str, lanes: int, rows: int) -> None:
    """Parts of lines, of narrow vectors or of rows that take turns, cost as much as whole ones."""
    own = streaming.Streaming(resolve("x86-64-v3"))
    memory = tirx.decl_buffer((1 << 20,), dtype, "memory")
    stores = [
        RowStore(
            lambda index: tirx.BufferLoad(memory, [index]),
            lambda index, value, new: tirx.BufferStore(memory, value, [index]),
            dtype,
            stream=lambda index: tirx.BufferLoad(memory, [index]),
        )
        for _ in range(rows)
    ]
    length = Length.of(tirx.Var("length", "int64"))
    large = tirx.Var("large", "bool")
    body = output_row(length, stores, lanes=lanes, unroll=1, streaming=own, large=large)
    lengths = re.findall(rf"normgraph_stream_{dtype}x(\d+)", str(body))
    own_type = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    # Once for rows that are long or whole lines, once for shorter ones.
    assert len(lengths) == 2 * rows
    assert all(int(each) * own_type.itemsize % 64 == 0 for each in lengths)


@pytest.mark.parametrize(("staged_columns", "staged"), [(512, False), (1 << 20, True)])
def test_long_rows_of_a_row_range_are_not_made_ready(staged_columns: int, staged: bool) -> None:
    """Four of them would take a megabyte, which is no memory that stays in the first cache."""
    columns, target = 65537, resolve("x86-64-v3")
    model = build(NormSpec("layer_norm"), "backward", shape=("N", columns))
    with tried(staged_columns=staged_columns):
        made = pipeline.schedule("backward", model, target, pipeline.Dump(None), lambda line: None)
        module = codegen.generate({"backward": made.func}, target.to_tvm())
    room = 4 * (4 * columns + 16)  # four rows and a line
    assert (re.search(rf"\b{room}\b", module.inspect_source("ll")) is not None) == staged


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("op", ["instance_norm", "batch_norm", "group_norm"])
def test_what_the_next_block_reads_is_asked_for(op: str, kind: str) -> None:
    """Of each whole-size input."""
    spec = NormSpec(op, groups=2 if op == "group_norm" else None)
    made = pipeline.schedule(
        kind,
        build(spec, kind, shape=("N", 6, "L")),
        resolve("x86-64-v3"),
        pipeline.Dump(None),
        lambda line: None,
    )
    call = r'"normgraph_prefetch", T\.address_of\((\w+)_flat\[.* \+ ahead(?:_\d+)?\)\]'
    asked = re.findall(call, str(made.func.script()))
    assert set(asked) == ({"x"} if kind == "forward" else {"dy", "x"})


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_machine_code_streams(dtype: str, target: str) -> None:
    """LLVM takes the usual store for what it has no other one for, without a word."""
    model = build(NormSpec("layer_norm"), "forward", shape=("N", 1024), dtype=dtype)
    made = pipeline.schedule(
        "forward", model, resolve(target), pipeline.Dump(None), lambda line: None
    )
    module = codegen.generate({"forward": made.func}, resolve(target).to_tvm())
    assert re.search(r"\bvmovntp?\w+\s+%[yz]mm", module.inspect_source("asm"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_to_the_nearest(dtype: str, streamed: Callable[..., Any]) -> None:
    operator = streamed(NormSpec("rms_norm", weight=False), ("N", 1000), dtype)
    own = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x = np.random.default_rng(0).standard_normal((70, 1000)).astype(own)
    want = reference.run(operator.spec, "forward", {"x": x})["y"]
    found = operator.forward(x).y
    off = found.astype(np.float64) != want.astype(np.float32).astype(own).astype(np.float64)
    assert np.mean(off) < 1e-3
