"""Slices that no team holds: several blocks a slice, partial sums, a kernel a traversal.

1. A slice is cut into chunks, each a block's work; a tile of it at a time is held in registers.
2. Each traversal of the plan is a kernel. What its sums give is stored chunk by chunk; the next
   kernel adds the parts of its slice up first, in a fixed order, every block for itself.
3. A mean and the sums centred on it take one traversal: each chunk centres on the mean s of its
   first tile. With n elements, A = sum(x - s), Q = sum((x - s)^2) and d = mean - s,

       mean = sum(n s + A) / m
       sum(x - mean)     = sum(A - n d)
       sum((x - mean)^2) = sum(Q - d (2 A - n d))

   exactly (Chan, Golub and LeVeque 1983); the tile is at least 1/16 of the chunk, so d^2 is at
   most 16 variances, 32 for half types, where s has few digits (`cuda_gather`); nothing cancels
   beyond what `shifted_sums` allows.
4. Later traversals take the slices backwards: what was read last is still in L2.

Roofline. A, the bytes of an array; B, the bandwidth of device memory; L, that of one more launch;
h, the part of a traversal's arrays that the next finds in L2. Inference traverses once, forward
reads x twice, backward x and dy:

    inference  2 A / B        forward  (3 - h) A / B + L        backward  (5 - 2 h) A / B + L

Where a traversal of the columns follows (`ColumnSums`), x and dy are read once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.cuda_frame import CudaFrame
from normgraph.compile.cuda_gather import Centring, Parts, Stage, gather, stages
from normgraph.compile.cuda_geometry import Chunks, Geometry, Mapping, Span, shifted
from normgraph.compile.cuda_kernel import (
    REGISTERS,
    WARP,
    as_i32,
    as_i64,
    butterfly,
    ceildiv,
    cleared,
    counted,
    get,
    grow,
    i32,
    kernel,
    log2_ceil,
    named_index,
    on_host,
    over_block,
    power,
    quotient,
    registers,
)
from normgraph.compile.cuda_settle import Settler, is_row_sum
from normgraph.compile.cuda_tile import Tile
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.shifted_sums import Match
from normgraph.compile.slice_plan import Step
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import (
    Expr,
    Stmt,
    i64,
    plus,
    seq,
    times,
    when,
)

THREADS = 256
# Blocks of a multiprocessor at most, of 80 registers a thread; those beside its elements and the
# parameters along them.
_RESIDENT = 3
_OTHER_REGISTERS = 48
# Chunks there should be at least, a few for each of some hundred multiprocessors; what one holds
# at least and at most, in tiles; and chunks of a slice at most, which every block adds up.
_CHUNKS = 2112
_TILES = (1, 4)
_PARTS = 64


class SplitSlices:
    """Emits the kernels of one vector width; `found` are the sums centred on the mean."""

    def __init__(
        self, frame: CudaFrame, geometry: Geometry, vector: int, found: Match | None
    ) -> None:
        self.frame = frame
        self.geometry = geometry
        self.plan = geometry.plan
        self.vector = vector
        self.registers = 4 if vector > 1 else 8
        every = geometry.wide.axes
        held = sum(item_size(t.dtype) for t in self.plan.program.inputs if t.axes == every)
        words = held * vector * self.registers // 4 + geometry.along(vector) + _OTHER_REGISTERS
        self.resident = min(REGISTERS // (THREADS * words), _RESIDENT)
        self.rows_apart = any(is_row_sum(self.plan, s) for p in self.plan.passes for s in p.wide)
        columns = {s.op.out for s in self.plan.column_sums}
        self.first, self.stages = stages(self.plan.passes, columns, found)
        self.chunks: Chunks
        self.blocks: Expr = i64(0)
        self.mapping: Mapping

    def prepare(self, stmts: list[Stmt]) -> None:
        """What the host computes in front of the allocation; room for the parts of sums."""
        self._cut(stmts)
        self.blocks = on_host("chunks", times(self.geometry.slices, self.chunks.count), stmts)
        for stage in self.stages:
            if stage.parts:
                stage.room = self.frame.room("parts", times(i64(stage.parts), self.blocks))

    def emit(self) -> Stmt:
        """All launches."""
        stmts: list[Stmt] = []
        for number, stage in enumerate(self.stages):
            if stage.sums or stage.outputs:
                body = partial(self._body, number, self.blocks)
                stmts.append(kernel(self.blocks, THREADS, body, self.resident))
            else:
                body = partial(self._body, number, self.geometry.slices)
                stmts.append(kernel(self.geometry.slices, WARP, body))
        return seq(stmts)

    def _cut(self, stmts: list[Stmt]) -> None:
        g, tile = self.geometry, THREADS * self.registers
        vectors = on_host("vectors", ceildiv(g.length, i64(self.vector)), stmts)
        of_slice = times(g.rows, vectors)
        share = ceildiv(times(g.slices, of_slice), i64(_CHUNKS))
        wanted = tirx.Min(tirx.Max(share, i64(_TILES[0] * tile)), i64(_TILES[1] * tile))
        wanted = on_host("wanted", tirx.Max(wanted, ceildiv(of_slice, i64(_PARTS))), stmts)
        columns = on_host("chunk_columns", ceildiv(vectors, ceildiv(vectors, wanted)), stmts)
        rows: Expr = i64(1)
        if g.row_axes and not self.rows_apart:
            rows = on_host("chunk_rows", tirx.Max(tirx.FloorDiv(wanted, vectors), i64(1)), stmts)
        self.chunks = Chunks(
            on_host("row_parts", ceildiv(g.rows, rows), stmts),
            on_host("column_parts", ceildiv(vectors, columns), stmts),
            rows,
            columns,
        )
        most = THREADS.bit_length() - 1
        bits = log2_ceil(columns, most) if g.row_axes else i32(most)
        bits = on_host("column_bits", bits, stmts, "int32")
        run = on_host("run", ceildiv(columns, power(bits)), stmts)
        run = log2_ceil(run, self.registers.bit_length() - 1)
        self.mapping = Mapping(
            self.vector,
            self.registers,
            THREADS,
            bits,
            on_host("row_bits", i32(most) - bits, stmts, "int32"),
            on_host("run_bits", run, stmts, "int32"),
            False,
        )

    # One kernel.

    def _body(self, number: int, blocks: Expr, block: Expr, thread: Expr) -> Stmt:
        stage = self.stages[number]
        chunk = _Chunk(self, stage, thread)
        stmts: list[Stmt] = []
        chunk.tile.rewrite = self.frame.kernel_scalars(stmts)
        traverses = bool(stage.sums or stage.outputs)
        index = block
        if number:
            index = as_i32(blocks) - 1 - block
        parts = as_i32(self.chunks.count) if traverses else i32(1)
        stmts += chunk.open(index, parts)
        settler = chunk.settler
        settler.read_inputs(stmts)
        settler.settle(self.first, stmts)
        for earlier in self.stages[:number]:
            gather(earlier, chunk.parts(), settler, self.frame, stmts)
            settler.settle(earlier.after, stmts)
        if traverses:
            chunk.traverse(stmts)
        if number == len(self.stages) - 1:
            stmts.append(self._keep(chunk))
        return seq(stmts)

    def _keep(self, chunk: _Chunk) -> Stmt:
        stored: list[Stmt] = []
        rows = [s.op.out for t in self.stages for s in t.sums if is_row_sum(self.plan, s)]
        if rows:

            def row(index: Expr, inner: list[Stmt]) -> None:
                for tensor in rows:
                    value = chunk.row_value(tensor, index, inner)
                    inner.append(chunk.settler.store(tensor, value, index))

            whole = chunk.settler.each_row(row)
            stored.append(when(tirx.LT(chunk.thread, i32(WARP)), whole))
        kept = chunk.settler.keep([*self.plan.per_slice])
        if kept:
            stored.append(when(tirx.EQ(chunk.thread, i32(0)), seq(kept)))
        return when(tirx.EQ(chunk.part, i32(0)), seq(stored)) if stored else seq([])


class _Chunk:
    """What one block does: the chunk's place, its slice's values, its part of the sums."""

    def __init__(self, split: SplitSlices, stage: Stage, thread: Expr) -> None:
        self.split = split
        self.stage = stage
        self.frame = split.frame
        self.thread = thread
        self.tile = Tile(split.frame, split.geometry, split.mapping)
        self.lane = tirx.BitwiseAnd(thread, i32(WARP - 1))
        self.settler = Settler(self.tile, self.lane, i32(WARP), self.row_value)
        self.part: Expr = i32(0)
        self.sources: dict[Tensor, tuple[Stage, int]] = {
            step.op.out: (each, k) for each in split.stages for k, step in enumerate(each.sums)
        }

    def open(self, index: Expr, parts: Expr) -> list[Stmt]:
        """Where the chunk lies."""
        stmts: list[Stmt] = []
        number = named_index("slice_index", quotient(index, parts), stmts)
        self.part = named_index("part", index - number * parts, stmts)
        self.tile.open(self.thread, stmts)
        self.tile.at_slice(as_i64(number), None, stmts)
        return stmts

    # The parts of the slice's sums.

    def _part(self, stage: Stage, number: int, part: Expr) -> Expr:
        assert stage.room is not None
        chunks = self.split.chunks.count
        every = times(self.split.geometry.slices, chunks)
        at = plus(times(i64(number), every), self.tile.slice * chunks) + as_i64(part)
        return self.frame.load_room(stage.room, at)

    def _each_part(self, body: Callable[[Expr], Stmt]) -> Stmt:
        parts = as_i32(self.split.chunks.count)
        count = quotient(parts - self.lane + (WARP - 1), WARP)
        return counted(count, lambda k: body(self.lane + k * WARP), "share")

    def row_value(self, tensor: Tensor, row: Expr, stmts: list[Stmt]) -> Expr:
        """The sum of one row, whose parts are chunks of their own."""
        stage, number = self.sources[tensor]
        total = registers(1, tensor.dtype, f"{tensor.name}_of_row")
        columns = as_i32(self.split.chunks.column_parts)

        def one(k: Expr) -> Stmt:
            return grow(total, self._part(stage, number, row * columns + k))

        stmts += [cleared(total), counted(columns, one, "p")]
        return get(total)

    def parts(self) -> Parts:
        """How the parts of the slice's sums are read."""
        return Parts(self._part, self._each_part, butterfly, self._elements)

    def _elements(self, part: Expr) -> Expr:
        """How many elements chunk `part` has, in the sums' type."""
        span = self.span(part)
        rows = self._count(span.row, span.row_end)
        vectors = tirx.Cast(self.frame.dtype, rows * (span.column_end - span.column))
        return vectors * tirx.FloatImm(self.frame.dtype, self.split.vector)

    def _count(self, start: Expr, end: Expr) -> Expr:
        return end - start if self.split.geometry.row_axes else i32(1)

    def span(self, part: Expr) -> Span:
        """The rows and columns of chunk `part`."""
        g, chunks = self.split.geometry, self.split.chunks
        across = as_i32(chunks.column_parts)
        row_part = quotient(part, across)
        column = (part - row_part * across) * as_i32(chunks.columns)
        vectors = as_i32(ceildiv(g.length, i64(self.split.vector)))
        column_end = column + tirx.Min(as_i32(chunks.columns), vectors - column)
        row = row_part * as_i32(chunks.rows)
        row_end = row + tirx.Min(as_i32(chunks.rows), as_i32(g.rows) - row)
        return Span(row, row_end, column, column_end)

    # The traversal.

    def traverse(self, stmts: list[Stmt]) -> None:
        """Go through the chunk tile by tile."""
        named = []
        span = self.span(self.part)
        for name in ("row", "row_end", "column", "column_end"):
            named.append(named_index(f"first_{name}", getattr(span, name), stmts))
        span = Span(*named)
        if self.stage.centred is not None:
            self._centred(self.stage.centred, span, stmts)
            return
        steps = [*self.stage.sums, *self.stage.outputs]
        totals = _totals(self.stage.sums)
        stmts += [cleared(buffer) for buffer in totals.values()]

        def one(k: Expr, tile: Span) -> Stmt:
            del k
            add = partial(self.tile.add_up, self.stage.sums, totals)
            return seq(
                [
                    self.tile.load(tile, steps),
                    self.tile.each(tile, add) if totals else None,
                    self.tile.outputs(tile, self.stage.outputs),
                ]
            )

        walk = self._tiles(span, one)
        if not totals:
            walk = when(self.frame.any_of(map(self.frame.output_of, self.stage.outputs)), walk)
        stmts.append(walk)
        self._store_parts([*totals.values()], 0, stmts)

    def _centred(self, found: Match, span: Span, stmts: list[Stmt]) -> None:
        around = Centring(found)
        samples, sums = around.samples, around.sums
        total = _totals(samples)
        bits = self._tile_size()
        tile = self._tile(span, i32(0), i32(0), bits)
        stmts += [cleared(buffer) for buffer in total.values()]
        stmts.append(self.tile.load(tile, samples))
        stmts.append(self.tile.each(tile, partial(self.tile.add_up, samples, total)))
        over_block([*total.values()], self.thread, THREADS, stmts)
        columns = tirx.Min(bits[1], span.column_end - span.column)
        rows = tirx.Min(bits[0], self._count(span.row, span.row_end))
        count = tirx.Var("sampled", self.frame.dtype)
        of_tile = tirx.Cast(self.frame.dtype, rows * columns * self.split.vector)
        stmts.append(tirx.Bind(count, of_tile))
        around.take([get(buffer) / count for buffer in total.values()], self.settler, stmts)
        totals = _totals(sums)
        stmts += [cleared(each) for each in totals.values()]

        def one(k: Expr, tile: Span) -> Stmt:
            again = when(tirx.GT(k, i32(0)), self.tile.load(tile, sums))
            return seq([again, self.tile.each(tile, partial(self.tile.add_up, sums, totals))])

        stmts.append(self._tiles(span, one))
        stmts.append(self._store(0, self.tile.values[around.shift]))
        self._store_parts([*totals.values()], 1, stmts)

    def _tile_size(self) -> tuple[Expr, Expr]:
        """Rows and columns of a tile."""
        m = self.split.mapping
        wide = shifted(i32(1), m.column_bits)
        if not self.split.geometry.row_axes:
            return i32(1), wide * m.registers
        deep = tirx.shift_left(i32(1), m.row_bits)
        down = tirx.shift_right(i32(m.registers), m.run_bits)
        return deep * down, tirx.shift_left(wide, m.run_bits)

    def _tile(self, span: Span, row: Expr, column: Expr, size: tuple[Expr, Expr]) -> Span:
        start, left = span.row + row * size[0], span.column + column * size[1]
        return Span(start, span.row_end, left, span.column_end)

    def _tiles(self, span: Span, body: Callable[[Expr, Span], Stmt]) -> Stmt:
        size = self._tile_size()
        across = ceildiv(span.column_end - span.column, size[1])
        if not self.split.geometry.row_axes:
            return counted(across, lambda k: body(k, self._tile(span, i32(0), k, size)), "tile")
        down = ceildiv(span.row_end - span.row, size[0])
        stmts: list[Stmt] = []
        named = named_index("tiles_across", across, stmts)

        def one(k: Expr) -> Stmt:
            inner: list[Stmt] = []
            row = named_index("tile_row", quotient(k, named), inner)
            tile = self._tile(span, row, k - row * named, size)
            named_row = named_index("tile_top", tile.row, inner)
            named_column = named_index("tile_left", tile.column, inner)
            tile = Span(named_row, span.row_end, named_column, span.column_end)
            return seq([*inner, body(k, tile)])

        tiles = named_index("tiles", down * named, stmts)
        return seq([*stmts, counted(tiles, one, "tile")])

    # What the block adds.

    def _store_parts(self, buffers: list[Any], start: int, stmts: list[Stmt]) -> None:
        if not buffers:
            return
        over_block(buffers, self.thread, THREADS, stmts)
        stmts += [self._store(start + k, get(buffer)) for k, buffer in enumerate(buffers)]

    def _store(self, number: int, value: Expr) -> Stmt:
        assert self.stage.room is not None
        chunks = self.split.chunks.count
        every = times(self.split.geometry.slices, chunks)
        at = plus(times(i64(number), every), self.tile.slice * chunks) + as_i64(self.part)
        stored = self.frame.store_room(self.stage.room, value, at)
        return when(tirx.EQ(self.thread, i32(0)), stored)


def _totals(steps: list[Step]) -> dict[Tensor, Any]:
    return {s.op.out: registers(1, s.op.out.dtype, f"{s.op.out.name}_part") for s in steps}
