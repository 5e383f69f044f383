"""Statistics or sums down the columns of a matrix: batch norm of (n, c), channels last.

A slice is a column, and all columns are done together, row by row.

 1. A block takes up to 32 vectors of neighbouring columns and a range of rows; its threads load
    `registers` rows each before they use one.
 2. Sums stay in registers, a lane a column; the block adds its threads' up through shared memory
    and stores one part a column.
 3. A kernel of 32 columns a block adds the parts up in a fixed order and computes what follows; it
    stores the values that the next traversal reads.
 4. A mean and the sums centred on it take one traversal, each range of rows centred on the mean of
    its first 1/16 (see `cuda_split`).

Roofline. As of `cuda_split`, with one launch more, that of 3: (3 - h) A / B + 2 L forward,
(5 - 2 h) A / B + 2 L backward. The parts, of at most 1056 ranges of rows, stay in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_finish import over_shares
from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_gather import Centring, Parts, Stage, gather, stages
from normgraph.compile.cuda_geometry import Geometry, Mapping, Span, shifted
from normgraph.compile.cuda_kernel import (
    WARP,
    as_i32,
    as_i64,
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
    power,
    put,
    quotient,
    registers,
    shared,
    sync,
    unrolled,
)
from normgraph.compile.cuda_settle import Settler
from normgraph.compile.cuda_tile import Tile
from normgraph.compile.shifted_sums import Match
from normgraph.compile.slice_plan import SlicePlan, Step, distinct
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import Expr, Stmt, i64, plus, product, seq, times, when

THREADS = 256
_REGISTERS = 4
_SHARES = 16
# Blocks of a traversal there should be, and rows a block takes at least.
_BLOCKS = 1056
_ROWS = 32


def matrix(plan: SlicePlan, rows: tuple[int, ...], columns: tuple[int, ...]) -> Geometry:
    """All elements as one matrix of `rows` x `columns` axes."""
    extents = plan.program.extents
    return Geometry(
        plan,
        (),
        rows,
        columns,
        i64(1),
        product([extents[a] for a in rows]),
        product([extents[a] for a in columns]),
    )


class Matrix:
    """The blocks that go through a matrix: `vector` columns a thread, ranges of rows."""

    def __init__(self, frame: CudaFrame, geometry: Geometry, vector: int) -> None:
        self.frame = frame
        self.geometry = geometry
        self.vector = vector
        self.mapping: Mapping
        self.across: Expr = i64(1)
        self.ranges: Expr = i64(1)
        self.rows: Expr = i64(1)
        self.blocks: Expr = i64(1)

    def prepare(self, stmts: list[Stmt]) -> None:
        """How many blocks there are and what each does, computed on the host."""
        g = self.geometry
        vectors = ceildiv(g.length, i64(self.vector))
        bits = on_host("column_bits", log2_ceil(vectors, 5), stmts, "int32")
        self.across = on_host("across", ceildiv(vectors, power(bits)), stmts)
        wanted = tirx.Max(tirx.Div(i64(_BLOCKS), self.across), i64(1))
        rows = tirx.Max(ceildiv(g.rows, wanted), i64(_ROWS))
        self.rows = on_host("rows_each", rows, stmts)
        self.ranges = on_host("ranges", ceildiv(g.rows, self.rows), stmts)
        self.blocks = on_host("matrix_blocks", times(self.across, self.ranges), stmts)
        down = on_host("row_bits", i32(THREADS.bit_length() - 1) - bits, stmts, "int32")
        self.mapping = Mapping(self.vector, _REGISTERS, THREADS, bits, down, i32(0), False)

    def launch(self, body: Callable[[MatrixBlock, list[Stmt]], None]) -> Stmt:
        """A kernel in which each block does `body`."""

        def whole(block: Expr, thread: Expr) -> Stmt:
            stmts: list[Stmt] = []
            body(MatrixBlock(self, block, thread, stmts), stmts)
            return seq(stmts)

        return kernel(self.blocks, THREADS, whole)


class MatrixBlock:
    """One block: its rows and columns, and the sums it adds up."""

    def __init__(self, matrix: Matrix, block: Expr, thread: Expr, stmts: list[Stmt]) -> None:
        self.matrix = matrix
        self.frame = matrix.frame
        self.thread = thread
        self.tile = Tile(matrix.frame, matrix.geometry, matrix.mapping)
        self.tile.rewrite = self.frame.kernel_scalars(stmts)
        across = as_i32(matrix.across)
        self.range = named_index("range", quotient(block, across), stmts)
        wide = shifted(i32(1), matrix.mapping.column_bits)
        start = named_index("first_column", (block - self.range * across) * wide, stmts)
        self.tile.open(thread, stmts)
        self.tile.at_slice(i64(0), None, stmts)
        vectors = as_i32(ceildiv(matrix.geometry.length, i64(matrix.vector)))
        self.start, self.vectors = start, vectors

    def span(self, share: int = 1) -> Span:
        """The block's rows, or the first 1/share of them."""
        first = self.range * as_i32(self.matrix.rows)
        rows = as_i32(self.matrix.rows)
        if share > 1:
            rows = tirx.Max(quotient(rows, share), i32(1))
        count = tirx.Min(rows, as_i32(self.matrix.geometry.rows) - first)
        return Span(first, first + count, self.start, self.vectors)

    def each_tile(self, span: Span, body: Callable[[Span], Stmt]) -> Stmt:
        """`body` for each tile of rows."""
        m = self.matrix.mapping
        deep = tirx.shift_left(i32(m.registers), m.row_bits)

        def one(k: Expr) -> Stmt:
            return body(Span(span.row + k * deep, span.row_end, span.column, span.column_end))

        return counted(quotient(span.row_end - span.row + deep - 1, deep), one, "tile")

    def sums(self, steps: Sequence[Step], span: Span, stmts: list[Stmt]) -> dict[Tensor, Any]:
        """Sums down the columns; every thread has those of its own columns, lane by lane."""
        width = self.matrix.vector
        totals = {s.op.out: registers(width, s.op.out.dtype, f"{s.op.out.name}_sum") for s in steps}
        stmts += [cleared(buffer) for buffer in totals.values()]

        def tile(span: Span) -> Stmt:
            add = partial(self.tile.add_up, steps, totals)
            return seq([self.tile.load(span, steps), self.tile.each(span, add)])

        stmts.append(self.each_tile(span, tile))
        for buffer in totals.values():
            self._over_rows(buffer, stmts)
        return totals

    def _over_rows(self, buffer: Any, stmts: list[Stmt]) -> None:
        """Add up what the threads of one column have, through shared memory."""
        width, m = self.matrix.vector, self.matrix.mapping
        scratch = shared(THREADS * width, str(buffer.dtype), "column_sums")
        stmts.append(tirx.AllocBuffer(scratch))
        mine = self.thread * width
        stmts.append(unrolled(width, lambda v: put(scratch, get(buffer, v), mine + v), "v"))
        stmts.append(sync())
        stmts.append(cleared_again(buffer))
        step = tirx.shift_left(i32(width), m.column_bits)
        first = self.tile.column * width

        def row(k: Expr) -> Stmt:
            return unrolled(
                width, lambda v: grow(buffer, get(scratch, first + k * step + v), v), "v"
            )

        stmts.append(counted(shifted(i32(1), m.row_bits), row, "down"))

    def store(self, room: Room, number: int, buffer: Any, length: Expr) -> Stmt:
        """Put the sums of the block's columns among the parts."""
        width = self.matrix.vector
        at = plus(times(i64(number), self.matrix.ranges), as_i64(self.range)) * length
        vector = self.start + self.tile.column
        first = tirx.And(tirx.EQ(self.tile.row, i32(0)), tirx.LT(vector, self.vectors))

        def lane(v: Expr) -> Stmt:
            column = as_i64(vector) * i64(width) + as_i64(v)
            return self.frame.store_room(room, get(buffer, v), at + column)

        return when(first, unrolled(width, lane, "v"))


def cleared_again(buffer: Any) -> Stmt:
    """Set a declared buffer to zero."""
    size, none = int(buffer.shape[0]), tirx.FloatImm(str(buffer.dtype), 0.0)
    return unrolled(size, lambda k: put(buffer, none, k), "k")


class ColumnSlices:
    """Emits all kernels where slices are columns."""

    def __init__(self, frame: CudaFrame, vector: int, found: Match | None) -> None:
        self.frame = frame
        self.plan = frame.plan
        if len(self.plan.lead_axes) + len(self.plan.slice_axes) < len(self.plan.wide_axes):
            raise NotCanonical("columns with something behind them")
        geometry = matrix(self.plan, self.plan.lead_axes, self.plan.slice_axes)
        self.matrix = Matrix(frame, geometry, vector)
        columns = {s.op.out for s in self.plan.column_sums}
        self.first, self.stages = stages(self.plan.passes, columns, found)
        self.columns = geometry.length

    def stored(self) -> list[Tensor]:
        """Per-slice values that a traversal reads."""
        read = [t for stage in self.stages for s in _wide(stage) for t in loads(s.value)]
        return [t for t in distinct(read) if t in self.plan.per_slice]

    def prepare(self, stmts: list[Stmt]) -> None:
        """What the host computes in front of the allocation; room for the parts of sums."""
        self.matrix.prepare(stmts)
        for stage in self.stages:
            if stage.parts:
                size = product([i64(stage.parts), self.matrix.ranges, self.columns])
                stage.room = self.frame.room("parts", size)

    def emit(self) -> Stmt:
        """All launches."""
        stmts: list[Stmt] = []
        made = {s.op.out for s in self.first}
        settled = 0
        for number, stage in enumerate(self.stages):
            read = {t for s in _wide(stage) for t in loads(s.value)}
            if (number and settled < number) or read & made:
                stmts.append(self._settle(number))
                settled = number
                made = set()
            if stage.sums or stage.outputs:
                stmts.append(self.matrix.launch(partial(self._traverse, stage)))
        return seq(stmts)

    # A traversal.

    def _traverse(self, stage: Stage, block: MatrixBlock, stmts: list[Stmt]) -> None:
        if stage.centred is not None:
            self._centred(stage, stage.centred, block, stmts)
            return
        steps = [*stage.sums, *stage.outputs]
        if stage.sums:
            done = block.sums(stage.sums, block.span(), stmts)
            assert stage.room is not None
            for number, buffer in enumerate(done.values()):
                stmts.append(block.store(stage.room, number, buffer, self.columns))
        if stage.outputs:

            def tile(span: Span) -> Stmt:
                load = block.tile.load(span, steps)
                return seq([load, block.tile.outputs(span, stage.outputs)])

            wanted = self.frame.any_of({self.frame.output_of(s) for s in stage.outputs})
            stmts.append(when(wanted, block.each_tile(block.span(), tile)))

    def _centred(self, stage: Stage, found: Match, block: MatrixBlock, stmts: list[Stmt]) -> None:
        around = Centring(found)
        sample = block.span(16)
        totals = [*block.sums(around.samples, sample, stmts).values()]
        total = totals[0]
        count = tirx.Var("sampled", self.frame.dtype)
        stmts.append(tirx.Bind(count, tirx.Cast(self.frame.dtype, sample.row_end - sample.row)))

        def shift(v: Expr) -> Stmt:
            made: list[Stmt] = []
            near = around.near_mean([get(each, v) / count for each in totals], made)
            return seq([*made, put(total, near, v)])

        stmts.append(unrolled(self.matrix.vector, shift, "v"))
        block.tile.lanes[around.shift] = total
        sums = block.sums(around.sums, block.span(), stmts)
        assert stage.room is not None
        for number, buffer in enumerate([total, *sums.values()]):
            stmts.append(block.store(stage.room, number, buffer, self.columns))

    # The values of the columns.

    def _settle(self, number: int) -> Stmt:
        blocks = ceildiv(self.columns, i64(WARP))
        return kernel(blocks, WARP * _SHARES, partial(self._settle_columns, number))

    def _settle_columns(self, number: int, block: Expr, thread: Expr) -> Stmt:
        stmts: list[Stmt] = []
        lane = tirx.BitwiseAnd(thread, i32(WARP - 1))
        own = as_i64(block) * i64(WARP) + as_i64(lane)
        index = named_index("slice", tirx.Min(own, self.columns - 1), stmts)
        plain = Geometry(self.plan, self.plan.slice_axes, (), (), self.columns, i64(1), i64(1))
        tile = Tile(self.frame, plain, self.matrix.mapping)
        tile.rewrite = self.frame.kernel_scalars(stmts)
        tile.slice = index
        settler = Settler(tile, i32(0), i32(1), _no_rows)
        settler.read_inputs(stmts)
        settler.settle(self.first, stmts)
        share = named_index("share", tirx.shift_right(thread, i32(5)), stmts)
        for stage in self.stages[:number]:
            gather(stage, self._parts(index, share, thread), settler, self.frame, stmts)
            settler.settle(stage.after, stmts)
        last = number == len(self.stages) - 1 or not any(s.sums for s in self.stages[number:])
        kept = settler.keep([*self.plan.per_slice]) if last else self._store_only(settler)
        mine = tirx.And(tirx.EQ(share, i32(0)), tirx.LT(own, self.columns))
        stmts.append(when(mine, seq(kept)))
        return seq(stmts)

    def _store_only(self, settler: Settler) -> list[Stmt]:
        known = [t for t in self.frame.stored if t in settler.tile.values]
        return [settler.store(t, settler.tile.values[t]) for t in known]

    def _parts(self, index: Expr, share: Expr, thread: Expr) -> Parts:
        ranges = self.matrix.ranges

        def part(stage: Stage, number: int, p: Expr) -> Expr:
            assert stage.room is not None
            row = plus(times(i64(number), ranges), as_i64(p))
            return self.frame.load_room(stage.room, row * self.columns + index)

        def each(body: Callable[[Expr], Stmt]) -> Stmt:
            count = quotient(as_i32(ranges) - share + (_SHARES - 1), _SHARES)
            return counted(count, lambda k: body(share + k * _SHARES), "k")

        def combine(buffers: list[Any]) -> Stmt:
            stmts: list[Stmt] = []
            over_shares(buffers, thread, _SHARES, stmts)
            return seq(stmts)

        def elements(p: Expr) -> Expr:
            first = p * as_i32(self.matrix.rows)
            left = as_i32(self.matrix.geometry.rows) - first
            return tirx.Cast(self.frame.dtype, tirx.Min(as_i32(self.matrix.rows), left))

        return Parts(part, each, combine, elements)


class ColumnSums:
    """Emits sums across slices of whole-size values where a slice does not fit a block."""

    def __init__(self, frame: CudaFrame, geometry: Geometry, vector: int) -> None:
        self.frame = frame
        self.steps = frame.plan.column_sums
        self.matrix = Matrix(
            frame, matrix(frame.plan, geometry.slice_axes, geometry.column_axes), vector
        )
        self.rooms: dict[Tensor, tuple[Room, Expr]] = {}

    def prepare(self, stmts: list[Stmt]) -> None:
        """What the host computes in front of the allocation; room for the parts."""
        self.matrix.prepare(stmts)
        for step in self.steps:
            size = times(self.matrix.ranges, self.matrix.geometry.length)
            self.rooms[step.op.out] = self.frame.room("column_parts", size), self.matrix.ranges

    def emit(self) -> Stmt:
        """The launch."""

        def body(block: MatrixBlock, stmts: list[Stmt]) -> None:
            done = block.sums(self.steps, block.span(), stmts)
            for tensor, buffer in done.items():
                room = self.rooms[tensor][0]
                stmts.append(block.store(room, 0, buffer, self.matrix.geometry.length))

        needs = frozenset[int]().union(*(s.needs for s in self.steps))
        return when(self.frame.any_of(needs), self.matrix.launch(body))


def _wide(stage: Stage) -> list[Step]:
    return [*stage.sums, *stage.outputs]


def _no_rows(tensor: Tensor, row: Expr, stmts: list[Stmt]) -> Expr:
    raise NotCanonical(f"{tensor.name} has a value for each row of a column")
