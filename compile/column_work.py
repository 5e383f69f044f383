"""Statistics over the leading axes with nothing behind them: batch norm of a matrix.

Here a slice is a column, and reading one alone would touch a line of memory for each element. So
all columns are done together, row by row: each of a fixed number of row ranges adds its rows up
into partial sums of its own, the partial sums are added in a fixed order, and what follows from
them is computed for all columns in vectors. Four rows go side by side, so that a sum is loaded and
stored once for four.

Bytes: x (and dy) once a pass, in order; the sums stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, element_count, evaluate, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.row_kernel import output_row, row
from normgraph.compile.row_reader import (
    ROW_RANGES,
    ROWS_ABREAST,
    RowReader,
    SliceMemory,
    column_sum,
)
from normgraph.compile.slice_plan import Pass, SlicePlan, Step
from normgraph.compile.streaming import Streaming
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    floordiv,
    i64,
    load,
    loop,
    modulo,
    plus,
    product,
    runs,
    seq,
    times,
    vector_loop,
    when,
    zero,
)

# Steps of four rows that a sum takes before it is moved on, so that the error of a sum over many
# grows with its square root.
_RUN = 16


class ColumnWork:
    """Emits the whole work of a function; `large` says whether outputs go past the caches."""

    def __init__(self, frame: Frame, lanes: int, streaming: Streaming, large: Expr) -> None:
        self.frame = frame
        self.plan: SlicePlan = frame.plan
        self.extents = frame.program.extents
        self.lanes = lanes
        self.streaming = streaming
        self.large = large
        self.columns = product([self.extents[a] for a in self.plan.slice_axes])
        self.rows = product([self.extents[a] for a in self.plan.lead_axes])
        self.memory = SliceMemory(frame, (), (), 1)
        self.memory.locals = {t: self._array(t, i64(1)) for t in self.plan.per_slice}

    def _array(self, tensor: Tensor, copies: Expr) -> Any:
        size = times(copies, element_count(tensor))
        return tirx.decl_buffer((size,), tensor.dtype, tensor.name, scope="global")

    def emit(self) -> Stmt:
        """All passes, each a parallel loop over rows and then the columns' values."""
        stmts: list[Stmt] = [tirx.AllocBuffer(b) for b in self.memory.locals.values()]
        for work in self.plan.passes:
            stmts += self._pass(work)
        return seq(stmts)

    def _pass(self, work: Pass) -> list[Stmt]:
        sums = [step for step in work.wide if step.is_sum]
        stmts: list[Stmt] = []
        if sums:
            needs = frozenset[int]().union(*(step.needs for step in sums))
            stmts.append(when(self.frame.any_of(needs), self._sums(sums)))
        stmts += [self._settle(work.after)] if work.after else []
        kept = [s.op.out for s in (*sums, *work.after) if s.op.out.output_index is not None]
        if kept:
            stmts.append(loop(self.columns, lambda c: self._keep(kept, c), name="column"))
        for step in work.wide:
            if not step.is_sum:
                index = self.frame.output_of(step)
                added = when(self.frame.is_add(index), self._output(step, add=True))
                stmts.append(when(self.frame.is_write(index), self._output(step), added))
        return stmts

    # Sums.

    def _sums(self, steps: list[Step]) -> Stmt:
        # Two of each a range: the sum of the run at hand, and that of the runs before.
        partials = {s.op.out: self._array(s.op.out, i64(2 * ROW_RANGES)) for s in steps}
        rows = self.rows if steps[0].sample is None else self._sampled(steps[0])

        def task(chunk: Expr) -> Stmt:
            here = times(chunk, i64(2))
            run, whole = (times(plus(here, i64(k)), self.columns) for k in range(2))

            def each(value: Callable[[Any, Tensor, Expr], Stmt]) -> Stmt:
                return self._each_column(
                    lambda c: seq([value(buffer, t, c) for t, buffer in partials.items()])
                )

            def clear(start: Expr) -> Stmt:
                return each(lambda b, t, c: tirx.BufferStore(b, zero(t.dtype), [plus(start, c)]))

            def move(buffer: Any, tensor: Tensor, c: Expr) -> Stmt:
                grown = load(buffer, plus(whole, c)) + load(buffer, plus(run, c))
                return tirx.BufferStore(buffer, grown, [plus(whole, c)])

            def some(first: Expr, count: int) -> Stmt:
                stmts: list[Stmt] = []
                readers = self._readers(first, count, stmts)
                stores = [column_sum(readers, s, partials[s.op.out], here) for s in steps]
                stmts.append(row(self.columns, [], stores, lanes=self.lanes, unroll=1))
                return seq(stmts)

            def in_run(body: Stmt) -> Stmt:
                return seq([clear(run), body, each(move)])

            work = self._range_of(rows, chunk, i64(ROW_RANGES), some, in_run)
            return seq([clear(whole), work])

        ranges = loop(i64(ROW_RANGES), task, name="range", kind="parallel")
        alloc = [tirx.AllocBuffer(buffer) for buffer in partials.values()]
        return seq([*alloc, ranges, *(self._total(t, p) for t, p in partials.items())])

    def _sampled(self, step: Step) -> Expr:
        """Rows of the sample: the last leading axis is cut, the ones before it are not."""
        if len(self.plan.lead_axes) != 1:
            raise NotCanonical("a sample of several leading axes")
        return step.sample

    def _total(self, tensor: Tensor, partial: Any) -> Stmt:
        whole = self.memory.locals[tensor]

        def one(c: Expr) -> Stmt:
            terms = [
                load(partial, plus(times(i64(2 * k + 1), self.columns), c))
                for k in range(ROW_RANGES)
            ]
            while len(terms) > 1:
                terms = [tirx.Add(*terms[k : k + 2]) for k in range(0, len(terms), 2)]
            return tirx.BufferStore(whole, terms[0], [c])

        return self._each_column(one)

    # Values of the columns.

    def _settle(self, steps: Sequence[Step]) -> Stmt:
        if any(step.is_sum or step.op.out not in self.plan.per_slice for step in steps):
            raise NotCanonical("a column's value that is not a map of others")

        def one(c: Expr) -> Stmt:
            at = Position().along(self.plan.slice_axes, c)
            stmts = []
            for step in steps:
                value = evaluate(step.value, lambda t: self.memory.read(t, at, c))
                stmts.append(tirx.BufferStore(self.memory.locals[step.op.out], value, [c]))
            return seq(stmts)

        return self._each_column(one)

    def _keep(self, tensors: list[Tensor], c: Expr) -> Stmt:
        at = Position().along(self.plan.slice_axes, c)
        return seq(
            [
                self.frame.request_store(
                    t, load(self.memory.locals[t], c), offset(t, at, self.extents)
                )
                for t in tensors
            ]
        )

    def _each_column(self, body: Callable[[Expr], Stmt]) -> Stmt:
        vectors = floordiv(self.columns, self.lanes)

        def vector(k: Expr) -> Stmt:
            base = times(k, i64(self.lanes))
            return vector_loop(self.lanes, lambda lane: body(plus(base, lane)))

        done = times(vectors, i64(self.lanes))
        rest = loop(modulo(self.columns, self.lanes), lambda k: body(plus(done, k)), name="column")
        return seq([loop(vectors, vector, name="vector"), rest])

    # Outputs.

    def _output(self, step: Step, *, add: bool = False) -> Stmt:
        ranges = i64(4 * ROW_RANGES)

        def task(chunk: Expr) -> Stmt:
            def some(first: Expr, count: int) -> Stmt:
                stmts: list[Stmt] = []
                readers = self._readers(first, count, stmts)
                stores = [reader.output(step, add) for reader in readers]
                done = output_row(
                    self.columns,
                    stores,
                    lanes=self.lanes,
                    unroll=1,
                    streaming=self.streaming,
                    large=self.large,
                )
                return seq([*stmts, done])

            work = self._range_of(self.rows, chunk, ranges, some)
            return work if add else seq([work, when(self.large, self.streaming.fence())])

        return loop(ranges, task, name="range", kind="parallel")

    # Rows.

    def _readers(self, first: Expr, count: int, before: list[Stmt]) -> list[RowReader]:
        return [
            RowReader(
                self.memory,
                Position().along(self.plan.lead_axes, plus(first, i64(k))),
                self.plan.slice_axes,
                None,
                before,
                start=i64(0),
            )
            for k in range(count)
        ]

    def _range_of(
        self,
        rows: Expr,
        chunk: Expr,
        ranges: Expr,
        some: Callable[[Expr, int], Stmt],
        in_run: Callable[[Stmt], Stmt] = lambda body: body,
    ) -> Stmt:
        """The rows of one of `ranges` equal ranges: in fours, then the rest one by one.

        `in_run` surrounds each run of _RUN fours, and the rest.
        """
        stmts: list[Stmt] = []
        first = bind("first", tirx.FloorDiv(times(chunk, rows), ranges), stmts)
        last = bind("last", tirx.FloorDiv(times(plus(chunk, i64(1)), rows), ranges), stmts)
        fours = bind("fours", floordiv(tirx.Sub(last, first), ROWS_ABREAST), stmts)
        rest = bind("rest", plus(first, times(fours, i64(ROWS_ABREAST))), stmts)

        def run(start: Expr, count: Expr) -> Stmt:
            def four(k: Expr) -> Stmt:
                return some(plus(first, times(plus(start, k), i64(ROWS_ABREAST))), ROWS_ABREAST)

            return in_run(loop(count, four, name="rows"))

        stmts.append(runs(fours, _RUN, run))
        stmts.append(
            in_run(loop(tirx.Sub(last, rest), lambda k: some(plus(rest, k), 1), name="row"))
        )
        return seq(stmts)
