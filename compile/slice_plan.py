"""Orders a tensor program into passes over independent slices.

A *slice* is what one set of statistics is taken over: a row of layer norm, an (n, c) plane of
instance norm, a channel of batch norm. The plan says which axes number the slices, what one slice
does pass by pass (each pass reads the slice's data once), and what is left to do when all slices
are through. It holds no loops and no target: the schedule rule turns it into those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from normgraph.compile.blocks import NotCanonical
from normgraph.compile.knobs import knobs
from normgraph.compile.normal_form import normal_form, users_of
from normgraph.compile.row_lengths import Length
from normgraph.compile.tensor_program import (
    ONE,
    Apply,
    Load,
    Node,
    Operation,
    Tensor,
    TensorProgram,
    loads,
)
from normgraph.compile.tir import constant, i64, product, times


@dataclass(frozen=True)
class Sample:
    """The part of a slice: the first elements of each row, or, read in columns, `rows` rows.

    of_row: how many, by the length of the row.
    """

    of_row: Callable[[Length], Length]
    rows: Any


@dataclass(eq=False)
class Step:
    """One operation of a pass, with its value written over tensors that exist at that point.

    needs: the outputs that depend on it. sample: where it takes only a part of each slice.
    """

    op: Operation
    value: Node
    needs: frozenset[int]
    sample: Sample | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it reduces."""
        return bool(self.op.reduce)


@dataclass
class Pass:
    """What one traversal of the slice computes, and the per-slice values that follow from it."""

    wide: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)


@dataclass
class SlicePlan:
    """`slice_axes` number the slices; `lead_axes` lie before them in memory (batch norm's n).

    per_slice: tensors with one element a slice, kept beside the loop.
    stored: tensors that other slices' results are combined from, kept in a workspace.
    column_sums: sums across slices of whole-size values (layer norm's dgamma), as partial sums.
    finish: outputs computed when every slice is done.
    streamed_from: the elements from which on outputs are stored past the caches, where they are.
    """

    program: TensorProgram
    wide_axes: tuple[int, ...]
    slice_axes: tuple[int, ...]
    lead_axes: tuple[int, ...]
    passes: list[Pass]
    per_slice: dict[Tensor, None]
    stored: list[Tensor]
    column_sums: list[Step]
    finish: list[Step]
    finish_sums: dict[Tensor, Step]
    streamed_from: int | None = None

    @property
    def inner_axes(self) -> tuple[int, ...]:
        """The axes behind the slices' own, along which one row lies."""
        outside = (*self.slice_axes, *self.lead_axes)
        return tuple(a for a in self.wide_axes if a not in outside)

    @property
    def rows(self) -> Any:
        """How many rows a slice has: the product of the axes before its own."""
        return product([self.program.extents[a] for a in self.lead_axes])

    @property
    def row_length(self) -> Any:
        """How many elements lie together behind the slices' axes."""
        return product([self.program.extents[a] for a in self.inner_axes])

    @property
    def whole_inputs(self) -> list[Tensor]:
        """The inputs that range over all axes."""
        every = frozenset(self.wide_axes)
        return [t for t in self.program.inputs if t.axes == every]

    @property
    def in_columns(self) -> Any:
        """Whether slices are read as columns, for rows too short to be read one by one.

        A condition on the extents, or True or False where it is certain.
        """
        if not self.lead_axes or self.stored or self.column_sums:
            return False
        length, rows = self.row_length, self.rows
        most = knobs().short_row
        known = constant(length)
        if known is not None and (known == 1 or known > most):
            return known == 1
        share: Any = i64(knobs().short_row_share)
        if self.streamed_from is not None:
            elements = product([self.program.extents[a] for a in self.wide_axes])
            streamed, size = i64(knobs().short_streamed_share), constant(elements)
            if size is None:
                share = tirx.Select(tirx.GE(elements, i64(self.streamed_from)), streamed, share)
            elif size >= self.streamed_from:
                share = streamed
        squares = constant(length), constant(rows), constant(share)
        if None not in squares:
            return squares[0] ** 2 <= squares[2] * squares[1]  # type: ignore[operator]
        short = tirx.LE(times(length, length), times(share, rows))
        return tirx.And(tirx.LE(length, i64(most)), short)

    def slice_value(self, name: str, dtype: str) -> Tensor:
        """A new tensor with one element a slice."""
        dims = tuple(
            extent if axis in self.slice_axes else ONE
            for axis, extent in enumerate(self.program.extents)
        )
        tensor = Tensor(name, dtype, dims)
        self.per_slice[tensor] = None
        return tensor


def plan(program: TensorProgram) -> SlicePlan:
    """Order `program` into passes. Raises NotCanonical where it does not fall into slices."""
    return _Planner(program).plan()


class _Planner:
    def __init__(self, program: TensorProgram) -> None:
        self.program = program
        self.ops = normal_form(program)
        self.every_axis = frozenset(i for t in self._all_tensors() for i in t.axes)
        self._label()

    def _all_tensors(self) -> Iterator[Tensor]:
        yield from self.program.inputs
        yield from self.ops

    def _label(self) -> None:
        """`needs`: the outputs behind each tensor. `wide`: values that range over all axes."""
        self.needs: dict[Tensor, set[int]] = defaultdict(set)
        for tensor in self.program.outputs:
            if tensor.output_index is not None:
                self.needs[tensor].add(tensor.output_index)
        for op in reversed(list(self.ops.values())):
            for tensor in set(loads(op.value)):
                self.needs[tensor] |= self.needs[op.out]
        self.wide_tensors = {t for t in self._all_tensors() if t.axes == self.every_axis}

    def _is_wide_sum(self, op: Operation) -> bool:
        return bool(op.reduce) and any(t in self.wide_tensors for t in loads(op.value))

    def _is_wide_output(self, op: Operation) -> bool:
        wide = op.out in self.wide_tensors and not op.reduce
        return wide and op.out.output_index is not None

    # Slices.

    def plan(self) -> SlicePlan:
        wide_axes = tuple(sorted(self.every_axis))
        slice_axes = self._slice_axes()
        first = min(slice_axes, default=0)
        span = [a for a in wide_axes if slice_axes and first <= a <= max(slice_axes)]
        if set(span) != set(slice_axes):
            raise NotCanonical(f"slice axes {sorted(slice_axes)} are not next to each other")
        lead = tuple(a for a in wide_axes if slice_axes and a < first)
        self.slice_axes = slice_axes
        self._split_sums_across_slices()
        self._find_across()
        self._find_late()
        passes = self._passes()
        finish, finish_sums = self._finish()
        stored = [t for t in self.ops if t in self.stored]
        return SlicePlan(
            program=self.program,
            wide_axes=wide_axes,
            slice_axes=tuple(sorted(slice_axes)),
            lead_axes=lead,
            passes=passes,
            per_slice=self.per_slice,
            stored=stored,
            column_sums=[s for p in passes for s in p.wide if s.op.out in self.columns],
            finish=finish,
            finish_sums=finish_sums,
        )

    def _slice_axes(self) -> frozenset[int]:
        """The axes every statistic keeps that an element-wide value depends on."""
        feeding: set[Tensor] = set()
        for op in self.ops.values():
            if self._is_wide_output(op) or self._is_wide_sum(op):
                feeding |= set(self._sums_behind(op.value))
        if not feeding:
            feeding = {op.out for op in self.ops.values() if self._is_wide_sum(op)}
        if feeding:
            return frozenset.intersection(*(t.axes for t in feeding))
        varying: set[int] = set()
        for op in self.ops.values():
            for tensor in loads(op.value):
                if tensor not in self.wide_tensors:
                    varying |= tensor.axes
        ordered = sorted(self.every_axis)
        if not ordered:
            return frozenset()  # one element of each tensor
        if varying == {ordered[-1]} and len(ordered) > 1:
            return frozenset(varying)  # columns of a matrix
        cut = max((ordered.index(a) + 1 for a in varying), default=len(ordered) - 1)
        return frozenset(ordered[: min(cut, len(ordered) - 1)])

    def _sums_behind(self, value: Node) -> Iterator[Tensor]:
        seen: set[Tensor] = set()
        stack = list(loads(value))
        while stack:
            tensor = stack.pop()
            if tensor in seen or tensor not in self.ops:
                continue
            seen.add(tensor)
            op = self.ops[tensor]
            if op.reduce:
                yield tensor
            stack.extend(loads(op.value))

    def _split_sums_across_slices(self) -> None:
        """Sum within the slice first, across slices after."""
        for op in list(self.ops.values()):
            inside = op.reduce - self.slice_axes
            if not (op.reduce & self.slice_axes and inside and self._is_wide_sum(op)):
                continue
            dims = tuple(
                extent if axis in op.out.axes | (op.reduce & self.slice_axes) else ONE
                for axis, extent in enumerate(self.program.extents)
            )
            part = Tensor(f"{op.out.name}_part", op.out.dtype, dims)
            self.needs[part] = set(self.needs[op.out])
            rebuilt: dict[Tensor, Operation] = {}
            for tensor, other in self.ops.items():
                if other is op:
                    rebuilt[part] = Operation(part, op.value, inside)
                    rebuilt[tensor] = Operation(op.out, Load(part), op.reduce & self.slice_axes)
                else:
                    rebuilt[tensor] = other
            self.ops = rebuilt

    def _find_across(self) -> None:
        """`across`: what depends on more than one slice. `columns`: whole-size sums among it."""
        self.across: set[Tensor] = set()
        self.columns: set[Tensor] = set()
        for op in self.ops.values():
            crosses = bool(op.reduce & self.slice_axes)
            if crosses and self._is_wide_sum(op):
                self.columns.add(op.out)
            if crosses or any(t in self.across for t in loads(op.value)):
                self.across.add(op.out)

    def _find_late(self) -> None:
        """What several slices share and only what is across them reads: written into that.

        Kept as a slice's own, each of those slices would store it to the same place.
        """
        self.late: set[Tensor] = set()
        users = users_of(self.ops.values())
        for op in reversed(list(self.ops.values())):
            shared = bool(op.out.axes) and op.out.axes < self.slice_axes and not op.reduce
            if not shared or op.out.output_index is not None or op.out in self.across:
                continue
            if all(user.out in self.across | self.late for user in users[op.out]):
                self.late.add(op.out)

    def _passes(self) -> list[Pass]:
        over = self.across | self.late
        slice_ops = [op for op in self.ops.values() if op.out not in over]
        self.per_slice: dict[Tensor, None] = {
            op.out: None
            for op in slice_ops
            if op.out.axes <= self.slice_axes and op.out not in self.wide_tensors
        }
        self.stored: set[Tensor] = {
            op.out for op in slice_ops if op.reduce and op.out not in self.per_slice
        }
        self._store_for_finish()
        ready: dict[Tensor, int] = dict.fromkeys(self.program.inputs, -1)
        passes: dict[int, Pass] = defaultdict(Pass)
        columns: list[Step] = []
        for op in self.ops.values():
            column = op.out in self.columns
            if op.out in over and not column:
                continue
            value = self._inlined(op.value)
            known = max((ready[t] for t in loads(value)), default=-1)
            step = Step(op, value, frozenset(self.needs[op.out]))
            if column:
                ready[op.out] = known + 1
                columns.append(step)
            elif self._is_wide_sum(op) or self._is_wide_output(op):
                ready[op.out] = known + 1
                passes[known + 1].wide.append(step)
            elif op.out in self.per_slice or op.out in self.stored:
                ready[op.out] = known
                passes[known].after.append(step)
            # Everything else is written into the values that use it.
        first = passes.pop(-1, Pass())
        count = max(passes, default=-1) + 1
        count = max(count, *(ready[step.op.out] + 1 for step in columns), 0)
        ordered = [passes[i] for i in range(count)]
        if columns:
            # With the outputs, where the rows of a block go side by side.
            ordered[-1].wide.extend(columns)
        return [first, *ordered]

    def _store_for_finish(self) -> None:
        """Slice results that the finish combines have to outlive their slice."""
        for op in self.ops.values():
            combines = op.out in self.across and op.out not in self.columns
            if not combines and not self._left_over(op):
                continue
            for tensor in loads(self._inlined(op.value)):
                if tensor in self.ops and tensor not in self.across:
                    self.stored.add(tensor)

    def _inlined(self, value: Node) -> Node:
        """`value` with every tensor that is held nowhere replaced by its own value."""
        if isinstance(value, Load):
            op = self.ops.get(value.tensor)
            if op is None or value.tensor in self.per_slice or value.tensor in self.stored:
                return value
            if op.reduce:
                return value
            return self._inlined(op.value)
        if isinstance(value, Apply):
            return Apply(value.make, tuple(self._inlined(a) for a in value.args))
        return value

    def _finish(self) -> tuple[list[Step], dict[Tensor, Step]]:
        finish: list[Step] = []
        sums: dict[Tensor, Step] = {}
        for op in self.ops.values():
            if op.out not in self.across and not self._left_over(op):
                continue
            if op.out in self.stored:
                op = Operation(op.out, Load(op.out))
            value = self._inlined(op.value)
            step = Step(op, value, frozenset(self.needs[op.out]))
            if op.reduce:
                if any(t in self.across for t in loads(value)):
                    raise NotCanonical(f"{op.out.name} is a sum of sums across slices")
                sums[op.out] = step
            if op.out.output_index is not None:
                finish.append(step)
        return finish, sums

    def _left_over(self, op: Operation) -> bool:
        """A narrow output that is neither a value of one slice nor a combination of slices."""
        if op.out.output_index is None or op.out in self.across or op.out in self.per_slice:
            return False
        return not self._is_wide_output(op)


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors in first-seen order, each once."""
    return list(dict.fromkeys(tensors))
