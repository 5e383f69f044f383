"""How a slice lies in memory, and which of its elements a thread takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tvm import tirx

from normgraph.compile.addressing import Position, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_kernel import (
    WARP,
    as_i32,
    at_most,
    ceildiv,
    i32,
    log2_ceil,
    on_host,
    power,
)
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.slice_plan import SlicePlan, Step
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import Expr, Stmt, constant, i64, product


@dataclass(frozen=True)
class Geometry:
    """A slice is `rows` rows of `length` contiguous elements.

    Along a row every operand is contiguous or constant. The rows of a slice are planes of several
    channels (group norm) or samples of one channel (batch norm, where other slices lie between).
    """

    plan: SlicePlan
    slice_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    slices: Expr
    rows: Expr
    length: Expr

    @property
    def wide(self) -> Tensor:
        """An input with all elements: all of them have one shape."""
        every = frozenset(self.plan.wide_axes)
        return next(t for t in self.plan.program.inputs if t.axes == every)

    def along(self, vector: int) -> int:
        """Registers for a vector of each input that varies along a row and not across rows."""
        found = [t for t in self.plan.program.inputs if t.axes == frozenset(self.column_axes)]
        return sum(vector * item_size(t.dtype) for t in found if t.axes != self.wide.axes) // 4

    def stride(self, axes: tuple[int, ...]) -> Expr:
        """Elements from one index along `axes` to the next, in a whole-size tensor."""
        return offset(self.wide, Position().along(axes, i64(1)), self.plan.program.extents)

    def position(
        self, slice_index: Expr, row: Expr | None = None, column: Expr | None = None
    ) -> Position:
        """The position of an element of a slice."""
        at = Position().along(self.slice_axes, slice_index)
        if row is not None and self.row_axes:
            at = at.along(self.row_axes, row)
        return at if column is None else at.along(self.column_axes, column)


def geometry(plan: SlicePlan, stmts: list[Stmt]) -> Geometry:
    """The geometry of a plan's slices, its sizes named in `stmts`."""
    extents = plan.program.extents
    steps = [s for p in plan.passes for s in p.wide]
    columns = _columns(plan, steps)
    between = tuple(a for a in plan.inner_axes if a not in columns)
    if between and plan.lead_axes:
        raise NotCanonical("rows along axes on both sides of the slices' own")
    rows = plan.lead_axes or between

    def size(axes: Iterable[int], name: str) -> Expr:
        return on_host(name, product([extents[a] for a in axes]), stmts)

    return Geometry(
        plan,
        plan.slice_axes,
        rows,
        columns,
        size(plan.slice_axes, "slices"),
        size(rows, "rows"),
        size(columns, "length"),
    )


def _columns(plan: SlicePlan, steps: list[Step]) -> tuple[int, ...]:
    for first in range(len(plan.inner_axes)):
        run = plan.inner_axes[first:]
        if all(_runs_along(step, frozenset(run)) for step in steps):
            return run
    raise NotCanonical("no axis along which all operands are contiguous or constant")


def _runs_along(step: Step, run: frozenset[int]) -> bool:
    whole = all(t.axes & run in (run, frozenset()) for t in loads(step.value))
    return whole and step.op.reduce & run in (run, frozenset())


@dataclass(frozen=True)
class Mapping:
    """Which elements of a tile a thread takes: `registers` vectors of `vector` elements.

    2**column_bits threads go along a row, 2**row_bits along the rows; of the vectors of a thread
    2**run_bits lie in one row, the others in further rows. All three int32. `team` threads do one
    slice; `threads` form a block, which is one team or several small ones.
    """

    vector: int
    registers: int
    threads: int
    column_bits: Expr
    row_bits: Expr
    run_bits: Expr
    warps: bool  # teams are parts of a warp

    @property
    def team_bits(self) -> Expr:
        """log2 of the threads of a team."""
        return _sum(self.column_bits, self.row_bits)

    @property
    def team(self) -> Expr:
        """The threads of a team."""
        return shifted(i32(1), self.team_bits)


def mapping(
    rows: Expr | None,
    length: Expr,
    stmts: list[Stmt],
    *,
    vector: int,
    registers: int,
    threads: int,
    warps: bool,
) -> tuple[Mapping, Expr]:
    """How threads cover a tile of a slice, and whether the tile is all of it.

    rows: None where a slice is one row. stmts: where the host computes it. warps: teams are as
    small as the slice allows.
    """
    most = (WARP if warps else threads).bit_length() - 1
    vectors = on_host("vectors", ceildiv(length, i64(vector)), stmts)
    if rows is None and not warps:
        columns: Expr = i32(most)
    else:
        columns = on_host("column_bits", log2_ceil(vectors, most), stmts, "int32")
    run = on_host("run", ceildiv(vectors, power(columns)), stmts)
    down: Expr = i32(0)
    if rows is None:
        fits = at_most(run, i64(registers))
        bits = log2_ceil(i64(registers), 31)
    else:
        free = _minus(i32(most), columns)
        down = _least(log2_ceil(rows, most), free) if warps else free
        down = on_host("row_bits", down, stmts, "int32")
        run_bits = log2_ceil(run, (registers - 1).bit_length() + 1)
        run_bits = on_host("run_bits", run_bits, stmts, "int32")
        fits = at_most(_scaled(ceildiv(rows, power(down)), run_bits), i64(registers))
        bits = on_host(
            "run_bits", _least(run_bits, i32(registers.bit_length() - 1)), stmts, "int32"
        )
    return Mapping(vector, registers, threads, columns, down, bits, warps), fits


def shifted(value: Expr, bits: Expr) -> Expr:
    """value * 2**bits, int32."""
    x, y = constant(value), constant(bits)
    if x is not None and y is not None:
        return i32(x << y)
    return value if y == 0 else tirx.shift_left(value, bits)


def _scaled(value: Expr, bits: Expr) -> Expr:
    x, y = constant(value), constant(bits)
    if x is not None and y is not None:
        return i64(x << y)
    return tirx.shift_left(value, tirx.Cast("int64", bits))


def _sum(a: Expr, b: Expr) -> Expr:
    x, y = constant(a), constant(b)
    if x is not None and y is not None:
        return i32(x + y)
    return a + b


def _minus(a: Expr, b: Expr) -> Expr:
    x, y = constant(a), constant(b)
    return i32(x - y) if x is not None and y is not None else a - b


def _least(a: Expr, b: Expr) -> Expr:
    x, y = constant(a), constant(b)
    return i32(min(x, y)) if x is not None and y is not None else tirx.Min(a, b)


@dataclass(frozen=True)
class Span:
    """The part of a slice a block goes through: rows and vectors of columns, int32."""

    row: Expr
    row_end: Expr
    column: Expr
    column_end: Expr


def whole(geometry: Geometry, vector: int) -> Span:
    """All of a slice."""
    columns = as_i32(ceildiv(geometry.length, i64(vector)))
    return Span(i32(0), as_i32(geometry.rows), i32(0), columns)


@dataclass(frozen=True)
class Chunks:
    """A slice cut into `row_parts` x `column_parts` chunks; sizes int64, columns in vectors."""

    row_parts: Expr
    column_parts: Expr
    rows: Expr
    columns: Expr

    @property
    def count(self) -> Expr:
        """Chunks of a slice."""
        return product([self.row_parts, self.column_parts])
