"""The end of a kernel: outputs that combine the results of all slices."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, element_count, evaluate, offset
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.slice_plan import Step, distinct
from normgraph.compile.tensor_program import Load, Tensor, loads
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    i64,
    loop,
    nest,
    plus,
    runs,
    seq,
    times,
    when,
    zero,
)

# Slices that one sum takes before it is moved on, so that the error of a sum over many grows with
# its square root.
_RUN = 256


class Finish:
    """Writes each remaining output in runs of `lanes` elements, sums innermost-contiguous."""

    def __init__(self, frame: Frame, lanes: int) -> None:
        self.frame = frame
        self.plan = frame.plan
        self.extents = frame.program.extents
        self.lanes = lanes

    def emit(self) -> Stmt | None:
        """The statements, or None where nothing is left to do."""
        return seq([self._output(step) for step in self.plan.finish]) if self.plan.finish else None

    def _output(self, step: Step) -> Stmt:
        index = self.frame.output_of(step)
        return when(self.frame.any_of([index]), self._runs(step))

    def _runs(self, step: Step) -> Stmt:
        axes = sorted(step.op.out.axes)
        if not axes:
            return self._run(step, Position(), None, 1)
        *outer, last = axes

        def along(index: list[Expr]) -> Stmt:
            at = Position(dict(zip(outer, index, strict=True)))
            stmts: list[Stmt] = []
            length = self.extents[last]
            known = constant(length)
            lanes = i64(self.lanes)
            runs = i64(known // self.lanes) if known is not None else tirx.FloorDiv(length, lanes)
            runs = bind("runs", runs, stmts)
            done = bind("done", times(runs, lanes), stmts)
            rest = tirx.Sub(length, done)
            if constant(runs) != 0:
                stmts.append(
                    loop(
                        runs,
                        lambda r: self._run(step, at, (last, times(r, lanes)), self.lanes),
                        name="run",
                    )
                )
            if known is None or known % self.lanes:
                stmts.append(
                    loop(rest, lambda r: self._run(step, at, (last, plus(done, r)), 1), name="rest")
                )
            return seq(stmts)

        return nest([(f"o{a}", self.extents[a]) for a in outer], along)

    def _run(self, step: Step, at: Position, run: tuple[int, Expr] | None, width: int) -> Stmt:
        """`width` neighbouring elements: their sums, then the output."""
        value = Load(step.op.out) if step.is_sum else step.value
        sums = [t for t in distinct(loads(value)) if t in self.plan.finish_sums]
        stmts: list[Stmt] = []
        totals: dict[Tensor, Any] = {}
        for tensor in sums:
            buffer = tirx.decl_buffer((width,), tensor.dtype, f"{tensor.name}_sum", scope="global")
            totals[tensor] = buffer
            none = zero(tensor.dtype)
            stmts.append(tirx.AllocBuffer(buffer))
            stmts.append(_lanes(width, lambda v, b=buffer, z=none: tirx.BufferStore(b, z, [v])))
            stmts.append(self._accumulate(self.plan.finish_sums[tensor], at, run, buffer, width))

        def element(lane: Expr, put: Any) -> Stmt:
            here = _shift(at, run, lane)

            def read(tensor: Tensor) -> Expr:
                if tensor in totals:
                    return tirx.BufferLoad(totals[tensor], [lane])
                return self.frame.load(tensor, offset(tensor, here, self.extents))

            return put(step, evaluate(value, read), offset(step.op.out, here, self.extents))

        index = self.frame.output_of(step)
        write = _lanes(width, lambda v: element(v, self.frame.write_output))
        add = _lanes(width, lambda v: element(v, self.frame.add_output))
        stmts.append(when(self.frame.is_write(index), write, add))
        return seq(stmts)

    def _accumulate(
        self, step: Step, at: Position, run: tuple[int, Expr] | None, buffer: Any, width: int
    ) -> Stmt:
        tensor = step.op.out
        if tensor in self.frame.partials:
            partial = self.frame.partials[tensor]
            size = element_count(tensor)

            def add_range(chunk: Expr) -> Stmt:
                def one(lane: Expr) -> Stmt:
                    here = offset(tensor, _shift(at, run, lane), self.extents)
                    value = tirx.BufferLoad(partial, [plus(times(chunk, size), here)])
                    return _grow(buffer, lane, value)

                return _lanes(width, one)

            return loop(self.frame.n_partials, add_range, name="range")
        *axes, last = sorted(step.op.reduce)

        def add_slice(inner: Position, part: Any) -> Stmt:
            def one(lane: Expr) -> Stmt:
                here = _shift(inner, run, lane)
                value = evaluate(
                    step.value, lambda t: self.frame.load(t, offset(t, here, self.extents))
                )
                return _grow(part, lane, value)

            return _lanes(width, one)

        def along_last(index: list[Expr]) -> Stmt:
            inner = at.at(dict(zip(axes, index, strict=True)))

            def some(first: Expr, count: Expr) -> Stmt:
                part = tirx.decl_buffer((width,), tensor.dtype, "run_sum", scope="global")
                none = zero(tensor.dtype)
                return seq(
                    [
                        tirx.AllocBuffer(part),
                        _lanes(width, lambda v: tirx.BufferStore(part, none, [v])),
                        loop(
                            count,
                            lambda k: add_slice(inner.at({last: plus(first, k)}), part),
                            name=f"k{last}",
                        ),
                        _lanes(width, lambda v: _grow(buffer, v, tirx.BufferLoad(part, [v]))),
                    ]
                )

            return runs(self.extents[last], _RUN, some)

        return nest([(f"k{a}", self.extents[a]) for a in axes], along_last)


def _shift(at: Position, run: tuple[int, Expr] | None, lane: Expr) -> Position:
    return at if run is None else at.at({run[0]: plus(run[1], lane)})


def _grow(buffer: Any, lane: Expr, value: Expr) -> Stmt:
    return tirx.BufferStore(buffer, tirx.Add(tirx.BufferLoad(buffer, [lane]), value), [lane])


def _lanes(width: int, one: Any) -> Stmt:
    if width == 1:
        return one(i64(0))
    return loop(i64(width), one, name="lane", kind="vectorized")
