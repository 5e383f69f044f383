"""Reading and writing tensors inside of a slice: beside the loop, and along a row of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, element_count, evaluate, offset
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.slice_plan import Step
from normgraph.compile.tensor_program import Apply, Load, Node, Scalar, Tensor, loads
from normgraph.compile.tir import Expr, Stmt, bind, i64, keep, plus, times


@dataclass
class Block:
    """The slices one task does: `count` from `start`, never more than `most`.

    `chunk` numbers the row range whose partial sums they add to.
    """

    start: Expr
    count: Expr
    most: int
    chunk: Expr | None = None


class SliceMemory:
    """What a task keeps of its slices (one element each), and the way to all other tensors."""

    def __init__(self, frame: Frame, per_slice: Iterable[Tensor], block: Block) -> None:
        self.frame = frame
        self.block = block
        self.extents = frame.program.extents
        # "global" is the scope whose small buffers TVM keeps on the stack.
        self.locals: dict[Tensor, Any] = {
            t: tirx.decl_buffer((block.most,), t.dtype, t.name, scope="global") for t in per_slice
        }

    def allocate(self) -> list[Stmt]:
        """The buffers beside the loop."""
        return [tirx.AllocBuffer(buffer) for buffer in self.locals.values()]

    def read(self, tensor: Tensor, at: Position, c: Expr) -> Expr:
        """The tensor's element at a position, `c` slices into the block."""
        if tensor in self.locals:
            return tirx.BufferLoad(self.locals[tensor], [c])
        return self.frame.load(tensor, offset(tensor, at, self.extents))


class RowReader:
    """Makes the values and stores of one row for `row_kernel`.

    What is the same along the row is computed once in front of it, into `before`; `across` says
    that the row runs over the slices of the block and not within one.
    """

    def __init__(
        self,
        memory: SliceMemory,
        at: Position,
        row_axes: tuple[int, ...],
        c: Expr | None,
        before: list[Stmt],
        *,
        across: bool,
    ) -> None:
        self.memory = memory
        self.at = at
        self.row_axes = row_axes
        self.across = across
        self.c = c
        self.before = before
        self.fixed: dict[Tensor, Expr] = {}
        self.bases: dict[tuple[Any, ...], Expr] = {}

    def _varies(self, tensor: Tensor) -> bool:
        return bool(tensor.axes & frozenset(self.row_axes))

    def _offset(self, tensor: Tensor, index: Expr) -> Expr:
        key = tuple(str(d) for d in tensor.dims)
        if key not in self.bases:
            start = self.memory.block.start if self.across else i64(0)
            at = self.at.along(self.row_axes, start)
            base = offset(tensor, at, self.memory.extents)
            self.bases[key] = bind("base", base, self.before)
        return plus(self.bases[key], index)

    def _element(self, tensor: Tensor, index: Expr) -> Expr:
        if tensor in self.memory.locals:
            return tirx.BufferLoad(self.memory.locals[tensor], [index])
        return self.memory.frame.load(tensor, self._offset(tensor, index))

    def value(self, step: Step) -> Callable[[Expr], Expr]:
        """A step's value as a function of the index in the row."""
        node = self._hoisted(step.value)
        for tensor in loads(node):
            if tensor not in self.memory.locals:
                self._offset(tensor, i64(0))  # named in front of the loop
        return lambda index: evaluate(node, lambda t: self._element(t, index))

    def _hoisted(self, node: Node) -> Node:
        """The value with whatever is the same along the row computed in front of it."""
        if not any(self._varies(tensor) for tensor in loads(node)):
            return self._fixed(node)
        if isinstance(node, Apply):
            return Apply(node.make, tuple(self._hoisted(arg) for arg in node.args))
        return node

    def _fixed(self, node: Node) -> Node:
        if isinstance(node, Scalar) or (isinstance(node, Load) and node.tensor in self.fixed):
            return node if isinstance(node, Scalar) else Scalar(self.fixed[node.tensor])
        bfloat16 = any(t.dtype == "bfloat16" for t in loads(node))
        if isinstance(node, Load) and bfloat16:
            return node
        expr = evaluate(node, lambda t: self.memory.read(t, self.at, self.c))
        if bfloat16:
            # BF16ComputeLegalize does not look into a Bind, so the value is kept in memory.
            value = keep("fixed", expr, self.before)
        else:
            value = bind("fixed", expr, self.before, str(expr.ty.dtype))
        if isinstance(node, Load):
            self.fixed[node.tensor] = value
        return Scalar(value)

    def output(self, step: Step, add: bool) -> Callable[[Expr], Stmt]:
        """Write, or add to, an output element."""
        tensor = step.op.out
        value = self.value(step)
        self._offset(tensor, i64(0))
        put = self.memory.frame.add_output if add else self.memory.frame.write_output
        return lambda index: put(step, value(index), self._offset(tensor, index))

    def elementwise_sum(self, step: Step) -> Callable[[Expr], Stmt]:
        """Add to a sum that has an element of its own for each element of the row."""
        tensor = step.op.out
        value = self.value(step)
        if tensor in self.memory.locals:
            buffer = self.memory.locals[tensor]

            def into_local(index: Expr) -> Stmt:
                grown = tirx.Add(tirx.BufferLoad(buffer, [index]), value(index))
                return tirx.BufferStore(buffer, grown, [index])

            return into_local
        buffer = self.memory.frame.partials[tensor]
        size = element_count(tensor)
        chunk = self.memory.block.chunk
        assert chunk is not None
        at = self.at.along(self.row_axes, i64(0))
        first = plus(times(chunk, size), offset(tensor, at, self.memory.extents))
        base = bind("partial", first, self.before)

        def into_partial(index: Expr) -> Stmt:
            place = [plus(base, index)]
            grown = tirx.Add(tirx.BufferLoad(buffer, place), value(index))
            return tirx.BufferStore(buffer, grown, place)

        return into_partial

    def total(self, step: Step) -> Callable[[Expr], Stmt]:
        """Take the sum of the row."""
        tensor = step.op.out
        if tensor in self.memory.locals:
            buffer = self.memory.locals[tensor]
            place = [self.c]

            def into_local(total: Expr) -> Stmt:
                return tirx.BufferStore(
                    buffer, tirx.Add(tirx.BufferLoad(buffer, place), total), place
                )

            return into_local
        if step.op.reduce != frozenset(self.row_axes):
            raise NotCanonical(f"{tensor.name} needs several rows for one stored sum")
        place_in = offset(tensor, self.at, self.memory.extents)
        return lambda total: self.memory.frame.store(tensor, total, place_in)
