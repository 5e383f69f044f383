"""What a team of threads does with a tile of a slice: load it, add it up, store outputs.

Each thread holds `registers` vectors of every whole-size input. All loads of a tile are issued
before the first value is used, so that a thread has `registers` vectors of each input in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_frame import CudaFrame
from normgraph.compile.cuda_geometry import Geometry, Mapping, Span, shifted
from normgraph.compile.cuda_kernel import (
    anew,
    as_i64,
    get,
    grow,
    i32,
    move,
    named_index,
    packed,
    put,
    registers,
    rounded_sum,
    unrolled,
    value_of,
)
from normgraph.compile.slice_plan import Step, distinct
from normgraph.compile.tensor_program import Node, Tensor, loads
from normgraph.compile.tir import Expr, Stmt, both, constant, i64, seq, when

Read = Callable[[Tensor, Expr], Expr]


@dataclass
class Place:
    """One vector of a tile: its row and column (in vectors, int32) and its offset (in vectors)."""

    index: Expr
    row: Expr
    column: Expr
    offset: Expr


class Tile:
    """The statements of one tile in one kernel.

    columns, rows: this thread's place in its team. values: per-slice values at hand.
    """

    def __init__(self, frame: CudaFrame, geometry: Geometry, mapping: Mapping) -> None:
        self.frame = frame
        self.geometry = geometry
        self.plan = geometry.plan
        self.mapping = mapping
        self.every = frozenset(self.plan.wide_axes)
        self.column_axes = frozenset(geometry.column_axes)
        self.row_axes = frozenset(geometry.row_axes)
        size = mapping.registers * mapping.vector
        self.held = {
            t: registers(size, t.dtype, f"{t.name}_held")
            for t in self.plan.program.inputs
            if t.axes == self.every
        }
        self.values: dict[Tensor, Expr] = {}
        self.lanes: dict[Tensor, Any] = {}  # one value a lane, the same in each row
        self.rewrite: Callable[[Node], Node] = lambda node: node
        self.column: Expr = i32(0)
        self.row: Expr = i32(0)
        self.base: Expr = i64(0)
        self.row_stride: Expr = i64(0)
        self.slice: Expr = i64(0)
        self.active: Expr | None = None

    def open(self, lane: Expr, stmts: list[Stmt]) -> None:
        """Declare the registers; where thread `lane` of a team stands."""
        stmts.extend(tirx.AllocBuffer(buffer) for buffer in self.held.values())
        bits = self.mapping.column_bits
        mask = shifted(i32(1), bits) - 1
        self.column = named_index("column", tirx.BitwiseAnd(lane, mask), stmts)
        if self.geometry.row_axes:
            self.row = named_index("row", tirx.shift_right(lane, bits), stmts)
            self.row_stride = self._vectors(self.geometry.stride(self.geometry.row_axes))

    def _vectors(self, size: Expr) -> Expr:
        width = self.mapping.vector
        known = constant(size)
        if known is not None:
            return i64(known // width)
        if width == 1:
            return size
        return tirx.shift_right(size, i64(width.bit_length() - 1))

    def at_slice(self, index: Expr, active: Expr | None, stmts: list[Stmt]) -> None:
        """Go to slice `index` (int64, in range). active: whether this thread's team has one."""
        self.slice, self.active = index, active
        stride = self._vectors(self.geometry.stride(self.geometry.slice_axes))
        self.base = named_index("base", index * stride, stmts)
        self.values = {}

    # Going through a tile.

    def each(
        self,
        span: Span,
        body: Callable[[Place], Stmt],
        after: Callable[[Expr, Expr], Stmt] | None = None,
    ) -> Stmt:
        """`body` for each vector of this thread's that lies in the span.

        after: what all threads do behind each step, given the step and the row.
        """
        m = self.mapping

        def step(k: Expr) -> Stmt:
            stmts: list[Stmt] = []
            row, column = self._coordinates(span, k, stmts)
            conditions = [tirx.LT(column, span.column_end)]
            if self.geometry.row_axes:
                conditions.append(tirx.LT(row, span.row_end))
            if self.active is not None:
                conditions.append(self.active)
            offset = self.base + as_i64(column)
            if self.geometry.row_axes:
                offset = offset + as_i64(row) * self.row_stride
            inner: list[Stmt] = []
            place = Place(k, row, column, named_index("offset", offset, inner))
            stmts.append(when(both(conditions), seq([*inner, body(place)])))
            return seq([*stmts, after(k, row) if after else None])

        return seq([*self.fresh(), unrolled(m.registers, step, "k")])

    def fresh(self) -> list[Stmt]:
        """Places and conversions are made anew behind here, and not kept in registers.

        Those of 8 vectors would take 24 registers and more.
        """
        made = [anew(self.column), anew(self.row), *map(packed, self.held.values())]
        return [stmt for stmt in made if stmt is not None]

    def _coordinates(self, span: Span, k: Expr, stmts: list[Stmt]) -> tuple[Expr, Expr]:
        m = self.mapping
        if not self.geometry.row_axes:
            along = span.column + shifted(k, m.column_bits) + self.column
            return i32(0), named_index("at_column", along, stmts)
        in_run = tirx.BitwiseAnd(k, shifted(i32(1), m.run_bits) - 1)
        down = tirx.shift_right(k, m.run_bits)
        column = span.column + shifted(in_run, m.column_bits) + self.column
        row = span.row + shifted(down, m.row_bits) + self.row
        return named_index("at_row", row, stmts), named_index("at_column", column, stmts)

    # Loading.

    def load(self, span: Span, steps: Sequence[Step]) -> Stmt:
        """Bring what the steps read into registers."""
        read = distinct(t for step in steps for t in loads(step.value) if t.axes == self.every)

        def vector(place: Place) -> Stmt:
            return seq([self._load_one(t, steps, place) for t in read])

        return self.each(span, vector)

    def _load_one(self, tensor: Tensor, steps: Sequence[Step], place: Place) -> Stmt:
        width = self.mapping.vector
        needs = [step.needs for step in steps if tensor in set(loads(step.value))]
        wanted = self.frame.any_of(frozenset[int]().union(*needs))
        source = self.frame.flat[tensor]
        at = place.offset * i64(width) if width > 1 else place.offset
        to = place.index * width
        return when(wanted, move(self.held[tensor], to, source, at, width))

    # Values.

    def reading(self, steps: Sequence[Step], place: Place, before: list[Stmt]) -> Read:
        """How elements of a vector are read; what is the same for it is loaded in `before`."""
        fixed: dict[Tensor, Expr] = {}
        vectors: dict[Tensor, Any] = {}
        width = self.mapping.vector
        for tensor in distinct(t for step in steps for t in loads(step.value)):
            if tensor in self.held or tensor in self.values or tensor in self.lanes:
                continue
            if tensor.axes & self.column_axes:
                if tensor.axes != self.column_axes:
                    raise NotCanonical(f"{tensor.name} varies along a row and across rows")
                buffer = registers(width, tensor.dtype, f"{tensor.name}_vector")
                vectors[tensor] = buffer
                source, at = self.frame.vector_at(tensor, as_i64(place.column), width)
                before += [tirx.AllocBuffer(buffer), move(buffer, i32(0), source, at, width)]
            else:
                at_row = self.geometry.position(self.slice, as_i64(place.row))
                buffer = registers(1, tensor.dtype, f"{tensor.name}_row")
                fixed[tensor] = get(buffer)
                value = self.frame.element(tensor, at_row)
                before += [tirx.AllocBuffer(buffer), put(buffer, value)]

        def read(tensor: Tensor, lane: Expr) -> Expr:
            if tensor in self.held:
                return get(self.held[tensor], place.index * width + lane)
            if tensor in self.lanes:
                return get(self.lanes[tensor], lane)
            if tensor in vectors:
                return get(vectors[tensor], lane)
            return fixed[tensor] if tensor in fixed else self.values[tensor]

        return read

    def value(self, node: Node, read: Callable[[Tensor], Expr]) -> Expr:
        """A value as an expression."""
        return value_of(node, read, self.rewrite)

    def element(self, step: Step, read: Read, lane: Expr) -> Expr:
        """A step's value at one element of a vector."""
        return self.value(step.value, lambda t: read(t, lane))

    # Sums.

    def add_up(self, steps: Sequence[Step], into: dict[Tensor, Any], place: Place) -> Stmt:
        """Add a vector's elements to sums in registers: one each, one a lane, or one an element."""
        groups: dict[frozenset[int], list[Step]] = {}
        for step in steps:
            groups.setdefault(step.needs, []).append(step)
        done = []
        for needs, group in groups.items():
            before: list[Stmt] = []
            read = self.reading(group, place, before)

            def lane_of(lane: Expr, group: list[Step] = group, read: Read = read) -> Stmt:
                return seq([self._add_one(step, into, place, read, lane) for step in group])

            lanes = unrolled(self.mapping.vector, lane_of, "v")
            done.append(when(self.frame.any_of(needs), seq([*before, lanes])))
        return seq(done)

    def _add_one(
        self, step: Step, into: dict[Tensor, Any], place: Place, read: Read, lane: Expr
    ) -> Stmt:
        buffer, width = into[step.op.out], self.mapping.vector
        at = {1: i32(0), width: lane}.get(int(buffer.shape[0]), place.index * width + lane)
        return grow(buffer, self.element(step, read, lane), at)

    # Outputs.

    def outputs(self, span: Span, steps: Sequence[Step]) -> Stmt:
        """Store, or add to, whole-size outputs as asked."""
        done = []
        for step in steps:
            index = self.frame.output_of(step)
            write = self.each(span, partial(self._store, step, False))
            add = self.each(span, partial(self._store, step, True))
            done.append(
                when(self.frame.is_write(index), write, when(self.frame.is_add(index), add))
            )
        return seq(done)

    def _store(self, step: Step, add: bool, place: Place) -> Stmt:
        width, tensor = self.mapping.vector, step.op.out
        before: list[Stmt] = []
        read = self.reading([step], place, before)
        target = self.frame.flat[tensor]
        at = place.offset * i64(width) if width > 1 else place.offset
        out = registers(width, tensor.dtype, f"{tensor.name}_out")
        before.append(tirx.AllocBuffer(out))
        if add:
            before.append(move(out, i32(0), target, at, width))

        def one(lane: Expr) -> Stmt:
            value = self.element(step, read, lane)
            return put(out, rounded_sum(get(out, lane), value) if add else value, lane)

        whole = unrolled(width, one, "v")
        return seq([*before, whole, move(target, at, out, i32(0), width)])

    # Values of a slice.

    def position(self, row: Expr | None = None) -> Position:
        """The position of the slice at hand, or of a row of it."""
        return self.geometry.position(self.slice, row)
