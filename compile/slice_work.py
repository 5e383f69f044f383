"""What a task does with its slices: pass by pass over their data, and what follows from the sums.

A block of slices goes through each pass together. Short ones wait for nobody: the sums of one row
do not hold up the loads of the next, and what has one element a slice is computed for the whole
block in vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, element_count, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.next_block import next_block, whole_inputs
from normgraph.compile.output_row import can_stream, output_row
from normgraph.compile.row_kernel import (
    RowStore,
    RowSum,
    fold,
    registers_a_sum,
    row,
)
from normgraph.compile.row_lengths import Length, by_length
from normgraph.compile.row_reader import Block, RowReader, column_sum
from normgraph.compile.slice_plan import Pass, SlicePlan, Step
from normgraph.compile.slice_values import SliceValues
from normgraph.compile.staged_block import StagedBlock
from normgraph.compile.streaming import Streaming
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    i64,
    load,
    loop,
    nest,
    plus,
    product,
    runs,
    seq,
    times,
    vector_loop,
    when,
    zero,
)
from normgraph.compile.turned_order import step_of, turned_order

# Neighbours along a leading axis that one sum takes before it is moved on, so that the error of a
# sum over many grows with its square root.
_LEAD_RUN = 32


class SliceWork:
    """Emits the statements of one block of slices."""

    def __init__(
        self,
        frame: Frame,
        block: Block,
        lanes: int,
        vector_bytes: int,
        *,
        streaming: Streaming,
        large: Expr,
    ) -> None:
        self.frame = frame
        self.plan: SlicePlan = frame.plan
        self.extents = frame.program.extents
        self.block = block
        self.lanes = lanes
        self.vector_bytes = vector_bytes
        self.streaming = streaming
        self.large = large
        self.values = SliceValues(frame, block, lanes)
        self.memory = self.values.memory
        self.inner_axes = self.plan.inner_axes

    def emit(self) -> Stmt:
        """All passes of the block."""
        stmts = self.values.open()
        for work in self.plan.passes:
            stmts.extend(self._pass(work))
        return seq(stmts)

    def _all_lanes(self, width: int, body: Callable[[Expr], Stmt]) -> Stmt:
        """`body` for each of the first `width` elements of a buffer beside the loop, in vectors."""
        lanes = min(self.lanes, width)

        def vector(k: Expr) -> Stmt:
            base = times(k, i64(lanes))
            return vector_loop(lanes, lambda lane: body(plus(base, lane)))

        return loop(i64(width // lanes), vector, name="vector")

    # One pass.

    def _pass(self, work: Pass) -> list[Stmt]:
        sums = [step for step in work.wide if self._is_local_sum(step)]
        stmts = [self._clear(self.memory.locals[s.op.out], self.block.most) for s in sums]
        groups: dict[frozenset[int], list[Step]] = {}
        outputs: list[Step] = []
        for step in work.wide:
            if step.is_sum:
                groups.setdefault(step.needs, []).append(step)
            else:
                outputs.append(step)
        if groups or outputs:
            stmts.append(self._traversals(list(groups.items()), outputs))
        stmts.extend(self.values.settle(work.after))
        kept = self.values.keep([*sums, *work.after])
        return stmts if kept is None else [*stmts, kept]

    def _traversals(
        self, groups: list[tuple[frozenset[int], list[Step]]], outputs: list[Step]
    ) -> Stmt:
        """All of the pass in one loop where all is written, else part by part."""
        alone = len(groups) + len(outputs) == 1
        apart: list[Stmt] = []
        for needs, steps in groups:
            apart.append(when(self.frame.any_of(needs), self._traverse(steps, usual=alone)))
        for step in outputs:
            index = self.frame.output_of(step)
            added = when(self.frame.is_add(index), self._traverse([step], add=True))
            written = self._traverse([step], usual=alone)
            apart.append(when(self.frame.is_write(index), written, added))
        if len(apart) == 1:
            return apart[0]
        conditions = [self.frame.any_of(needs) for needs, _ in groups]
        conditions += [self.frame.is_write(self.frame.output_of(step)) for step in outputs]
        known = [c for c in conditions if c is not None]
        whole = self._traverse([s for _, steps in groups for s in steps] + outputs, usual=True)
        if not known:
            return whole
        every = known[0]
        for condition in known[1:]:
            every = tirx.And(every, condition)
        return when(every, whole, seq(apart))

    def _is_local_sum(self, step: Step) -> bool:
        return step.is_sum and step.op.out in self.plan.per_slice

    def _clear(self, buffer: Any, width: int) -> Stmt:
        none = zero(str(buffer.dtype))
        return self._all_lanes(width, lambda k: tirx.BufferStore(buffer, none, [k]))

    # One traversal of the slices' data.

    def _traverse(self, steps: list[Step], *, add: bool = False, usual: bool = False) -> Stmt:
        """usual: most calls take this way, so it is worth code for each of the short lengths."""
        exact = usual and self.block.most > 1
        if not self.plan.lead_axes:
            return self._inner(steps, Position(), add, {}, exact)
        outer, first = self.plan.lead_axes[:-1], self.plan.lead_axes[-1]
        sums = [step.op.out for step in steps if self._is_local_sum(step)]
        parts = self._parts(sums)

        def leading(index: list[Expr]) -> Stmt:
            at = Position(dict(zip(outer, index, strict=True)))

            before: list[Stmt] = []
            elements = times(self.plan.rows, self.plan.row_length)
            order = None if sums else turned_order(self.plan, self.streaming, elements)
            step = step_of(order, self.extents[first], before)

            def run(start: Expr, count: Expr) -> Stmt:
                def one(n: Expr) -> Stmt:
                    here = at.at({first: step(plus(start, n))})
                    return self._inner(steps, here, add, parts, exact)

                return self._added_up(parts, loop(count, one, name=f"n{first}"))

            return seq([*before, runs(self.extents[first], _LEAD_RUN, run)])

        nested = nest([(f"n{a}", self.extents[a]) for a in outer], leading)
        return seq([*(tirx.AllocBuffer(buffer) for buffer in parts.values()), nested])

    def _parts(self, sums: list[Tensor]) -> dict[Tensor, Any]:
        """Buffers for the sums of a run: a vector a slice's rows."""
        width = self.block.most * self.lanes
        return {
            t: tirx.decl_buffer((width,), t.dtype, f"{t.name}_run", scope="global") for t in sums
        }

    def _added_up(self, parts: dict[Tensor, Any], body: Stmt) -> Stmt:
        """`body` with sums of its own, which then are added to the slices' sums."""
        stmts = [self._clear(part, int(part.shape[0])) for part in parts.values()]
        stmts.append(body)

        def grow(tensor: Tensor, c: Expr, value: Expr) -> Stmt:
            whole = self.memory.locals[tensor]
            return tirx.BufferStore(whole, load(whole, c) + value, [c])

        def fold_rows(c: Expr) -> Stmt:
            base = times(c, i64(self.lanes))
            folded = []
            for tensor, part in parts.items():
                folded += [*fold(part, self.lanes, 1, base), grow(tensor, c, load(part, base))]
            return seq(folded)

        return seq([*stmts, self.values.each_slice(fold_rows)]) if parts else seq(stmts)

    def _inner(
        self,
        steps: list[Step],
        at: Position,
        add: bool,
        parts: dict[Tensor, Any],
        exact: bool = False,
    ) -> Stmt:
        """The part of a traversal that lies together in memory."""
        row_axes = self._row_axes(steps)
        middle = [a for a in self.inner_axes if a not in row_axes]
        columns = [step for step in steps if step.op.out in self.frame.partials]
        if columns:
            sums = [step for step in steps if step.is_sum and step not in columns]
            first = self._inner(sums, at, add, parts) if sums else None
            return seq([first, self._columns(steps, columns, row_axes, add)])

        def rows(length: Length, large: Expr | None, staged: StagedBlock | None = None) -> Stmt:
            def between(c: Expr, index: list[Expr]) -> Stmt:
                here = at.at(dict(zip(middle, index, strict=True)))
                here = here.along(self.plan.slice_axes, plus(self.block.start, c))
                return self._row(steps, here, row_axes, c, add, parts, length, large, staged)

            extents = [(f"m{a}", self.extents[a]) for a in middle]

            def one(c: Expr) -> Stmt:
                done = nest(extents, lambda index: between(c, index))
                return done if staged is None else seq([staged.follow(c), done])

            return self.values.each_slice(one)

        def code(length: Length) -> Stmt:
            sample = steps[0].sample
            if sample is not None:
                return rows(sample.of_row(length), None)
            if not can_stream(length):
                return rows(length, None)
            if self.block.most == 1 or any(step.is_sum for step in steps):
                return rows(length, self.large)
            # By the block: where a row's lines begin is looked at for nothing in what is kept.
            return when(self.large, rows(length, self.large), rows(length, None))

        count = product([self.extents[a] for a in row_axes])

        def each(code: Callable[[Length], Stmt]) -> Stmt:
            if exact:
                return by_length(count, self.block.longest, self.lanes, code)
            return code(Length.of(count, self.block.longest))

        if add or self.block.most == 1 or self.plan.lead_axes or len(steps) > 1 or steps[0].is_sum:
            return each(code)
        staged = self._staged(steps[0])
        past = staged.emit(each(lambda length: rows(length, None, staged)), followed=True)
        if self.block.longest is None:  # a row range's block: its rows may have any length
            direct = each(lambda length: rows(length, self.large))
            past = when(staged.ragged(), past, direct)
        return when(self.large, past, each(lambda length: rows(length, None)))

    def _staged(self, step: Step) -> StagedBlock:
        """Where the block's rows of an output are made ready to be streamed."""
        tensor, block, before = step.op.out, self.block, list[Stmt]()
        at = Position().along(self.plan.slice_axes, block.start)
        elements = bind("elements", times(block.count, self.plan.row_length), before)
        end = plus(block.start, block.count)
        ahead = next_block(self.plan, self.streaming, end, elements, before)
        first = offset(tensor, at, self.extents)
        inputs = whole_inputs(self.plan, step)
        return StagedBlock(
            self.frame,
            tensor,
            first,
            block.count,
            self.plan.row_length,
            streaming=self.streaming,
            inputs=inputs,
            ahead=ahead,
            before=before,
        )

    def _row_axes(self, steps: list[Step]) -> tuple[int, ...]:
        """The longest run of last axes along which every operand is contiguous or constant."""
        if not self.plan.wide_axes:
            return ()  # one element of each tensor
        for first in range(len(self.inner_axes)):
            run = self.inner_axes[first:]
            if all(_runs_along(step, frozenset(run)) for step in steps):
                return run
        raise NotCanonical("no axis along which all operands are contiguous or constant")

    def _row(
        self,
        steps: list[Step],
        at: Position,
        row_axes: tuple[int, ...],
        c: Expr,
        add: bool,
        parts: dict[Tensor, Any],
        length: Length,
        large: Expr | None,
        staged: StagedBlock | None,
    ) -> Stmt:
        stmts: list[Stmt] = []
        end = plus(self.block.start, self.block.count)
        distance = times(self.block.count, self.plan.row_length)
        ahead = next_block(self.plan, self.streaming, end, distance, stmts)
        reader = RowReader(self.memory, at, row_axes, c, stmts, ahead=ahead, staged=staged)
        sums: list[RowSum] = []
        stores: list[RowStore] = []
        for step in steps:
            if not step.is_sum:
                stores.append(reader.output(step, add))
            elif not step.op.reduce & frozenset(row_axes):
                raise NotCanonical(f"{step.op.out.name} does not add along the row")
            elif step.op.out in parts:
                sums.append(reader.lane_sums(step, self.lanes, parts[step.op.out]))
            else:
                sums.append(reader.row_sum(step))
        unroll = registers_a_sum(len(sums), self.vector_bytes)
        if sums:
            done = row(length, sums, stores, lanes=self.lanes, unroll=unroll)
        else:
            done = self._outputs(length, stores, unroll, large)
        return seq([*stmts, done])

    def _outputs(
        self,
        length: Length,
        stores: list[RowStore],
        unroll: int,
        large: Expr | None,
        rows: int = 1,
    ) -> Stmt:
        elements = times(length.elements, i64(rows))
        short = self.block.longest is not None
        order = None if short else turned_order(self.plan, self.streaming, elements)
        return output_row(
            length,
            stores,
            lanes=self.lanes,
            unroll=unroll,
            streaming=self.streaming,
            large=large,
            order=order,
        )

    def _columns(
        self, steps: list[Step], columns: list[Step], row_axes: tuple[int, ...], add: bool
    ) -> Stmt:
        """All rows of the block side by side, so that column sums are kept in registers."""
        if row_axes != self.inner_axes:
            raise NotCanonical("column sums over slices of several rows")
        length = Length.of(product([self.extents[a] for a in row_axes]))
        outputs = [step for step in steps if not step.is_sum]

        def rows(staged: StagedBlock | None) -> Stmt:
            stmts: list[Stmt] = []
            readers = []
            for k in range(self.block.most):
                at = self.values.position(i64(k))
                readers.append(RowReader(self.memory, at, row_axes, i64(k), stmts, staged=staged))
            stores = self._column_sums(readers, columns, row_axes)
            for step in outputs:
                stores += [reader.output(step, add) for reader in readers]
            large = self.large if staged is None else None
            return seq([*stmts, self._outputs(length, stores, 1, large, self.block.most)])

        if add or self.block.most == 1 or len(outputs) != 1:
            return rows(None)
        staged = self._staged(outputs[0])
        past = staged.emit(rows(staged), followed=False)
        return when(tirx.And(self.large, staged.ragged()), past, rows(None))

    def _column_sums(
        self, readers: list[RowReader], columns: list[Step], row_axes: tuple[int, ...]
    ) -> list[RowStore]:
        """The rows side by side, added to their row range's partial sums."""
        chunk = self.block.chunk
        assert chunk is not None
        partials = self.frame.partials
        first = readers[0].at.along(row_axes, i64(0))
        stores = []
        for step in columns:
            tensor = step.op.out
            start = plus(times(chunk, element_count(tensor)), offset(tensor, first, self.extents))
            stores.append(column_sum(readers, step, partials[tensor], start))
        return stores


def _runs_along(step: Step, run: frozenset[int]) -> bool:
    whole = all(t.axes & run in (run, frozenset()) for t in loads(step.value))
    return whole and step.op.reduce & run in (run, frozenset())
