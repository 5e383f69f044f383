"""The CPU schedule rule for normalization: slices in parallel, each read once a pass.

Pattern. A function that `tensor_program` can read and `slice_plan` can order: statistics over
slices (a row, a plane, a channel), element-wise outputs, sums across slices.

Strategy.
 1. The plan is brought into the form that costs least: centred sums around the mean of a sample
    instead of the mean (`shifted_sums`), values multiplied out and what is the same for a slice
    taken out of its rows (`affine`, `coefficients`).
 2. Slices are spread over the threads, or left to the calling one where there is little to do. A
    task takes a block of neighbouring slices of some 12 KB together (where other axes come before
    them, as batch norm's n, 12 KB of each such row), or one slice that is as long as 2 to 4 KB. Of
    arrays that fill half of the last-level cache, blocks are smaller: 4 KB, or one slice of 1 KB.
    (Sizes are of float32; other types have as many elements.) Where a channel's elements lie in
    rows too short for that, it is read in columns (`column_work`); of arrays in memory also longer
    ones, whose outputs are then streamed a block's rows at once, where a row's alone are not.
 3. Each pass reads the slice once and computes all sums and outputs that are ready, in one loop
    (`row_kernel`); pass two finds the slice in cache. Short rows of open extents have code for each
    of some ranges of lengths (`row_lengths`), within about a tenth of known ones' time.
 4. What has one element a slice is computed between passes, for the block in vectors
    (`slice_values`).
 5. Sums across slices: of whole-size values (layer norm's parameter gradients) into one partial
    sum for each of at most 16 row ranges, four rows side by side (one by one where they are
    streamed only so); of per-slice values through a workspace of the statistics' size. Both are
    combined at the end in a fixed order, so results do not depend on the number of threads.
 6. Each output has a request of two bits (null, write, add). A pass whose outputs are all written
    runs as one loop; otherwise each requested output, and each group of sums it needs, by itself.
 7. Where what is read and written is more than 7/8 of the last-level cache, outputs are stored past
    it (`streaming`), line by line (`output_row`); those of short rows that follow one another from
    memory in which the block's are made ready (`staged_block`), as much of them lies in lines that
    two of them share. With each line, what is read in its place in the next block is
    asked for where that gains (`next_block`); not where rows of a block go side by side, or all
    columns together, but for the short ones that are made ready. What is read again of a slice of
    which L2 keeps only a part, is taken from its end (`turned_order`).

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
some 40 cycles, where its vectors alone would take about 25 (the rest: the fold of each sum, the
last vector, the values of the slice).

Rejected. Schedule primitives on the blocks (merge, rfactor, decompose_reduction): merging row loops
silently drops a nest that stands between them, and tails need predicates that block vectorising.
The compiler's own vectoriser with reassociation: it may cancel x - mean - delta. One pass with
E[x^2] - E[x]^2: wrong at large means. Measured and no faster, on AVX-512: asking for the next block
where outputs are stored as usual (in cache 13 to 35 % slower), the second pass backwards over what
L2 keeps (1 MB on Granite Rapids, a tenth slower), the second pass of a row in one loop with the
first of the next, larger blocks (in cache a quarter
slower, for the second reading then comes from L2). Larger blocks in memory: reading and writing
take turns there, and the longer each turn the slower: instance norm of 64x256x14x14 takes 1.7 times
as long in blocks of 12 KB as in blocks of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from normgraph.compile import coefficients, shifted_sums
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.column_work import Columns, ColumnWork
from normgraph.compile.finish import Finish
from normgraph.compile.kernel_frame import Frame, item_size
from normgraph.compile.knobs import knobs
from normgraph.compile.link import STAY_ON_THREAD
from normgraph.compile.row_reader import ROW_RANGES, ROWS_ABREAST, Block
from normgraph.compile.slice_plan import SlicePlan, plan
from normgraph.compile.slice_work import SliceWork
from normgraph.compile.streaming import Streaming
from normgraph.compile.targets import Target
from normgraph.compile.tensor_program import Tensor, read
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    floordiv,
    i64,
    largest,
    least,
    loop,
    modulo,
    plus,
    product,
    quotient,
    seq,
    times,
    when,
)

NAME = "slices"

# A block is made no narrower than so many columns, so that L2 holds its rows; and no narrower than
# this, so that there are more tasks.
_FEWEST_COLUMNS = 256
_FEWEST_SHARED = 32
# Of a block that is streamed: elements of a vector of 32 bytes.
_SLICES_IN_VECTOR = 8


def apply(func: Any, outputs: Sequence[str], target: Target) -> Any | None:
    """The scheduled function, or None where the pattern is not this rule's own.

    func: the fused PrimFunc of a graph. outputs: their names, for messages.
    The result takes the function's tensors and then the requests as one int64.
    """
    try:
        slice_plan = plan(read(func))
        streaming = Streaming(target)
        slice_plan.streamed_from = _fewest_streamed(slice_plan, streaming)
        shifted_sums.apply(slice_plan)
        coefficients.settle(slice_plan)
        return _Emitter(slice_plan, outputs, target, streaming).emit()
    except NotCanonical:
        return None


class _Emitter:
    def __init__(
        self, slice_plan: SlicePlan, outputs: Sequence[str], target: Target, streaming: Streaming
    ) -> None:
        self.plan = slice_plan
        self.program = slice_plan.program
        self.extents = self.program.extents
        self.vector_bytes = target.vector_bytes
        self.streaming = streaming
        self.knobs = knobs()
        self.slices = product([self.extents[a] for a in slice_plan.slice_axes])
        # Never more ranges than there is work for: each has sums to clear and to add up.
        fours = _ceildiv(self.slices, i64(ROWS_ABREAST))
        self.ranges = least(i64(ROW_RANGES), largest(fours, i64(1)))
        self.frame = Frame(slice_plan, outputs, self.ranges)
        self.inner_axes = slice_plan.inner_axes

    def emit(self) -> Any:
        opening = self.frame.open()
        elements = bind(
            "elements", product([self.extents[a] for a in self.plan.wide_axes]), opening
        )
        cache = i64(self.streaming.cache_bytes)
        moved = times(elements, i64(_moved_bytes(self.plan)))
        # More than stays in it: what is written would put out what is to be read.
        assert self.plan.streamed_from is not None
        enough = tirx.GE(elements, i64(self.plan.streamed_from))
        self.large = bind("large", enough, opening, "bool")
        # Half of it, and other arrays want their part.
        self.far = bind("far", tirx.GT(times(moved, i64(2)), cache), opening, "bool")
        small = tirx.LE(elements, i64(self.knobs.serial))
        stay = tirx.call_extern("int32", STAY_ON_THREAD, tirx.Cast("int32", small))
        opening.append(tirx.Evaluate(stay))
        # Once a call: after each row it would wait for the memory, up to a tenth of the time. What
        # other threads streamed was ordered by the pool.
        ordered = when(self.large, self.streaming.fence())
        body = [*opening, self._all_slices(), ordered, Finish(self.frame, self._lanes()).emit()]
        return self.frame.close(self.streaming.wrap(seq(body)))

    def _lanes(self) -> int:
        sizes = [8 if "64" in t.dtype else 4 for t in self.plan.per_slice] or [4]
        wide = [t for t in self.program.inputs if t.dtype == "float64"]
        return self.vector_bytes // (8 if wide else max(sizes))

    def _all_slices(self) -> Stmt:
        if self.plan.column_sums:
            return self._row_ranges()
        in_columns = self.plan.in_columns
        if in_columns is False:
            return self._blocks()
        columns = self._columns()
        return columns if in_columns is True else when(in_columns, columns, self._blocks())

    def _columns(self) -> Stmt:
        stmts: list[Stmt] = []
        size = bind("block_size", self._known_positive(self._channels_in_block()), stmts)
        blocks = bind("blocks", _ceildiv(self.slices, size), stmts)

        def task(index: Expr) -> Stmt:
            inner: list[Stmt] = []
            start = bind("first_channel", times(index, size), inner)
            count = bind("count", tirx.Min(size, tirx.Sub(self.slices, start)), inner)
            return seq([*inner, self._column_work(Columns(start, count))])

        stmts.append(loop(blocks, task, name="task", kind="parallel"))
        many = tirx.GE(self.plan.rows, i64(self.knobs.whole_rows))
        few = tirx.LE(times(self.slices, self.plan.row_length), i64(self.knobs.whole_columns))
        whole = self._column_work(Columns(i64(0), self.slices, whole=True))
        return when(tirx.And(many, few), whole, seq(stmts))

    def _column_work(self, columns: Columns) -> Stmt:
        return ColumnWork(self.frame, columns, self._lanes(), self.streaming, self.large).emit()

    def _channels_in_block(self) -> Expr:
        length = tirx.Max(self.plan.row_length, i64(1))
        room = tirx.Max(quotient(i64(self.knobs.columns), length), i64(1))
        most = tirx.Min(i64(self.knobs.column_channels), room)
        channel_bytes = times(times(self.plan.rows, length), i64(_bytes_of(self.plan.whole_inputs)))
        cached = quotient(i64(self.knobs.column_bytes), tirx.Max(channel_bytes, i64(1)))
        most = tirx.Min(most, tirx.Max(cached, _ceildiv(i64(_FEWEST_COLUMNS), length)))
        # A multiple of eight tasks, if there is enough for them: two to eight threads share evenly.
        rounds = _ceildiv(self.slices, times(most, i64(8)))
        even = _ceildiv(self.slices, times(rounds, i64(8)))
        return tirx.Max(even, tirx.Min(most, _ceildiv(i64(_FEWEST_SHARED), length)))

    def _known_positive(self, value: Expr) -> Expr:
        """`value`, hidden from TVM's analyzer (`Streaming.opaque`) but for being positive.

        Where each slice lies depends on it.
        """
        if constant(value) is not None:
            return value
        return tirx.Max(self.streaming.opaque(value), i64(1))

    def _row_ranges(self) -> Stmt:
        if self.plan.lead_axes:
            raise NotCanonical("sums across slices that are not contiguous")
        slice_axes = frozenset(self.plan.slice_axes)
        # Neighbouring rows add to the same columns (not so a group's channels).
        side_by_side = not any(s.op.out.axes & slice_axes for s in self.plan.column_sums)

        def task(chunk: Expr) -> Stmt:
            stmts: list[Stmt] = [self.frame.clear_partials(chunk)]
            first = bind("first", _share(self.slices, chunk, self.ranges), stmts)
            last = bind("last", _share(self.slices, plus(chunk, i64(1)), self.ranges), stmts)
            rest = first
            if side_by_side:
                fours = floordiv(tirx.Sub(last, first), ROWS_ABREAST)
                one_by_one = tirx.And(self.large, self._streams_alone())
                fours = bind("fours", tirx.Select(one_by_one, i64(0), fours), stmts)
                rest = bind("rest", plus(first, times(fours, i64(ROWS_ABREAST))), stmts)

            def four(index: Expr) -> Stmt:
                start = plus(first, times(index, i64(ROWS_ABREAST)))
                return self._work(Block(start, i64(ROWS_ABREAST), ROWS_ABREAST, chunk))

            if side_by_side:
                stmts.append(loop(fours, four, name="rows"))
            one = loop(
                tirx.Sub(last, rest),
                lambda index: self._work(Block(plus(rest, index), i64(1), 1, chunk)),
                name="row",
            )
            return seq([*stmts, one])

        return loop(self.ranges, task, name="range", kind="parallel")

    def _streams_alone(self) -> Expr:
        """Whether a row's outputs are streamed where it is alone, and not beside others.

        That is so for long rows that end within a line, for the lines of rows side by side have to
        begin together (`output_row`), or the rows be short enough to be made ready together.
        """
        length = product([self.extents[a] for a in self.inner_axes])
        return tirx.And(self._ragged(), tirx.GT(length, i64(self.knobs.staged_columns)))

    def _ragged(self) -> Expr:
        """Whether rows end within a line of an output."""
        length = product([self.extents[a] for a in self.inner_axes])
        written = _whole(self.plan, self.program.outputs)
        lines = [self.streaming.line(t.dtype) for t in written]
        return tirx.NE(modulo(length, max(lines, default=1)), i64(0))

    def _has_parameters_along_rows(self) -> bool:
        whole = self.plan.whole_inputs
        return any(self.inner_axes[-1] in t.axes for t in self.program.inputs if t not in whole)

    def _blocks(self) -> Stmt:
        one = len(self.plan.whole_inputs) == 1
        most = self.knobs.slices if one else self.knobs.slices_of_two
        if self.plan.lead_axes:
            most = self.knobs.channels
        stmts: list[Stmt] = []
        length = product([self.extents[a] for a in self.inner_axes])
        row_bytes = bind("row_bytes", tirx.Max(times(length, i64(4)), i64(1)), stmts)
        in_block = self._slices_in_block(most, row_bytes)
        size = bind("block_size", self._known_positive(in_block), stmts)
        blocks = bind("blocks", _ceildiv(self.slices, size), stmts)

        def task(index: Expr) -> Stmt:
            inner: list[Stmt] = []
            start = bind("first_slice", times(index, size), inner)
            count = bind("count", tirx.Min(size, tirx.Sub(self.slices, start)), inner)
            # Long rows, one at a time: what is kept of a slice stays in registers.
            alone = self._work(Block(start, i64(1), 1))
            several = self._work(Block(start, count, most, longest=self._longest_of_several()))
            return seq([*inner, when(tirx.EQ(size, i64(1)), alone, several)])

        return seq([*stmts, loop(blocks, task, name="task", kind="parallel")])

    def _work(self, block: Block) -> Stmt:
        vector_bytes = self.vector_bytes
        if block.most > 1 and not self.plan.column_sums:
            vector_bytes = min(vector_bytes, self.knobs.short_row_vector)
        work = SliceWork(
            self.frame,
            block,
            self._lanes() // (self.vector_bytes // vector_bytes),
            vector_bytes,
            streaming=self.streaming,
            large=self.large,
        )
        return work.emit()

    def _longest_of_several(self) -> int:
        """The most elements of the slices that go together: see `_slices_in_block`."""
        longest = (self.knobs.long_row, self.knobs.far_long_row, self.knobs.streamed_long_row)
        return (max(longest) - 1) // 4

    def _slices_in_block(self, most: int, row_bytes: Expr) -> Expr:
        # At least eight tasks, so that two to eight threads have even shares.
        share = _ceildiv(self.slices, i64(8))
        simple = len(self.plan.whole_inputs) == 1 and not self.plan.lead_axes
        long = self.knobs.long_row
        run, alone = i64(self.knobs.run_bytes), i64(long if simple else long // 2)
        if not self.plan.lead_axes:
            run = tirx.Select(self.far, i64(self.knobs.far_run_bytes), run)
            alone = tirx.Select(self.far, i64(self.knobs.far_long_row), alone)
            if self._has_parameters_along_rows():
                # Ends of lines, element by element, take long where each has parameters.
                staged = tirx.And(self.large, self._ragged())
                alone = tirx.Select(staged, i64(self.knobs.streamed_long_row), alone)
            own = self.knobs.streamed_run if simple else self.knobs.streamed_run_of_two
            run = tirx.Select(self.large, i64(own), run)
        run = _ceildiv(run, row_bytes)
        if not self.plan.lead_axes:
            # What has one element a slice is computed in vectors of so many.
            whole = times(_ceildiv(run, i64(_SLICES_IN_VECTOR)), i64(_SLICES_IN_VECTOR))
            run = tirx.Select(tirx.And(self.large, tirx.LE(whole, i64(most))), whole, run)
        size = tirx.Max(tirx.Min(tirx.Min(run, i64(most)), share), i64(1))
        return tirx.Select(tirx.GE(row_bytes, alone), i64(1), size)


def _whole(plan: SlicePlan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that range over all axes."""
    every = frozenset(plan.wide_axes)
    return [t for t in tensors if t.axes == every]


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of all of them together, an element."""
    return sum(item_size(t.dtype) for t in tensors)


def _moved_bytes(plan: SlicePlan) -> int:
    """Bytes of an element of all whole-size inputs and outputs."""
    program = plan.program
    return _bytes_of([*plan.whole_inputs, *_whole(plan, program.outputs)])


def _fewest_streamed(plan: SlicePlan, streaming: Streaming) -> int:
    """The elements from which on all arrays exceed the part of the cache that is to hold them."""
    held = streaming.cache_bytes * knobs().streamed_eighths
    return held // (8 * max(_moved_bytes(plan), 1)) + 1


def _ceildiv(a: Expr, b: Expr) -> Expr:
    known = constant(a), constant(b)
    if None not in known:
        return i64(-(-known[0] // known[1]))  # type: ignore[operator]
    return quotient(plus(a, tirx.Sub(b, i64(1))), b)


def _share(count: Expr, chunk: Expr, ranges: Expr) -> Expr:
    """Where range `chunk` of `ranges` equal ranges begins."""
    known = constant(count), constant(chunk), constant(ranges)
    if None not in known:
        return i64(known[0] * known[1] // known[2])  # type: ignore[operator]
    return quotient(times(chunk, count), ranges)
