"""Reading and writing tensors inside of a slice: beside the loop, and along a row of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from normgraph.compile.addressing import Position, evaluate, offset
from normgraph.compile.affine import common_factor, multiplied_out
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.coefficients import dtype_of
from normgraph.compile.half_types import HALF_TYPES
from normgraph.compile.kernel_frame import Frame
from normgraph.compile.next_block import whole_inputs
from normgraph.compile.row_kernel import RowStore, RowSum
from normgraph.compile.slice_plan import Step
from normgraph.compile.staged_block import StagedBlock
from normgraph.compile.tensor_program import Apply, Load, Node, Scalar, Tensor, loads
from normgraph.compile.tir import Expr, Stmt, bind, i64, plus, seq, times

# At most so many row ranges have partial sums of their own: by the rows and not by the threads, so
# that those change no result.
ROW_RANGES = 16
# Rows that go side by side, their column sums in registers together.
ROWS_ABREAST = 4


@dataclass
class Block:
    """The slices one task does together: `count` from `start`, never more than `most`.

    `chunk` numbers the row range whose partial sums they add to. `longest`: the elements that none
    of them has more than in a row, where that is known.
    """

    start: Expr
    count: Expr
    most: int
    chunk: Expr | None = None
    longest: int | None = None


class SliceMemory:
    """What a task keeps of its slices (one element each), and the way to all other tensors.

    per_slice: what is computed for each slice. narrow: inputs with one element a slice, copied here
    once. most: slices there is room for.
    """

    def __init__(
        self, frame: Frame, per_slice: Iterable[Tensor], narrow: Iterable[Tensor], most: int
    ) -> None:
        self.frame = frame
        self.extents = frame.program.extents
        self.narrow = tuple(narrow)
        # "global" is the scope whose small buffers TVM keeps on the stack.
        self.locals: dict[Tensor, Any] = {
            t: tirx.decl_buffer((most,), t.dtype, t.name, scope="global")
            for t in (*per_slice, *self.narrow)
        }

    def allocate(self) -> list[Stmt]:
        """The buffers beside the loop."""
        return [tirx.AllocBuffer(buffer) for buffer in self.locals.values()]

    def copy_narrow(self, at: Position, c: Expr) -> Stmt:
        """Bring the narrow inputs' elements of slice `c` of the block, at `at`."""
        return seq(
            [
                tirx.BufferStore(
                    self.locals[t], self.frame.load(t, offset(t, at, self.extents)), [c]
                )
                for t in self.narrow
            ]
        )

    def read(self, tensor: Tensor, at: Position, c: Expr) -> Expr:
        """The tensor's element at a position, `c` slices into the block."""
        if tensor in self.locals:
            return tirx.BufferLoad(self.locals[tensor], [c])
        return self.frame.load(tensor, offset(tensor, at, self.extents))

    def settled(self, step: Step, at: Position, c: Expr) -> Expr:
        """The value of a step that is done, for an output.

        Of a half type it is made again, so that what an output is added to is rounded once.
        """
        if step.is_sum or step.op.out.dtype not in HALF_TYPES:
            return tirx.BufferLoad(self.locals[step.op.out], [c])
        return evaluate(step.value, lambda t: self.read(t, at, c))


class RowReader:
    """Makes the values and stores of one row for `row_kernel`.

    What is the same along the row is computed once in front of it, into `before`. `c` is the row's
    slice in the block; a row over the slices themselves begins at slice `start` instead. `ahead`:
    how many elements behind a row the one lies that is read in its place in the next block; 0 where
    that is not asked for. `staged`: where the block's elements of an output are made ready.
    """

    def __init__(
        self,
        memory: SliceMemory,
        at: Position,
        row_axes: tuple[int, ...],
        c: Expr | None,
        before: list[Stmt],
        start: Expr | None = None,
        ahead: Expr | None = None,
        staged: StagedBlock | None = None,
    ) -> None:
        self.memory = memory
        self.at = at
        self.row_axes = row_axes
        self.c = c
        self.before = before
        self.start = i64(0) if start is None else start
        self.ahead = ahead
        self.staged = staged
        self.fixed: dict[Tensor, Expr] = {}
        self.bases: dict[tuple[Any, ...], Expr] = {}

    def _varies(self, tensor: Tensor) -> bool:
        return bool(tensor.axes & frozenset(self.row_axes))

    def _changes(self, node: Node) -> bool:
        return any(self._varies(tensor) for tensor in loads(node))

    def _offset(self, tensor: Tensor, index: Expr) -> Expr:
        key = tuple(str(d) for d in tensor.dims)
        if key not in self.bases:
            at = self.at.along(self.row_axes, self.start)
            base = offset(tensor, at, self.memory.extents)
            self.bases[key] = bind("base", base, self.before)
        return plus(self.bases[key], index)

    def _element(self, tensor: Tensor, index: Expr) -> Expr:
        if tensor in self.memory.locals:
            return tirx.BufferLoad(self.memory.locals[tensor], [index])
        return self.memory.frame.load(tensor, self._offset(tensor, index))

    def value(self, step: Step) -> Callable[[Expr], Expr]:
        """A step's value as a function of the index in the row."""
        if self.c is None:
            return self._along_row(step.value)
        return self._along_row(multiplied_out(step.value, self._changes))

    def _along_row(self, value: Node) -> Callable[[Expr], Expr]:
        node = self._hoisted(value)
        for tensor in loads(node):
            if tensor not in self.memory.locals:
                self._offset(tensor, i64(0))  # named in front of the loop
        return lambda index: evaluate(node, lambda t: self._element(t, index))

    def _hoisted(self, node: Node) -> Node:
        """The value with whatever is the same along the row computed in front of it."""
        if not self._changes(node):
            return self._fixed(node)
        if isinstance(node, Apply):
            return Apply(node.make, tuple(self._hoisted(arg) for arg in node.args))
        return node

    def _parts_fixed(self, node: Node) -> Node:
        if isinstance(node, Apply):
            return Apply(node.make, tuple(self._fixed(arg) for arg in node.args))
        return node

    def _fixed(self, node: Node) -> Node:
        if isinstance(node, Scalar) or (isinstance(node, Load) and node.tensor in self.fixed):
            return node if isinstance(node, Scalar) else Scalar(self.fixed[node.tensor])
        if dtype_of(node) in HALF_TYPES:
            # No variable has a half type: it is read, or rounded, where it is used.
            return self._parts_fixed(node)
        expr = evaluate(node, lambda t: self.memory.read(t, self.at, self.c))
        value = bind("fixed", expr, self.before, str(expr.ty.dtype))
        if isinstance(node, Load):
            self.fixed[node.tensor] = value
        return Scalar(value)

    def output(self, step: Step, add: bool) -> RowStore:
        """Write, or add to, an output element."""
        tensor = step.op.out
        value = self.value(step)
        frame = self.memory.frame
        self._offset(tensor, i64(0))

        def place(index: Expr) -> Expr:
            return self._offset(tensor, index)

        if add:
            return RowStore(
                value,
                lambda index, value, new: frame.add_output(step, value, place(index), new),
                tensor.dtype,
                twice=tensor.dtype in ("float32", "float64"),
            )
        staged = self.staged
        if staged is not None:
            return RowStore(
                value, lambda index, value, new: staged.put(value, place(index)), tensor.dtype
            )
        inputs = [] if self.ahead is None else whole_inputs(frame.plan, step)
        return RowStore(
            value,
            lambda index, value, new: frame.write_output(step, value, place(index)),
            tensor.dtype,
            stream=lambda index: frame.load(tensor, place(index)),
            ahead=[self._ahead(t) for t in inputs],
            asks=None if self.ahead is None else tirx.NE(self.ahead, i64(0)),
        )

    def _ahead(self, tensor: Tensor) -> Callable[[Expr], Expr]:
        """The element of an input that is read in the next block for one of this row."""
        distance = self.ahead
        return lambda index: self.memory.frame.load(
            tensor, self._offset(tensor, plus(index, distance))
        )

    def row_sum(self, step: Step) -> RowSum:
        """The sum of the row, added to its slice's."""
        tensor = step.op.out
        factor, varying = common_factor(step.value, self._changes)
        value = self._along_row(varying)
        scale = None if factor is None else self._fixed(factor)
        dtype = tensor.dtype

        def scaled(total: Expr) -> Expr:
            if scale is None:
                return total
            return tirx.Mul(total, evaluate(scale, lambda t: self.memory.read(t, self.at, self.c)))

        if tensor in self.memory.locals:
            buffer = self.memory.locals[tensor]

            def into_local(total: Expr) -> Stmt:
                grown = tirx.Add(tirx.BufferLoad(buffer, [self.c]), scaled(total))
                return tirx.BufferStore(buffer, grown, [self.c])

            return RowSum(value, dtype, take=into_local)
        if step.op.reduce != frozenset(self.row_axes):
            raise NotCanonical(f"{tensor.name} needs several rows for one stored sum")
        place = offset(tensor, self.at, self.memory.extents)
        store = self.memory.frame.store
        return RowSum(value, dtype, take=lambda total: store(tensor, scaled(total), place))

    def lane_sums(self, step: Step, lanes: int, buffer: Any) -> RowSum:
        """The sum of the row, lane by lane added to the slice's `lanes` elements of `buffer`."""
        base = times(self.c, i64(lanes))

        def collect(lane: Expr, value: Expr) -> Stmt:
            place = [plus(base, lane)]
            return tirx.BufferStore(buffer, tirx.Add(tirx.BufferLoad(buffer, place), value), place)

        return RowSum(self.value(step), step.op.out.dtype, collect=collect)


def column_sum(readers: Sequence[RowReader], step: Step, partial: Any, start: Expr) -> RowStore:
    """Add several rows, element by element, to `partial` from `start` on."""
    values = [reader.value(step) for reader in readers]
    base = bind("partial", start, readers[0].before)

    def value(index: Expr) -> Expr:
        terms = [each(index) for each in values]
        while len(terms) > 1:
            pairs = [tirx.Add(*terms[k : k + 2]) for k in range(0, len(terms) - 1, 2)]
            terms = [*pairs, *terms[len(pairs) * 2 :]]
        return terms[0]

    return _growing(partial, value, lambda index: plus(base, index))


def _growing(buffer: Any, value: Callable[[Expr], Expr], place: Callable[[Expr], Expr]) -> RowStore:
    def store(index: Expr, value: Expr, new: Expr | None) -> Stmt:
        old = tirx.BufferLoad(buffer, [place(index)])
        grown = tirx.Add(old, value)
        if new is not None:
            grown = tirx.Select(new, grown, old)
        return tirx.BufferStore(buffer, grown, [place(index)])

    return RowStore(value, store, str(buffer.dtype))
