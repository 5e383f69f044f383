"""When the next block is asked for: by inputs, by its length and by what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tvm import sym, tirx

from normgraph import NormSpec
from normgraph.compile.next_block import next_block
from normgraph.compile.slice_plan import plan
from normgraph.compile.streaming import Streaming
from normgraph.compile.targets import resolve
from normgraph.compile.tensor_program import TensorProgram
from normgraph.compile.tir import i64

Program = Callable[..., TensorProgram]
SLICES = 12


def _asked(program: TensorProgram, start: int, slices: int) -> int:
    """The distance asked for, of blocks of so many slices."""
    order = plan(program)
    distance = slices * int(order.row_length.value)
    stmts: list[Any] = []
    next_block(order, Streaming(resolve("x86-64-v3")), i64(start), i64(distance), stmts)
    (bound,) = stmts
    assert isinstance(bound, tirx.Bind)
    hidden = bound.value.args[1]
    found = int(sym.Analyzer().simplify(hidden).value)
    assert found in (0, distance)
    return found


@pytest.mark.parametrize("length", [7, 300, 2048, 2049, 16384, 131071, 131072])
@pytest.mark.parametrize(("op", "kind"), [("layer_norm", "forward"), ("rms_norm", "inference")])
def test_rows_of_one_input(op: str, kind: str, length: int, program: Program) -> None:
    made = program(NormSpec(op), kind, shape=(SLICES, length))
    assert _asked(made, 4, 1) == length
    assert _asked(made, SLICES, 1) == 0  # there is none behind the last


@pytest.mark.parametrize(
    ("length", "slices", "asked"),
    [
        (2048, 1, True),
        (2049, 1, False),
        (1024, 2, True),
        (1024, 3, False),
        (16383, 1, False),
        (16384, 1, True),
        (48 * 1024, 1, True),  # of 8 bytes each
        (48 * 1024 + 1, 1, False),
    ],
)
def test_planes_of_two_inputs(length: int, slices: int, asked: bool, program: Program) -> None:
    made = program(NormSpec("instance_norm"), "backward", shape=(2, SLICES // 2, length))
    assert (_asked(made, 4, slices) != 0) == asked


def test_channels_lie_apart(program: Program) -> None:
    made = program(NormSpec("batch_norm"), "backward", shape=(8, SLICES, 100, 100))
    assert _asked(made, 4, 1) == 10000
    assert _asked(made, SLICES, 1) == 0


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 262144), ("float16", 524288), ("float64", 131072)]
)
def test_a_block_that_is_not_kept(dtype: str, most: int, program: Program) -> None:
    """Of more than a megabyte, L2 keeps too little until it is read."""
    for length in (most, most + 1):
        made = program(NormSpec("layer_norm"), "forward", shape=(SLICES, length), dtype=dtype)
        assert (_asked(made, 4, 1) != 0) == (length == most)


@pytest.mark.parametrize(("kind", "inputs"), [("forward", 1), ("backward", 2)])
def test_of_channels_all_rows_count(kind: str, inputs: int, program: Program) -> None:
    for rows in (26 // inputs, 27 // inputs + 1):
        made = program(NormSpec("batch_norm"), kind, shape=(rows, SLICES, 100, 100))
        assert (_asked(made, 4, 1) != 0) == (rows * inputs * 40_000 <= 1 << 20)
