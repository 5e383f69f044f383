"""The values with one element a slice: kept beside the loops, computed between the passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm import tirx

from normgraph.compile.addressing import Position, evaluate, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.row_reader import Block, SliceMemory
from normgraph.compile.slice_plan import SlicePlan, Step
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import (
    Expr,
    Stmt,
    i64,
    loop,
    nest,
    plus,
    seq,
    times,
    vector_loop,
    zero,
)


class SliceValues:
    """The per-slice values of one block, computed for `lanes` slices at a time."""

    def __init__(self, frame: Frame, block: Block, lanes: int) -> None:
        self.frame = frame
        self.plan: SlicePlan = frame.plan
        self.extents = frame.program.extents
        self.block = block
        self.lanes = lanes
        self.memory = SliceMemory(frame, self.plan.per_slice, _narrow_inputs(self.plan), block.most)

    def open(self) -> list[Stmt]:
        """The buffers, and the inputs with one element a slice brought into them."""
        stmts = self.memory.allocate()
        if self.memory.narrow:
            stmts.append(self.each_slice(lambda c: self.memory.copy_narrow(self.position(c), c)))
        return stmts

    def position(self, c: Expr) -> Position:
        """The position of slice `c` of the block."""
        return Position().along(self.plan.slice_axes, plus(self.block.start, c))

    def each_slice(self, body: Callable[[Expr], Stmt]) -> Stmt:
        """`body` for each slice of the block."""
        return loop(self.block.count if self.block.most > 1 else i64(1), body, name="c")

    def settle(self, steps: list[Step]) -> list[Stmt]:
        """Compute the values in order, neighbouring slices in vectors."""
        stmts: list[Stmt] = []
        together: list[Step] = []

        def flush() -> None:
            if together:
                done = tuple(together)
                stmts.append(self._vectors(lambda k: seq([self._compute(s, k) for s in done])))
                together.clear()

        for step in steps:
            if step.op.out in self.plan.per_slice and not step.is_sum and self._at_hand(step):
                together.append(step)
                continue
            flush()
            stmts.append(self.each_slice(partial(self._one, step)))
        flush()
        return stmts

    def _at_hand(self, step: Step) -> bool:
        return all(t in self.memory.locals for t in loads(step.value))

    def _vectors(self, body: Callable[[Expr], Stmt]) -> Stmt:
        """`body` for every slice of the block, in whole vectors: what lies behind is not used."""
        if self.block.most == 1:
            return body(i64(0))
        lanes = min(self.lanes, self.block.most)
        count = tirx.FloorDiv(plus(self.block.count, i64(lanes - 1)), i64(lanes))

        def vector(k: Expr) -> Stmt:
            base = times(k, i64(lanes))
            return vector_loop(lanes, lambda lane: body(plus(base, lane)))

        return loop(i64(1) if self.block.most == lanes else count, vector, name="vector")

    def _compute(self, step: Step, c: Expr) -> Stmt:
        value = evaluate(step.value, lambda t: tirx.BufferLoad(self.memory.locals[t], [c]))
        return tirx.BufferStore(self.memory.locals[step.op.out], value, [c])

    def _one(self, step: Step, c: Expr) -> Stmt:
        tensor = step.op.out
        at = self.position(c)
        if not step.is_sum:
            value = evaluate(step.value, lambda t: self.memory.read(t, at, c))
            if tensor in self.plan.per_slice:
                return tirx.BufferStore(self.memory.locals[tensor], value, [c])
            return self.frame.store(tensor, value, offset(tensor, at, self.extents))
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

    def _is_kept(self, tensor: Tensor) -> bool:
        wanted = tensor in self.frame.workspaces or tensor.output_index is not None
        return wanted and tensor in self.plan.per_slice

    def keep(self, steps: list[Step]) -> Stmt | None:
        """Store the values of steps where they are wanted."""
        kept = [step for step in steps if self._is_kept(step.op.out)]
        return seq([self._keep(step) for step in kept]) if kept else None

    def _keep(self, step: Step) -> Stmt:
        tensor, stmts = step.op.out, []
        if tensor in self.frame.workspaces:
            stmts.append(self.each_slice(lambda c: self.frame.store(tensor, *self._kept(step, c))))
        if tensor.output_index is not None:

            def put(add: bool) -> Stmt:
                return self.each_slice(lambda c: self.frame.put(tensor, *self._kept(step, c), add))

            stmts.append(self.frame.on_request(tensor, put))
        return seq(stmts)

    def _kept(self, step: Step, c: Expr) -> tuple[Expr, Expr]:
        """A step's value for slice `c`, and where it is stored."""
        at = self.position(c)
        return self.memory.settled(step, at, c), offset(step.op.out, at, self.extents)


def _narrow_inputs(plan: SlicePlan) -> list[Tensor]:
    """The inputs with one element a slice."""
    slice_axes, wide = frozenset(plan.slice_axes), frozenset(plan.wide_axes)
    return [t for t in plan.program.inputs if t.axes <= slice_axes and t.axes != wide]
