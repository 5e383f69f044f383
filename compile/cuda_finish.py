"""The last kernel: outputs that combine the results of all slices.

A block takes 32 neighbouring elements of an output; 16 threads for each add up every 16th term,
loads of neighbours together, and their shares are added in a fixed order.

Roofline. The parts once, which lie in L2, of at most 660 blocks: a launch and the latency of a few
loads is what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, element_count
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_kernel import (
    WARP,
    as_i64,
    ceildiv,
    cleared,
    counted,
    get,
    grow,
    i32,
    kernel,
    named_index,
    on_host,
    put,
    quotient,
    registers,
    shared,
    sync,
    value_of,
)
from normgraph.compile.slice_plan import Step, distinct
from normgraph.compile.tensor_program import Load, Node, Tensor, loads
from normgraph.compile.tir import Expr, Stmt, i64, plus, product, seq, times, when

SHARES = 16
_THREADS = WARP * SHARES


def finish(frame: CudaFrame, partials: dict[Tensor, tuple[Room, Expr]]) -> Stmt:
    """The launches. partials: sums of whole-size values as (room, number of parts of each)."""
    groups: dict[frozenset[int], list[Step]] = {}
    for step in frame.plan.finish:
        groups.setdefault(step.op.out.axes, []).append(step)
    stmts = []
    for axes, steps in groups.items():
        outputs = {frame.output_of(step) for step in steps}
        launch = _Finish(frame, partials, tuple(sorted(axes)), steps).emit()
        stmts.append(when(frame.any_of(outputs), launch))
    return seq(stmts)


def over_shares(buffers: list[Any], thread: Expr, shares: int, stmts: list[Stmt]) -> None:
    """Add up what the threads 32 apart have, for all of them, in one order."""
    scratch = [shared(WARP * shares, str(b.dtype), "shares") for b in buffers]
    stmts += [tirx.AllocBuffer(each) for each in scratch]
    stmts += [put(s, get(b), thread) for s, b in zip(scratch, buffers, strict=True)]
    stmts.append(sync())
    mine = tirx.BitwiseAnd(thread, i32(WARP - 1))
    for each, buffer in zip(scratch, buffers, strict=True):
        stmts.append(put(buffer, get(each, mine)))

        def add(k: Expr, each: Any = each, buffer: Any = buffer) -> Stmt:
            return grow(buffer, get(each, mine + (k + 1) * WARP))

        stmts.append(counted(i32(shares - 1), add, "w"))


class _Finish:
    def __init__(
        self,
        frame: CudaFrame,
        partials: dict[Tensor, tuple[Room, Expr]],
        axes: tuple[int, ...],
        steps: list[Step],
    ) -> None:
        self.frame = frame
        self.extents = frame.program.extents
        self.partials = partials
        self.axes = axes
        self.steps = steps
        self.size = element_count(steps[0].op.out)
        self.rewrite: Callable[[Node], Node] = lambda node: node

    def emit(self) -> Stmt:
        stmts: list[Stmt] = []
        blocks = on_host("finish_blocks", ceildiv(self.size, i64(WARP)), stmts)
        return seq([*stmts, kernel(blocks, _THREADS, self._body)])

    def _body(self, block: Expr, thread: Expr) -> Stmt:
        stmts: list[Stmt] = []
        self.rewrite = self.frame.kernel_scalars(stmts)
        lane = tirx.BitwiseAnd(thread, i32(WARP - 1))
        index = named_index("element", as_i64(block) * i64(WARP) + as_i64(lane), stmts)
        share = named_index("share", tirx.shift_right(thread, i32(5)), stmts)
        inside = tirx.LT(index, self.size)
        for step in self.steps:
            inner: list[Stmt] = []
            self._output(step, index, share, thread, inside, inner)
            stmts.append(when(self.frame.any_of({self.frame.output_of(step)}), seq(inner)))
        return seq(stmts)

    def _output(
        self, step: Step, index: Expr, share: Expr, thread: Expr, inside: Expr, stmts: list[Stmt]
    ) -> None:
        value = Load(step.op.out) if step.is_sum else step.value
        here = Position().along(self.axes, index)
        sums = self.frame.plan.finish_sums
        totals: dict[Tensor, Any] = {}
        for tensor in distinct(t for t in loads(value) if t in sums):
            totals[tensor] = registers(1, tensor.dtype, f"{tensor.name}_total")
            stmts.append(cleared(totals[tensor]))
            stmts.append(when(inside, self._add_up(sums[tensor], totals[tensor], index, share)))
        if totals:
            over_shares([*totals.values()], thread, SHARES, stmts)

        def read(tensor: Tensor) -> Expr:
            if tensor in totals:
                return get(totals[tensor])
            return self.frame.element(tensor, here)

        result = value_of(value, read, self.rewrite)
        first = tirx.And(inside, tirx.EQ(share, i32(0)))
        stmts.append(when(first, self.frame.put_output(step.op.out, result, here)))

    def _add_up(self, step: Step, total: Any, index: Expr, share: Expr) -> Stmt:
        tensor = step.op.out
        if tensor in self.partials:
            room, parts = self.partials[tensor]

            def part(number: Expr) -> Expr:
                return self.frame.load_room(room, plus(times(number, self.size), index))

            return self._shares(parts, lambda k: grow(total, part(k)), share)
        axes = tuple(sorted(step.op.reduce))
        if axes != tuple(range(axes[0], axes[-1] + 1)):
            raise NotCanonical(f"{tensor.name} adds up along axes that are not neighbours")
        here = Position().along(self.axes, index)

        def term(number: Expr) -> Stmt:
            at = here.along(axes, number)
            value = value_of(step.value, lambda t: self.frame.element(t, at), self.rewrite)
            return grow(total, value)

        return self._shares(product([self.extents[a] for a in axes]), term, share)

    def _shares(self, count: Expr, body: Callable[[Expr], Stmt], share: Expr) -> Stmt:
        mine = quotient(tirx.Cast("int32", count) - share + (SHARES - 1), SHARES)

        def one(k: Expr) -> Stmt:
            stmts: list[Stmt] = []
            number = named_index("number", as_i64(share + k * SHARES), stmts)
            return seq([*stmts, body(number)])

        return counted(mine, one, "k")
