"""The CPU schedule rule for normalization: slices in parallel, each read once a pass.

Pattern. A function that `tensor_program` can read and `slice_plan` can order: statistics over
slices (a row, a plane, a channel), element-wise outputs, sums across slices.

Strategy.
 1. Slices are spread over the threads, or left to the calling one where there is little to do.
    Where they lie behind each other in memory each is one contiguous piece; where other axes come
    before them (batch norm's n) a task takes a block of neighbouring channels, so that it reads
    runs of at least 12 KB, or, with nothing behind the channel axis, a run of channels at once as
    the vector.
 2. Each pass reads the slice once and computes all sums and outputs that are ready, in one loop
    (`row_kernel`); pass two finds the slice in cache.
 3. What has one element a slice is computed between passes and stays beside the loop.
 4. Sums across slices: of whole-size values (layer norm's parameter gradients) into one partial
    sum for each of a fixed number of row ranges; of per-slice values through a workspace of the
    statistics' size. Both are combined at the end in a fixed order, so results do not depend on
    the number of threads.
 5. Each output has a request of two bits (null, write, add). A pass whose outputs are all written
    runs as one loop; otherwise each requested output, and each group of sums it needs, by itself.

Bytes: every element-wise input is read once a pass, passes after the first from cache for slices
that fit it; outputs are written once. Forward: 3 passes (mean, centred sums, output); backward: 2.

Rejected. Schedule primitives on the blocks (merge, rfactor, decompose_reduction): merging row loops
silently drops a nest that stands between them, and tails need predicates that block vectorising.
The compiler's own vectoriser with reassociation: it may cancel x - mean - delta. One pass with
E[x^2] - E[x]^2: wrong at large means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, evaluate, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.finish import Finish
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.row_kernel import RowStore, RowSum, registers_a_sum, row
from normgraph.compile.row_reader import Block, RowReader, SliceMemory
from normgraph.compile.slice_plan import Pass, SlicePlan, Step, plan
from normgraph.compile.tensor_program import Tensor, loads, read
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    i64,
    load,
    loop,
    nest,
    plus,
    product,
    runs,
    seq,
    times,
    when,
    zero,
)

NAME = "slices"

# A block of batch norm channels covers at least this many bytes of consecutive memory.
_RUN_BYTES = 12 * 1024
_MOST_CHANNELS = 16
# Channels in the vector where nothing lies behind the channel axis.
_CHANNEL_RUN = 64
# Up to this many elements a launch of the thread pool costs more than it gains.
_SERIAL_ELEMENTS = 32768
# Neighbours along a leading axis that one sum takes before it is moved on, so that the error of a
# sum over many grows with its square root.
_LEAD_RUN = 256
# Row ranges with partial sums of their own; fixed, so that the thread count changes no result.
_PARTIALS = 16


def apply(func: Any, outputs: Sequence[str], vector_bytes: int) -> Any | None:
    """The scheduled function, or None where the pattern is not this rule's own.

    func: the fused PrimFunc of a graph. outputs: their names, for messages. vector_bytes: size of a
    vector register.
    The result takes the function's tensors and then the requests as one int64.
    """
    try:
        slice_plan = plan(read(func))
        return _Emitter(slice_plan, outputs, vector_bytes).emit()
    except NotCanonical:
        return None


class _Emitter:
    def __init__(self, slice_plan: SlicePlan, outputs: Sequence[str], vector_bytes: int) -> None:
        self.plan = slice_plan
        self.program = slice_plan.program
        self.extents = self.program.extents
        self.vector_bytes = vector_bytes
        self.frame = Frame(slice_plan, outputs, _PARTIALS)
        self.slice_axes = slice_plan.slice_axes
        self.inner_axes = tuple(
            a
            for a in slice_plan.wide_axes
            if a not in self.slice_axes and a not in slice_plan.lead_axes
        )
        # Nothing behind the slices' own axes: the vector runs across slices.
        self.across = bool(slice_plan.lead_axes) and not self.inner_axes
        self.slices = product([self.extents[a] for a in self.slice_axes])

    def emit(self) -> Any:
        opening = self.frame.open()
        small = tirx.LE(self._elements(), i64(_SERIAL_ELEMENTS))
        slices = when(small, self._all_slices("serial"), self._all_slices("parallel"))
        body = [*opening, slices, Finish(self.frame, self._lanes()).emit()]
        return self.frame.close(seq(body))

    def _lanes(self) -> int:
        sizes = [8 if "64" in t.dtype else 4 for t in self.plan.per_slice] or [4]
        wide = [t for t in self.program.inputs if t.dtype == "float64"]
        return self.vector_bytes // (8 if wide else max(sizes))

    # Tasks.

    def _elements(self) -> Expr:
        return product([self.extents[a] for a in self.plan.wide_axes])

    def _all_slices(self, kind: str) -> Stmt:
        if self.plan.column_sums:
            return self._row_ranges(kind)
        if self.plan.lead_axes:
            return self._channel_blocks(kind)
        return loop(
            self.slices,
            lambda index: self._slices(Block(index, i64(1), 1)),
            name="slice",
            kind=kind,
        )

    def _row_ranges(self, kind: str) -> Stmt:
        if self.plan.lead_axes:
            raise NotCanonical("sums across slices that are not contiguous")

        def task(chunk: Expr) -> Stmt:
            stmts: list[Stmt] = [self.frame.clear_partials(chunk)]
            first = bind("first", _share(self.slices, chunk), stmts)
            last = bind("last", _share(self.slices, plus(chunk, i64(1))), stmts)
            rows = loop(
                tirx.Sub(last, first),
                lambda index: self._slices(Block(index, i64(1), 1, chunk)),
                name="slice",
                start=first,
            )
            return seq([*stmts, rows])

        return loop(i64(_PARTIALS), task, name="range", kind=kind)

    def _channel_blocks(self, kind: str) -> Stmt:
        most = _CHANNEL_RUN if self.across else _MOST_CHANNELS
        stmts: list[Stmt] = []
        size = bind("block_size", self._channels_in_block(most), stmts)
        blocks = bind(
            "blocks", tirx.FloorDiv(plus(self.slices, tirx.Sub(size, i64(1))), size), stmts
        )

        def task(index: Expr) -> Stmt:
            inner: list[Stmt] = []
            start = bind("first_channel", times(index, size), inner)
            count = bind("channels", tirx.Min(size, tirx.Sub(self.slices, start)), inner)
            return seq([*inner, self._slices(Block(start, count, most))])

        return seq([*stmts, loop(blocks, task, name="task", kind=kind)])

    def _channels_in_block(self, most: int) -> Expr:
        # At least eight tasks, so that two to eight threads have even shares.
        share = tirx.FloorDiv(plus(self.slices, i64(7)), i64(8))
        if self.across:
            return tirx.Max(tirx.Min(share, i64(most)), i64(min(16, most)))
        row_bytes = times(product([self.extents[a] for a in self.inner_axes]), i64(4))
        run = tirx.FloorDiv(plus(row_bytes, i64(_RUN_BYTES - 1)), row_bytes)
        return tirx.Max(tirx.Min(tirx.Min(run, i64(most)), share), i64(1))

    # One task's slices.

    def _slices(self, block: Block) -> Stmt:
        self.memory = SliceMemory(self.frame, self.plan.per_slice, block)
        stmts = self.memory.allocate()
        for work in self.plan.passes:
            stmts.extend(self._pass(work, block))
        return seq(stmts)

    def _pass(self, work: Pass, block: Block) -> list[Stmt]:
        sums = [step for step in work.wide if self._is_local_sum(step)]
        stmts = [self._clear_sum(step.op.out, block) for step in sums]
        groups: dict[frozenset[int], list[Step]] = {}
        outputs: list[Step] = []
        for step in work.wide:
            if step.is_sum:
                groups.setdefault(step.needs, []).append(step)
            else:
                outputs.append(step)
        if groups or outputs:
            stmts.append(self._traversals(list(groups.items()), outputs, block))
        after = [*((s, True) for s in sums), *((s, False) for s in work.after)]
        if after:

            def settle(c: Expr) -> Stmt:
                return seq([self._settle(step, done, block, c) for step, done in after])

            stmts.append(self._each_slice(block, settle))
        return stmts

    def _traversals(
        self, groups: list[tuple[frozenset[int], list[Step]]], outputs: list[Step], block: Block
    ) -> Stmt:
        """All of the pass in one loop where all is written, else part by part."""
        apart: list[Stmt] = []
        for needs, steps in groups:
            apart.append(when(self.frame.any_of(needs), self._traverse(steps, block)))
        for step in outputs:
            index = self.frame.output_of(step)
            added = self._traverse([step], block, add=True)
            added = when(self.frame.is_add(index), added)
            written = self._traverse([step], block)
            apart.append(when(self.frame.is_write(index), written, added))
        if len(apart) == 1:
            return apart[0]
        conditions = [self.frame.any_of(needs) for needs, _ in groups]
        conditions += [self.frame.is_write(self.frame.output_of(step)) for step in outputs]
        known = [c for c in conditions if c is not None]
        whole = self._traverse([s for _, steps in groups for s in steps] + outputs, block)
        if not known:
            return whole
        every = known[0]
        for condition in known[1:]:
            every = tirx.And(every, condition)
        return when(every, whole, seq(apart))

    def _is_local_sum(self, step: Step) -> bool:
        return step.is_sum and step.op.out in self.plan.per_slice

    def _clear_sum(self, tensor: Tensor, block: Block) -> Stmt:
        buffer = self.memory.locals[tensor]
        none = zero(tensor.dtype)
        return self._each_slice(block, lambda c: tirx.BufferStore(buffer, none, [c]))

    # One traversal of the slices' data.

    def _traverse(self, steps: list[Step], block: Block, *, add: bool = False) -> Stmt:
        if not self.plan.lead_axes:
            return self._inner(steps, block, Position(), add)
        outer, first = self.plan.lead_axes[:-1], self.plan.lead_axes[-1]
        sums = [step.op.out for step in steps if self._is_local_sum(step)]

        def leading(index: list[Expr]) -> Stmt:
            at = Position(dict(zip(outer, index, strict=True)))

            def run(start: Expr, count: Expr) -> Stmt:
                def one(n: Expr) -> Stmt:
                    return self._inner(steps, block, at.at({first: plus(start, n)}), add)

                return self._added_up(sums, block, lambda: loop(count, one, name=f"n{first}"))

            return runs(self.extents[first], _LEAD_RUN, run)

        return nest([(f"n{a}", self.extents[a]) for a in outer], leading)

    def _added_up(self, sums: list[Tensor], block: Block, body: Callable[[], Stmt]) -> Stmt:
        """`body` with sums of its own, which then are added to the slices' sums."""
        if not sums:
            return body()
        whole = {t: self.memory.locals[t] for t in sums}
        part = {
            t: tirx.decl_buffer((block.most,), t.dtype, f"{t.name}_run", scope="global")
            for t in sums
        }
        self.memory.locals.update(part)
        stmts: list[Stmt] = [tirx.AllocBuffer(buffer) for buffer in part.values()]
        stmts += [self._clear_sum(t, block) for t in sums]
        stmts.append(body())
        self.memory.locals.update(whole)

        def grow(c: Expr) -> Stmt:
            pairs = [(whole[t], part[t]) for t in sums]
            return seq([tirx.BufferStore(w, load(w, c) + load(p, c), [c]) for w, p in pairs])

        stmts.append(self._each_slice(block, grow))
        return seq(stmts)

    def _inner(self, steps: list[Step], block: Block, at: Position, add: bool) -> Stmt:
        """The part of a traversal that lies together in memory."""
        if self.across:
            return self._row(steps, block, at, self.slice_axes, None, add)
        row_axes = self._row_axes(steps)
        middle = [a for a in self.inner_axes if a not in row_axes]

        def rows(c: Expr, between: list[Expr]) -> Stmt:
            here = at.at(dict(zip(middle, between, strict=True)))
            here = here.along(self.slice_axes, plus(block.start, c))
            return self._row(steps, block, here, row_axes, c, add)

        extents = [(f"m{a}", self.extents[a]) for a in middle]
        return self._each_slice(block, lambda c: nest(extents, lambda index: rows(c, index)))

    def _each_slice(self, block: Block, body: Callable[[Expr], Stmt]) -> Stmt:
        return loop(block.count if block.most > 1 else i64(1), body, name="c")

    def _row_axes(self, steps: list[Step]) -> tuple[int, ...]:
        """The longest run of last axes along which every operand is contiguous or constant."""
        for first in range(len(self.inner_axes)):
            run = self.inner_axes[first:]
            if all(self._runs_along(step, frozenset(run)) for step in steps):
                return run
        raise NotCanonical("no axis along which all operands are contiguous or constant")

    @staticmethod
    def _runs_along(step: Step, run: frozenset[int]) -> bool:
        whole = all(t.axes & run in (run, frozenset()) for t in loads(step.value))
        return whole and step.op.reduce & run in (run, frozenset())

    def _row(
        self,
        steps: list[Step],
        block: Block,
        at: Position,
        row_axes: tuple[int, ...],
        c: Expr | None,
        add: bool,
    ) -> Stmt:
        stmts: list[Stmt] = []
        reader = RowReader(self.memory, at, row_axes, c, stmts, across=self.across)
        sums: list[RowSum] = []
        stores: list[RowStore] = []
        for step in steps:
            if not step.is_sum:
                stores.append(RowStore(reader.output(step, add)))
            elif self.across or not step.op.reduce & frozenset(row_axes):
                stores.append(RowStore(reader.elementwise_sum(step)))
            else:
                take = reader.total(step)
                sums.append(RowSum(reader.value(step), take, step.op.out.dtype))
        length = block.count if self.across else product([self.extents[a] for a in row_axes])
        unroll = 1 if self.across else registers_a_sum(len(sums), self.vector_bytes)
        stmts.append(row(length, sums, stores, lanes=self._lanes(), unroll=unroll))
        return seq(stmts)

    # Values with one element a slice.

    def _settle(self, step: Step, done: bool, block: Block, c: Expr) -> Stmt:
        """Compute a per-slice value, then keep it where it is wanted."""
        tensor = step.op.out
        at = Position().along(self.slice_axes, plus(block.start, c))
        stmts: list[Stmt] = []
        if not done:
            stmts.append(self._compute(step, at, c))
        if tensor in self.plan.per_slice:
            value = tirx.BufferLoad(self.memory.locals[tensor], [c])
            if tensor in self.frame.workspaces:
                stmts.append(self.frame.store(tensor, value, offset(tensor, at, self.extents)))
            if tensor.output_index is not None:
                stmts.append(
                    self.frame.request_store(tensor, value, offset(tensor, at, self.extents))
                )
        return seq(stmts)

    def _compute(self, step: Step, at: Position, c: Expr) -> Stmt:
        tensor = step.op.out
        if not step.is_sum:
            value = evaluate(step.value, lambda t: self.memory.read(t, at, c))
            return self._keep(tensor, value, at, c)
        if tensor not in self.plan.per_slice:
            raise NotCanonical(f"{tensor.name} is a partial sum of partial sums")
        buffer = self.memory.locals[tensor]
        axes = sorted(step.op.reduce)

        def one(index: list[Expr]) -> Stmt:
            inner = at.at(dict(zip(axes, index, strict=True)))
            value = evaluate(step.value, lambda t: self.memory.read(t, inner, c))
            return tirx.BufferStore(buffer, tirx.Add(tirx.BufferLoad(buffer, [c]), value), [c])

        clear = tirx.BufferStore(buffer, zero(tensor.dtype), [c])
        return seq([clear, nest([(f"k{a}", self.extents[a]) for a in axes], one)])

    def _keep(self, tensor: Tensor, value: Expr, at: Position, c: Expr) -> Stmt:
        if tensor in self.plan.per_slice:
            return tirx.BufferStore(self.memory.locals[tensor], value, [c])
        return self.frame.store(tensor, value, offset(tensor, at, self.extents))


def _share(count: Expr, chunk: Expr) -> Expr:
    """Where range `chunk` of _PARTIALS equal ranges begins."""
    known = constant(count), constant(chunk)
    if None not in known:
        return i64(known[0] * known[1] // _PARTIALS)  # type: ignore[operator]
    return tirx.FloorDiv(times(chunk, count), i64(_PARTIALS))
