"""Slices read as columns: what lies behind the leading axis (n) is one row for the vectors.

Batch norm's slices are channels, and where a channel has few elements together (7x7, or one, as in
a matrix) a row of its own would be mostly its ends. So the elements of neighbouring channels are
taken as one row of columns. Each column gets sums of its own, over n; four rows go side by side, so
that a sum is loaded and stored once for four. The columns of a channel are added up at the end, and
what has one element a channel is spread over its columns before it is used.

Two ways:
 - a block of channels a task, all rows of it: up to 2048 columns, whose sums stay in L1, and no
   more of them than L2 holds the rows of, so that the second pass finds them there;
 - many rows of few columns: all columns together and the rows in order, in a fixed number of row
   ranges with partial sums of their own, which are added in a fixed order.

Bytes: x (and dy) once a pass, and an eighth to a quarter of that for the sums in L1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, evaluate, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.column_arrays import ColumnArrays
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.knobs import knobs
from normgraph.compile.next_block import next_block
from normgraph.compile.output_row import output_row
from normgraph.compile.row_kernel import RowStore, RowSum, row
from normgraph.compile.row_lengths import Length
from normgraph.compile.row_reader import (
    ROW_RANGES,
    ROWS_ABREAST,
    RowReader,
    SliceMemory,
    column_sum,
)
from normgraph.compile.slice_plan import Pass, SlicePlan, Step, distinct
from normgraph.compile.streaming import Streaming
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    floordiv,
    i64,
    load,
    loop,
    modulo,
    plus,
    runs,
    seq,
    times,
    vector_loop,
    when,
    zero,
)

# Rows that a column's sum takes before it is added to its channel's, so that the error of a sum
# over many grows with its square root.
_RUN = 128


@dataclass
class Columns:
    """Channels `start` to `start + count`, in one task; or, with `whole`, all of them in many."""

    start: Expr
    count: Expr
    whole: bool = False


class ColumnWork:
    """Emits the whole work of these channels; `large`: outputs go past the caches."""

    def __init__(
        self,
        frame: Frame,
        channels: Columns,
        lanes: int,
        streaming: Streaming,
        large: Expr,
    ) -> None:
        self.frame = frame
        self.plan: SlicePlan = frame.plan
        self.channels = channels
        self.lanes = lanes
        self.streaming = streaming
        self.large = large
        self.ranges = ROW_RANGES if channels.whole else 1
        self.length = self.plan.row_length
        self.row_axes = (*self.plan.slice_axes, *self.plan.inner_axes)
        self.columns: Expr = times(channels.count, self.length)
        self.memory = SliceMemory(frame, (), (), 1)
        most = knobs()
        room = i64(max(most.columns, most.short_row))
        if constant(self.length) == 1:
            room = i64(most.column_channels)
        self.channel_room = channels.count if channels.whole else i64(most.column_channels)
        self.arrays = ColumnArrays(
            times(i64(self.ranges), self.columns) if channels.whole else room
        )

    def emit(self) -> Stmt:
        """All passes, each a loop over rows and then the channels' values."""
        before: list[Stmt] = []
        self.columns = bind("columns", self.columns, before)
        self.first_column = bind("first_column", times(self.channels.start, self.length), before)
        for tensor in self.plan.per_slice:
            self.memory.locals[tensor] = self._array(tensor, self.channel_room, before)
        stmts = [stmt for work in self.plan.passes for stmt in self._pass(work)]
        return seq([*before, *self.arrays.allocate(), *stmts])

    def _array(self, tensor: Tensor, size: Expr, stmts: list[Stmt]) -> Any:
        buffer = tirx.decl_buffer((size,), tensor.dtype, tensor.name, scope="global")
        stmts.append(tirx.AllocBuffer(buffer))
        return buffer

    def _pass(self, work: Pass) -> list[Stmt]:
        sums = [step for step in work.wide if step.is_sum]
        stmts: list[Stmt] = []
        if sums:
            needs = frozenset[int]().union(*(step.needs for step in sums))
            stmts.append(when(self.frame.any_of(needs), self._sums(sums)))
        stmts += [self._settle(work.after)] if work.after else []
        kept = [s for s in (*sums, *work.after) if s.op.out.output_index is not None]
        stmts += [self._keep(step) for step in kept]
        for step in work.wide:
            if not step.is_sum:
                index = self.frame.output_of(step)
                added = when(self.frame.is_add(index), self._output(step, add=True))
                stmts.append(when(self.frame.is_write(index), self._output(step), added))
        return stmts

    def _sums(self, steps: list[Step]) -> Stmt:
        stmts: list[Stmt] = []
        tensors = [step.op.out for step in steps]
        arrays = {t: self.arrays.new(t, stmts) for t in tensors}
        # Sums of each channel: of each row range, and of all.
        parts = {t: self.memory.locals[t] for t in tensors}
        if self.ranges > 1:
            size = times(i64(self.ranges), self.channel_room)
            parts = {t: self._array(t, size, stmts) for t in tensors}
        sample = steps[0].sample
        rows = self.plan.rows if sample is None else sample.rows
        memory = self._spread(steps, stmts)

        def task(chunk: Expr) -> Stmt:
            here, place = times(chunk, self.columns), times(chunk, self.channels.count)

            def clear(buffers: dict[Tensor, Any], start: Expr, c: Expr) -> Stmt:
                return seq(
                    [
                        tirx.BufferStore(buffer, zero(t.dtype), [plus(start, c)])
                        for t, buffer in buffers.items()
                    ]
                )

            def some(first: Expr, count: int) -> Stmt:
                before: list[Stmt] = []
                readers = self._readers(memory, first, count, before)
                stores = [column_sum(readers, s, arrays[s.op.out], here) for s in steps]
                done = row(Length.of(self.columns), [], stores, lanes=self.lanes, unroll=1)
                return seq([*before, done])

            def in_run(body: Stmt) -> Stmt:
                cleared = self._vectors(self.columns, lambda c: clear(arrays, here, c))
                return seq([cleared, body, self._folded(arrays, here, parts, place)])

            none = self._vectors(self.channels.count, lambda c: clear(parts, place, c))
            return seq([none, self._runs_of(rows, chunk, some, in_run)])

        stmts.append(loop(i64(self.ranges), task, name="range", kind="parallel"))
        if self.ranges > 1:
            stmts += [self._total(t, part) for t, part in parts.items()]
        return seq(stmts)

    def _total(self, tensor: Tensor, parts: Any) -> Stmt:
        """The sums of all row ranges."""
        count = self.channels.count

        def one(c: Expr) -> Stmt:
            terms = [load(parts, plus(times(i64(k), count), c)) for k in range(ROW_RANGES)]
            while len(terms) > 1:
                terms = [tirx.Add(*terms[k : k + 2]) for k in range(0, len(terms), 2)]
            return self._keep_local(tensor, terms[0], c)

        return self._vectors(count, one)

    def _folded(
        self, arrays: dict[Tensor, Any], here: Expr, parts: dict[Tensor, Any], place: Expr
    ) -> Stmt:
        """The columns' sums, from `here` on, added to their channels', from `place` on."""

        def grow(tensor: Tensor, value: Expr, c: Expr) -> Stmt:
            to = plus(place, c)
            return tirx.BufferStore(parts[tensor], load(parts[tensor], to) + value, [to])

        def moved(c: Expr) -> Stmt:
            return seq([grow(t, load(a, plus(here, c)), c) for t, a in arrays.items()])

        def added(c: Expr) -> Stmt:
            stmts: list[Stmt] = []
            base = bind("base", plus(here, times(c, self.length)), stmts)

            def one(tensor: Tensor, array: Any) -> RowSum:
                return RowSum(
                    lambda index: load(array, plus(base, index)),
                    tensor.dtype,
                    take=lambda total: grow(tensor, total, c),
                )

            sums, length = [one(*each) for each in arrays.items()], Length.of(self.length)
            return seq([*stmts, row(length, sums, [], lanes=min(self.lanes, 8), unroll=1)])

        return self._by_length(moved, added)

    def _keep_local(self, tensor: Tensor, value: Expr, c: Expr) -> Stmt:
        return tirx.BufferStore(self.memory.locals[tensor], value, [c])

    def _by_length(
        self, one_column: Callable[[Expr], Stmt], several: Callable[[Expr], Stmt]
    ) -> Stmt:
        """For all channels: `one_column` in vectors where a channel is one, else `several`."""
        single = self._vectors(self.channels.count, one_column)
        if constant(self.length) == 1:
            return single
        each = loop(self.channels.count, several, name="c")
        if constant(self.length) is not None:
            return each
        return when(tirx.EQ(self.length, i64(1)), single, each)

    # Values of the channels.

    def _position(self, c: Expr) -> Position:
        return Position().along(self.plan.slice_axes, plus(self.channels.start, c))

    def _settle(self, steps: Sequence[Step]) -> Stmt:
        if any(step.is_sum or step.op.out not in self.plan.per_slice for step in steps):
            raise NotCanonical("a channel's value that is not a map of others")

        def one(c: Expr) -> Stmt:
            at = self._position(c)
            stmts = []
            for step in steps:
                value = evaluate(step.value, lambda t: self.memory.read(t, at, c))
                stmts.append(self._keep_local(step.op.out, value, c))
            return seq(stmts)

        return self._vectors(self.channels.count, one)

    def _keep(self, step: Step) -> Stmt:
        tensor = step.op.out

        def one(c: Expr, add: bool) -> Stmt:
            at = self._position(c)
            place = offset(tensor, at, self.frame.program.extents)
            return self.frame.put(tensor, self.memory.settled(step, at, c), place, add)

        def put(add: bool) -> Stmt:
            return loop(self.channels.count, lambda c: one(c, add), name="c")

        return self.frame.on_request(tensor, put)

    def _spread(self, steps: Sequence[Step], stmts: list[Stmt]) -> SliceMemory:
        """What these steps read of the channels, an element a column."""
        wide = frozenset(self.plan.wide_axes)
        every = distinct(t for step in steps for t in loads(step.value))
        narrow = [t for t in every if t in self.memory.locals or t.axes != wide]
        if constant(self.length) == 1 or not narrow:
            return self.memory
        memory = SliceMemory(self.frame, (), (), 1)
        memory.locals = {t: self.arrays.new(t, stmts) for t in narrow}

        def copied(c: Expr) -> Stmt:
            at = self._position(c)
            return seq(
                [
                    tirx.BufferStore(buffer, self.memory.read(t, at, c), [c])
                    for t, buffer in memory.locals.items()
                ]
            )

        def repeated(c: Expr) -> Stmt:
            before: list[Stmt] = []
            base = bind("base", times(c, self.length), before)
            at = self._position(c)

            def one(tensor: Tensor, buffer: Any) -> RowStore:
                value = self.memory.read(tensor, at, c)
                return RowStore(
                    lambda index: value,
                    lambda index, value, new: tirx.BufferStore(buffer, value, [plus(base, index)]),
                    tensor.dtype,
                )

            stores = [one(*each) for each in memory.locals.items()]
            done = row(Length.of(self.length), [], stores, lanes=min(self.lanes, 8), unroll=1)
            return seq([*before, done])

        stmts.append(self._by_length(copied, repeated))
        return memory

    def _vectors(self, count: Expr, body: Callable[[Expr], Stmt]) -> Stmt:
        vectors = floordiv(count, self.lanes)

        def vector(k: Expr) -> Stmt:
            base = times(k, i64(self.lanes))
            return vector_loop(self.lanes, lambda lane: body(plus(base, lane)))

        done = times(vectors, i64(self.lanes))
        rest = loop(modulo(count, self.lanes), lambda k: body(plus(done, k)), name="rest")
        return seq([loop(vectors, vector, name="vector"), rest])

    def _output(self, step: Step, *, add: bool = False) -> Stmt:
        stmts: list[Stmt] = []
        memory = self._spread([step], stmts)
        ranges = 4 * ROW_RANGES if self.channels.whole else 1
        large = None if add else self.large

        def one(n: Expr) -> Stmt:
            before: list[Stmt] = []
            stores = [reader.output(step, add) for reader in self._readers(memory, n, 1, before)]
            done = output_row(
                Length.of(self.columns),
                stores,
                lanes=self.lanes,
                unroll=2,
                streaming=self.streaming,
                large=large,
                apart=True,
            )
            return seq([*before, done])

        def task(chunk: Expr) -> Stmt:
            before: list[Stmt] = []
            first, last = _range(self.plan.rows, chunk, ranges, before)
            return seq([*before, loop(last - first, lambda k: one(plus(first, k)), name="row")])

        return seq([*stmts, loop(i64(ranges), task, name="range", kind="parallel")])

    def _readers(
        self, memory: SliceMemory, first: Expr, count: int, before: list[Stmt]
    ) -> list[RowReader]:
        end = plus(self.channels.start, self.channels.count)
        ahead = next_block(self.plan, self.streaming, end, self.columns, before)
        return [
            RowReader(
                memory,
                Position().along(self.plan.lead_axes, plus(first, i64(k))),
                self.row_axes,
                None,
                before,
                start=self.first_column,
                ahead=None if self.channels.whole else ahead,
            )
            for k in range(count)
        ]

    def _runs_of(
        self,
        rows: Expr,
        chunk: Expr,
        some: Callable[[Expr, int], Stmt],
        in_run: Callable[[Stmt], Stmt],
    ) -> Stmt:
        """The rows of a range in runs, each by fours and then one by one; `in_run` surrounds it."""
        stmts: list[Stmt] = []
        first, last = _range(rows, chunk, self.ranges, stmts)

        def run(start: Expr, count: Expr) -> Stmt:
            before: list[Stmt] = []
            begin = bind("begin", plus(first, start), before)
            fours = bind("fours", floordiv(count, ROWS_ABREAST), before)
            done = bind("done", plus(begin, times(fours, i64(ROWS_ABREAST))), before)

            def four(k: Expr) -> Stmt:
                return some(plus(begin, times(k, i64(ROWS_ABREAST))), ROWS_ABREAST)

            rows = [
                loop(fours, four, name="rows"),
                loop(modulo(count, ROWS_ABREAST), lambda k: some(plus(done, k), 1), name="row"),
            ]
            return seq([*before, in_run(seq(rows))])

        return seq([*stmts, runs(tirx.Sub(last, first), _RUN, run)])


def _range(rows: Expr, chunk: Expr, ranges: int, stmts: list[Stmt]) -> tuple[Expr, Expr]:
    """Where one of `ranges` equal ranges of the rows begins and ends."""
    if ranges == 1:
        return i64(0), rows
    first = floordiv(times(chunk, rows), ranges)
    last = floordiv(times(plus(chunk, i64(1)), rows), ranges)
    return bind("first", first, stmts), bind("last", last, stmts)
