"""The CPU schedule rule for normalization: slices in parallel, each read once a pass.

Pattern. A function that `tensor_program` can read and `slice_plan` can order: statistics over
slices (a row, a plane, a channel), element-wise outputs, sums across slices.

Strategy.
 1. The plan is brought into the form that costs least: centred sums around the mean of a sample
    instead of the mean (`shifted_sums`), values multiplied out and what is the same for a slice
    taken out of its rows (`affine`, `coefficients`).
 2. Slices are spread over the threads, or left to the calling one where there is little to do. A
    task takes a block of neighbouring slices of at least 12 KB together (where other axes come
    before them, as batch norm's n, 12 KB of each such row), or one slice that is as long. With
    nothing behind the channel axis it takes a run of channels as the vector, and for many rows
    all columns together (`column_work`).
 3. Each pass reads the slice once and computes all sums and outputs that are ready, in one loop
    (`row_kernel`); pass two finds the slice in cache.
 4. What has one element a slice is computed between passes, for the block in vectors
    (`slice_values`).
 5. Sums across slices: of whole-size values (layer norm's parameter gradients) into one partial
    sum for each of a fixed number of row ranges, four rows side by side; of per-slice values
    through a workspace of the statistics' size. Both are combined at the end in a fixed order, so
    results do not depend on the number of threads.
 6. Each output has a request of two bits (null, write, add). A pass whose outputs are all written
    runs as one loop; otherwise each requested output, and each group of sums it needs, by itself.
 7. Where what is read fills the last-level cache, outputs are stored past it (`streaming`).

Roofline. A, the bytes of one array, over the bandwidth of the level it comes from; s, d: of the
last-level cache and of memory.

    in cache    forward   A/16 + A (sums) + A read again from L1 or L2 + A stored and its line read
                backward  2 A (sums) + 2 A again from L1 or L2 + A stored and its line read
    in memory   forward   A read + A streamed = a copy with streamed stores
                backward  2 A read + A streamed = an add with streamed stores
                batch norm the same while a channel of all samples fits L2, else one read more

So in cache a forward is bound by A (1 + 1 + 1)/s, as a copy is, plus what its second reading and
its arithmetic leave uncovered: 6 to 8 operations a vector against the 6 to 10 cycles a vector that
the cache takes. Short rows are bound by instructions: an instance norm forward of 49 elements takes
some 70 cycles, where its vectors alone would take about 25 (the rest: the fold of each sum, the
last vector, the values of the slice).

Rejected. Schedule primitives on the blocks (merge, rfactor, decompose_reduction): merging row loops
silently drops a nest that stands between them, and tails need predicates that block vectorising.
The compiler's own vectoriser with reassociation: it may cancel x - mean - delta. One pass with
E[x^2] - E[x]^2: wrong at large means. Measured and no faster, on AVX-512: prefetching the next row
(in memory 3 % either way, in cache 13 to 35 % slower), the second pass backwards, the second pass
of a row in one loop with the first of the next, larger blocks (in cache a quarter slower, for the
second reading then comes from L2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from normgraph.compile import coefficients, shifted_sums
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.column_work import ColumnWork
from normgraph.compile.finish import Finish
from normgraph.compile.kernel_frame import Frame, item_size
from normgraph.compile.row_reader import ROW_RANGES, ROWS_ABREAST, Block
from normgraph.compile.slice_plan import SlicePlan, plan
from normgraph.compile.slice_work import SliceWork
from normgraph.compile.streaming import Streaming
from normgraph.compile.targets import Target
from normgraph.compile.tensor_program import read
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    floordiv,
    i64,
    loop,
    plus,
    product,
    seq,
    times,
    when,
)

NAME = "slices"

# A block of slices covers at least this many bytes of consecutive memory, if it has that many.
_RUN_BYTES = 12 * 1024
# Slices of a block: contiguous ones, and those that lie apart (batch norm's channels).
_MOST_SLICES = 16
_MOST_CHANNELS = 64
# Rows of a block are short and lie anywhere: every vector of 64 bytes would cross a cache line.
_SHORT_ROW_VECTOR = 32
# Channels in the vector where nothing lies behind the channel axis.
_CHANNEL_RUN = 64
# Rows from which on they are all read in order, with partial sums for ranges of them.
_COLUMN_WORK_ROWS = 256
# Up to this many elements a launch of the thread pool costs more than it gains.
_SERIAL_ELEMENTS = 32768


def apply(func: Any, outputs: Sequence[str], target: Target) -> Any | None:
    """The scheduled function, or None where the pattern is not this rule's own.

    func: the fused PrimFunc of a graph. outputs: their names, for messages.
    The result takes the function's tensors and then the requests as one int64.
    """
    try:
        slice_plan = plan(read(func))
        shifted_sums.apply(slice_plan)
        coefficients.settle(slice_plan)
        return _Emitter(slice_plan, outputs, target).emit()
    except NotCanonical:
        return None


class _Emitter:
    def __init__(self, slice_plan: SlicePlan, outputs: Sequence[str], target: Target) -> None:
        self.plan = slice_plan
        self.program = slice_plan.program
        self.extents = self.program.extents
        self.vector_bytes = target.vector_bytes
        self.streaming = Streaming(target)
        self.frame = Frame(slice_plan, outputs, ROW_RANGES)
        self.slices = product([self.extents[a] for a in slice_plan.slice_axes])
        self.inner_axes = slice_plan.inner_axes
        # Nothing behind the slices' own axes: the vector runs across slices.
        self.across = bool(slice_plan.lead_axes) and not self.inner_axes

    def emit(self) -> Any:
        opening = self.frame.open()
        elements = bind(
            "elements", product([self.extents[a] for a in self.plan.wide_axes]), opening
        )
        # What is read fills the last-level cache by itself: nothing written would stay in it.
        read = times(elements, i64(self._read_bytes()))
        large = tirx.GT(read, i64(self.streaming.cache_bytes))
        self.large = bind("large", large, opening, "bool")
        small = tirx.LE(elements, i64(_SERIAL_ELEMENTS))
        slices = when(small, self._all_slices("serial"), self._parallel())
        body = [*opening, slices, Finish(self.frame, self._lanes()).emit()]
        return self.frame.close(self.streaming.wrap(seq(body)))

    def _read_bytes(self) -> int:
        """Bytes of all whole-size inputs together, an element."""
        every = frozenset(self.plan.wide_axes)
        return sum(item_size(t.dtype) for t in self.program.inputs if t.axes == every)

    def _lanes(self) -> int:
        sizes = [8 if "64" in t.dtype else 4 for t in self.plan.per_slice] or [4]
        wide = [t for t in self.program.inputs if t.dtype == "float64"]
        return self.vector_bytes // (8 if wide else max(sizes))

    def _all_slices(self, kind: str) -> Stmt:
        if self.plan.column_sums:
            return self._row_ranges(kind)
        return self._blocks(kind)

    def _parallel(self) -> Stmt:
        slices = self._all_slices("parallel")
        if not self.across:
            return slices
        rows = product([self.extents[a] for a in self.plan.lead_axes])
        columns = ColumnWork(self.frame, self._lanes(), self.streaming, self.large).emit()
        return when(tirx.GE(rows, i64(_COLUMN_WORK_ROWS)), columns, slices)

    def _row_ranges(self, kind: str) -> Stmt:
        if self.plan.lead_axes:
            raise NotCanonical("sums across slices that are not contiguous")
        slice_axes = frozenset(self.plan.slice_axes)
        # Neighbouring rows add to the same columns (not so a group's channels).
        side_by_side = not any(s.op.out.axes & slice_axes for s in self.plan.column_sums)

        def task(chunk: Expr) -> Stmt:
            stmts: list[Stmt] = [self.frame.clear_partials(chunk)]
            first = bind("first", _share(self.slices, chunk), stmts)
            last = bind("last", _share(self.slices, plus(chunk, i64(1))), stmts)
            rest = first
            if side_by_side:
                fours = bind("fours", floordiv(tirx.Sub(last, first), ROWS_ABREAST), stmts)
                rest = bind("rest", plus(first, times(fours, i64(ROWS_ABREAST))), stmts)

            def four(index: Expr) -> Stmt:
                start = plus(first, times(index, i64(ROWS_ABREAST)))
                return self._work(Block(start, i64(ROWS_ABREAST), ROWS_ABREAST, chunk), kind)

            if side_by_side:
                stmts.append(loop(fours, four, name="rows"))
            one = loop(
                tirx.Sub(last, rest),
                lambda index: self._work(Block(plus(rest, index), i64(1), 1, chunk), kind),
                name="row",
            )
            return seq([*stmts, one])

        return loop(i64(ROW_RANGES), task, name="range", kind=kind)

    def _blocks(self, kind: str) -> Stmt:
        most = _MOST_SLICES
        if self.plan.lead_axes:
            most = _CHANNEL_RUN if self.across else _MOST_CHANNELS
        stmts: list[Stmt] = []
        length = product([self.extents[a] for a in self.inner_axes])
        row_bytes = bind("row_bytes", tirx.Max(times(length, i64(4)), i64(1)), stmts)
        size = bind("block_size", self._slices_in_block(most, row_bytes), stmts)
        blocks = bind("blocks", _ceildiv(self.slices, size), stmts)

        def task(index: Expr) -> Stmt:
            inner: list[Stmt] = []
            start = bind("first_slice", times(index, size), inner)
            count = bind("count", tirx.Min(size, tirx.Sub(self.slices, start)), inner)
            work = self._work(Block(start, count, most), kind)
            if self.across:
                full = tirx.EQ(count, i64(most))
                work = when(full, self._work(Block(start, i64(most), most), kind), work)
            elif kind == "parallel":
                # Long rows, one at a time: what is kept of a slice stays in registers.
                alone = self._work(Block(start, i64(1), 1), kind)
                work = when(tirx.EQ(size, i64(1)), alone, work)
            return seq([*inner, work])

        return seq([*stmts, loop(blocks, task, name="task", kind=kind)])

    def _work(self, block: Block, kind: str) -> Stmt:
        vector_bytes = self.vector_bytes
        if block.most > 1 and not (self.across or self.plan.column_sums):
            vector_bytes = min(vector_bytes, _SHORT_ROW_VECTOR)
        work = SliceWork(
            self.frame,
            block,
            self._lanes() // (self.vector_bytes // vector_bytes),
            vector_bytes,
            across=self.across,
            streaming=self.streaming,
            large=None if kind == "serial" else self.large,
        )
        if kind == "serial":
            return work.emit()
        return seq([work.emit(), when(self.large, self.streaming.fence())])

    def _slices_in_block(self, most: int, row_bytes: Expr) -> Expr:
        # At least eight tasks, so that two to eight threads have even shares.
        share = _ceildiv(self.slices, i64(8))
        if self.across:
            return tirx.Max(tirx.Min(share, i64(most)), i64(min(16, most)))
        run = _ceildiv(i64(_RUN_BYTES), row_bytes)
        return tirx.Max(tirx.Min(tirx.Min(run, i64(most)), share), i64(1))


def _ceildiv(a: Expr, b: Expr) -> Expr:
    known = constant(a), constant(b)
    if None not in known:
        return i64(-(-known[0] // known[1]))  # type: ignore[operator]
    return tirx.FloorDiv(plus(a, tirx.Sub(b, i64(1))), b)


def _share(count: Expr, chunk: Expr) -> Expr:
    """Where range `chunk` of ROW_RANGES equal ranges begins."""
    known = constant(count), constant(chunk)
    if None not in known:
        return i64(known[0] * known[1] // ROW_RANGES)  # type: ignore[operator]
    return tirx.FloorDiv(times(chunk, count), i64(ROW_RANGES))
