"""A block's part of a slice, held on the chip: what a thread loads once it finds again.

The vectors of a slice, row after row, are cut into chunks of equal size, so that nothing is lost
where rows end; or each row for itself, where its sums are wanted. Thread t takes vectors t, t +
256, ... of its block's chunk and keeps them in shared memory, at places that no other thread
touches: no barrier stands between, and the lanes of a warp hit different banks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_frame import CudaFrame
from normgraph.compile.cuda_geometry import Geometry, Mapping, Span
from normgraph.compile.cuda_kernel import (
    as_i32,
    as_i64,
    ceildiv,
    cleared,
    counted,
    get,
    i32,
    move,
    named_index,
    on_host,
    quotient,
    registers,
    shared_of_launch,
    unrolled,
)
from normgraph.compile.cuda_tile import Place, Tile
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.slice_plan import Step, distinct
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import Expr, Stmt, i64, seq, times, when

# The row of vector t is (t * (2**45 / d + 1)) >> 45 for d vectors a row: exact, and below 2**63,
# while t < 2**17 + d and d < 2**22. Chunks are shorter than 2**17 vectors.
_SHIFT = 45
ROW = 1 << 22


class Cut:
    """How the host cuts the slices: `chunk` vectors a block, in `blocks` blocks; int64.

    by_rows: whether no chunk has vectors of two rows. parts: of what is cut, a slice or a row.
    """

    def __init__(self, geometry: Geometry, vector: int, threads: int, by_rows: bool) -> None:
        self.geometry = geometry
        self.vector = vector
        self.threads = threads
        self.by_rows = by_rows
        self.parts: Expr = i64(1)
        self.row: Expr = i64(1)  # vectors
        self.slice: Expr = i64(1)
        self.chunk: Expr = i64(1)
        self.blocks: Expr = i64(1)
        self.slots: Expr = i64(1)  # vectors of each input that a block has room for
        self.reciprocal: Expr = i64(1)

    def measure(self, stmts: list[Stmt]) -> None:
        """The sizes of rows and slices in vectors."""
        g = self.geometry
        self.row = on_host("row_vectors", ceildiv(g.length, i64(self.vector)), stmts)
        self.slice = on_host("slice_vectors", times(g.rows, self.row), stmts)

    def cut(self, blocks: Expr, stmts: list[Stmt]) -> None:
        """Cut slices for at most `blocks` blocks, so that none is without a vector."""
        whole = self.row if self.by_rows else self.slice
        parts = tirx.Div(blocks, self.geometry.rows) if self.by_rows else blocks
        self.chunk = on_host("chunk", ceildiv(whole, parts), stmts)
        self.parts = on_host("chunks", ceildiv(whole, self.chunk), stmts)
        self.blocks = self.parts
        if self.by_rows:
            self.blocks = on_host("team_blocks", times(self.geometry.rows, self.parts), stmts)
        threads = i64(self.threads)
        self.slots = on_host("slots", times(ceildiv(self.chunk, threads), threads), stmts)
        if self.geometry.row_axes and not self.by_rows:
            inverse = tirx.Div(i64(1 << _SHIFT), self.row) + 1
            self.reciprocal = on_host("row_inverse", inverse, stmts)

    def first(self, part: Expr) -> tuple[Expr, Expr]:
        """The row that chunk `part` is cut from, 0 for the whole slice; its first vector there."""
        if not self.by_rows:
            return i32(0), part * as_i32(self.chunk)
        row = quotient(part, as_i32(self.parts))
        return row, (part - row * as_i32(self.parts)) * as_i32(self.chunk)

    def size(self, first: Expr) -> Expr:
        """The vectors of the chunk that begins there."""
        left = as_i32(self.row if self.by_rows else self.slice) - first
        return tirx.Min(left, as_i32(self.chunk))


class ChunkTile(Tile):
    """Tiles of a chunk: spans are of its vectors, in `column` and `column_end`."""

    def __init__(
        self,
        frame: CudaFrame,
        geometry: Geometry,
        mapping: Mapping,
        cut: Cut,
        columns: Sequence[Tensor],
    ) -> None:
        super().__init__(frame, geometry, mapping)
        self.cut = cut
        self.columns = columns
        self.lanes_together = min(mapping.vector, 4)  # of a column sum, in 16 bytes
        self.kept_types = {t.dtype for t in self.held}
        if len(self.kept_types) > 1:
            raise NotCanonical("inputs of several types")
        self.start: Expr = i32(0)
        self.start_row: Expr = i32(0)
        self.count: Expr = i32(0)
        self.chip: Any = None
        self.sums: Any = None
        self.sums_size = 0  # elements of the held type, a vector

    def take_part(self, part: Expr, stmts: list[Stmt]) -> None:
        """Take the part-th chunk of each slice; declare the memory that holds it."""
        (dtype,) = self.kept_types
        width, slots = self.mapping.vector, self.cut.slots
        wide = len(self.columns) * width
        self.sums_size = wide * item_size(self.frame.dtype) // item_size(dtype)
        size = times(i64(len(self.held) * width + self.sums_size), slots)
        self.chip = shared_of_launch((size,), dtype, "chunk_held")
        stmts.append(tirx.AllocBuffer(self.chip))
        if self.columns:
            size = times(i64(wide), slots)
            self.sums = shared_of_launch((size,), self.frame.dtype, "column_sums")
            stmts.append(tirx.DeclBuffer(self.sums, data=self.chip.data))
        row_of, begin = self.cut.first(part)
        first = named_index("first_vector", begin, stmts)
        self.count = named_index("count", self.cut.size(first), stmts)
        self.start = first
        if self.cut.by_rows:
            self.start_row = named_index("first_row", row_of, stmts)
        elif self.geometry.row_axes:
            row = as_i32(self.cut.row)
            self.start_row = named_index("first_row", quotient(first, row), stmts)
            self.start = named_index("first_column", first - self.start_row * row, stmts)

    def each_tile(self, body: Callable[[Span], Stmt]) -> Stmt:
        """`body` for each tile of the chunk."""
        size = self.mapping.registers * self.mapping.threads

        def one(k: Expr) -> Stmt:
            stmts: list[Stmt] = []
            first = named_index("tile_first", k * size, stmts)
            return seq([*stmts, body(Span(i32(0), i32(1), first, self.count))])

        return counted(quotient(self.count + (size - 1), size), one, "tile")

    def each(
        self,
        span: Span,
        body: Callable[[Place], Stmt],
        after: Callable[[Expr, Expr], Stmt] | None = None,
    ) -> Stmt:
        """`body` for each vector of this thread's that lies in the span."""
        if after is not None:
            raise NotCanonical("sums of rows of a slice that several blocks hold")

        def step(k: Expr) -> Stmt:
            stmts: list[Stmt] = []
            at = span.column + k * self.mapping.threads + self.column
            number = named_index("number", at, stmts)
            inner: list[Stmt] = []
            row, column = self._coordinates(span, number, inner)
            offset = self.base + as_i64(column)
            if self.geometry.row_axes:
                offset = offset + as_i64(row) * self.row_stride
            place = Place(k, row, column, named_index("offset", offset, inner))
            inside = tirx.LT(number, span.column_end)
            return seq([*stmts, when(inside, seq([*inner, body(place)]))])

        return seq([*self.fresh(), unrolled(self.mapping.registers, step, "k")])

    def _coordinates(self, span: Span, k: Expr, stmts: list[Stmt]) -> tuple[Expr, Expr]:
        del span
        along = named_index("along", self.start + k, stmts)
        if self.cut.by_rows or not self.geometry.row_axes:
            return self.start_row, along
        rows = tirx.shift_right(as_i64(along) * self.cut.reciprocal, i64(_SHIFT))
        down = named_index("down", tirx.Cast("int32", rows), stmts)
        column = named_index("at_column", along - down * as_i32(self.cut.row), stmts)
        return named_index("at_row", self.start_row + down, stmts), column

    # The chip.

    def bring(self, span: Span, steps: Sequence[Step]) -> Stmt:
        """Load a tile from memory and keep it."""
        return seq([self.load(span, steps), self._between(span, steps, keep=True)])

    def find(self, span: Span, steps: Sequence[Step]) -> Stmt:
        """Load what the steps read of a tile that is kept."""
        return self._between(span, steps, keep=False)

    def _between(self, span: Span, steps: Sequence[Step], keep: bool) -> Stmt:
        read = distinct(t for step in steps for t in loads(step.value) if t in self.held)
        return self.each(span, lambda place: self._move(span, read, steps, keep, place))

    def _move(
        self, span: Span, read: list[Tensor], steps: Sequence[Step], keep: bool, place: Place
    ) -> Stmt:
        width, moved = self.mapping.vector, []
        for tensor in read:
            needs = [step.needs for step in steps if tensor in set(loads(step.value))]
            wanted = self.frame.any_of(frozenset[int]().union(*needs))
            slots, here = as_i32(self.cut.slots), place.index * width
            before = slots * (self.sums_size // width + [*self.held].index(tensor))
            kept = (before + self._slot(span, place)) * width
            held = self.held[tensor]
            copy = (self.chip, kept, held, here) if keep else (held, here, self.chip, kept)
            moved.append(when(wanted, move(*copy, width)))
        return seq(moved)

    def _slot(self, span: Span, place: Place) -> Expr:
        return span.column + place.index * self.mapping.threads + self.column

    # Sums down the columns, over the slices that the block goes through.

    def add_columns(self, span: Span, steps: Sequence[Step], number: Expr) -> Stmt:
        """Add a tile to the sums of its columns, which begin with slice `number` 0."""
        return self.each(span, lambda place: self._add_columns(span, steps, number, place))

    def _add_columns(self, span: Span, steps: Sequence[Step], number: Expr, place: Place) -> Stmt:
        done = []
        for step in steps:
            tensor = step.op.out
            total = registers(self.mapping.vector, tensor.dtype, f"{tensor.name}_columns")
            before = self._each_piece(tensor, span, place, partial(self._take_piece, total))
            after = self._each_piece(tensor, span, place, partial(self._put_piece, total))
            work = [
                cleared(total),
                when(tirx.GT(number, i32(0)), before),
                self.add_up([step], {tensor: total}, place),
                after,
            ]
            done.append(when(self.frame.any_of(step.needs), seq(work)))
        return seq(done)

    def _take_piece(self, total: Any, lane: Expr, at: Expr) -> Stmt:
        return move(total, lane, self.sums, at, self.lanes_together)

    def _put_piece(self, total: Any, lane: Expr, at: Expr) -> Stmt:
        return move(self.sums, at, total, lane, self.lanes_together)

    def _each_piece(
        self, tensor: Tensor, span: Span, place: Place, body: Callable[[Expr, Expr], Stmt]
    ) -> Stmt:
        """`body(lane, index)` for each 16 bytes of a vector's sums: its first lane, its place."""
        pieces = self.mapping.vector // self.lanes_together
        first, slots = self.columns.index(tensor) * pieces, as_i32(self.cut.slots)
        made = []
        for k in range(pieces):
            slot = slots * (first + k) + self._slot(span, place)
            made.append(body(i32(k * self.lanes_together), slot * self.lanes_together))
        return seq(made)

    def each_column(self, tensor: Tensor, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """`body(column, sum)` for each element of this thread's columns."""

        def vector(span: Span, place: Place) -> Stmt:
            def piece(lane: Expr, at: Expr) -> Stmt:
                first = as_i64(place.column) * i64(self.mapping.vector) + as_i64(lane)

                def one(v: Expr) -> Stmt:
                    return body(first + as_i64(v), get(self.sums, at + v))

                return unrolled(self.lanes_together, one, "v")

            return self._each_piece(tensor, span, place, piece)

        return self.each_tile(lambda span: self.each(span, lambda place: vector(span, place)))
