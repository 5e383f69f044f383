"""The values with one element a slice: every thread of a team computes them for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tvm import tirx

from normgraph.compile.addressing import offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_kernel import (
    as_i64,
    butterfly,
    cleared,
    counted,
    get,
    grow,
    named_index,
    put,
    quotient,
    registers,
)
from normgraph.compile.cuda_tile import Tile
from normgraph.compile.slice_plan import SlicePlan, Step, distinct
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import Expr, Stmt, seq

# How the value of a tensor with one element a row comes: statements first, then the expression.
RowValue = Callable[[Tensor, Expr, list[Stmt]], Expr]


def narrow_inputs(plan: SlicePlan) -> list[Tensor]:
    """The inputs with one element a slice."""
    slices, wide = frozenset(plan.slice_axes), frozenset(plan.wide_axes)
    return [t for t in plan.program.inputs if t.axes <= slices and t.axes != wide]


def is_row_sum(plan: SlicePlan, step: Step) -> bool:
    """Whether a step's sums are one a row of each slice."""
    return step.is_sum and step.op.out in plan.stored and step.op.out not in plan.per_slice


class Settler:
    """Computes per-slice values into `tile.values` and stores those that are wanted.

    lane, width: this thread among those that share loops over rows (int32, at most a warp).
    """

    def __init__(self, tile: Tile, lane: Expr, width: Expr, row_value: RowValue) -> None:
        self.tile = tile
        self.frame = tile.frame
        self.plan = tile.plan
        self.lane = lane
        self.width = width
        self.row_value = row_value

    def read_inputs(self, stmts: list[Stmt]) -> None:
        """Bring the inputs with one element a slice."""
        for tensor in narrow_inputs(self.plan):
            buffer = registers(1, tensor.dtype, f"{tensor.name}_value")
            value = self.frame.element(tensor, self.tile.position())
            stmts += [tirx.AllocBuffer(buffer), put(buffer, value)]
            self.tile.values[tensor] = get(buffer)

    def take(self, tensor: Tensor, value: Expr, stmts: list[Stmt]) -> None:
        """Name a per-slice value."""
        if tensor.dtype in ("float32", "float64"):
            named = tirx.Var(tensor.name, tensor.dtype)
            stmts.append(tirx.Bind(named, value))
            value = named
        self.tile.values[tensor] = value

    def settle(self, steps: Iterable[Step], stmts: list[Stmt]) -> None:
        """Compute the values of steps in order."""
        for step in steps:
            tensor = step.op.out
            if tensor not in self.plan.per_slice:
                raise NotCanonical(f"{tensor.name} is neither a slice's value nor a sum of a pass")
            if step.is_sum:
                self._add_rows(step, stmts)
            else:
                value = self.tile.value(step.value, lambda t: self.tile.values[t])
                self.take(tensor, value, stmts)

    def _add_rows(self, step: Step, stmts: list[Stmt]) -> None:
        if not step.op.reduce <= self.tile.row_axes:
            raise NotCanonical(f"{step.op.out.name} adds up more than rows")
        total = registers(1, step.op.out.dtype, f"{step.op.out.name}_rows")
        stmts.append(cleared(total))

        def row(index: Expr, inner: list[Stmt]) -> None:
            fixed: dict[Tensor, Expr] = {}
            for tensor in distinct(loads(step.value)):
                if tensor not in self.tile.values:
                    fixed[tensor] = self._of_row(tensor, index, inner)
            value = self.tile.value(
                step.value, lambda t: fixed[t] if t in fixed else self.tile.values[t]
            )
            inner.append(grow(total, value))

        stmts += [self.each_row(row), butterfly([total], self.width)]
        self.take(step.op.out, get(total), stmts)

    def _of_row(self, tensor: Tensor, row: Expr, stmts: list[Stmt]) -> Expr:
        if tensor in self.plan.stored:
            return self.row_value(tensor, row, stmts)
        return self.frame.element(tensor, self.tile.position(as_i64(row)))

    def each_row(self, body: Callable[[Expr, list[Stmt]], None]) -> Stmt:
        """`body(row, statements)` for this thread's share of the slice's rows."""
        rows = tirx.Cast("int32", self.tile.geometry.rows)
        count = quotient(rows - self.lane + self.width - 1, self.width)

        def one(k: Expr) -> Stmt:
            stmts: list[Stmt] = []
            index = named_index("r", self.lane + k * self.width, stmts)
            body(index, stmts)
            return seq(stmts)

        return counted(count, one, "share")

    def keep(self, tensors: Sequence[Tensor]) -> list[Stmt]:
        """Store per-slice values where they are outputs or read by later kernels."""
        stmts: list[Stmt] = []
        here = self.tile.position()
        for tensor in tensors:
            if tensor not in self.tile.values:
                continue
            value = self.tile.values[tensor]
            if tensor in self.frame.stored:
                stmts.append(self.store(tensor, value))
            if tensor.output_index is not None:
                stmts.append(self.frame.put_output(tensor, value, here))
        return stmts

    def store(self, tensor: Tensor, value: Expr, row: Expr | None = None) -> Stmt:
        """Put a value of the slice, or of a row of it, into the workspace."""
        at = self.tile.position(None if row is None else as_i64(row))
        return self.frame.store(tensor, value, offset(tensor, at, self.frame.program.extents))
