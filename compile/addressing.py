"""Where an element of a tensor lies: positions in loops to offsets in flat memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from normgraph.compile.tensor_program import Apply, Load, Node, Scalar, Tensor
from normgraph.compile.tir import Expr, constant, product, times, total


@dataclass(frozen=True)
class Position:
    """A point of the iteration space.

    `axes`: the index along single axes. `groups`: one index for several neighbouring axes at once,
    in row-major order (the slices, or the elements of a row), which costs no division for a tensor
    that has all of them.
    """

    axes: dict[int, Expr] = field(default_factory=dict)
    groups: tuple[tuple[tuple[int, ...], Expr], ...] = ()

    def at(self, axes: dict[int, Expr]) -> Position:
        """This position with indices along single axes set."""
        return Position({**self.axes, **axes}, self.groups)

    def along(self, group: tuple[int, ...], index: Expr) -> Position:
        """This position with one index for several neighbouring axes."""
        return Position(self.axes, (*self.groups, (group, index))) if group else self


def element_count(tensor: Tensor) -> Expr:
    """How many elements a tensor has."""
    return product(tensor.dims)


def offset(tensor: Tensor, position: Position, extents: tuple[Expr, ...]) -> Expr:
    """The flat row-major offset of the tensor's element at a position."""
    axes = tensor.axes
    terms: list[Expr] = []
    for axis, index in position.axes.items():
        if axis in axes:
            terms.append(times(index, _stride(tensor, axis)))
    for group, index in position.groups:
        mine = [axis for axis in group if axis in axes]
        if len(mine) == len(group):
            terms.append(times(index, _stride(tensor, group[-1])))
        else:
            terms.extend(_one_by_one(tensor, group, mine, index, extents))
    return total(terms)


def _one_by_one(
    tensor: Tensor,
    group: tuple[int, ...],
    mine: list[int],
    index: Expr,
    extents: tuple[Expr, ...],
) -> list[Expr]:
    terms: list[Expr] = []
    for axis in mine:
        inner = product([extents[a] for a in group if a > axis])
        own = index if constant(inner) == 1 else tirx.FloorDiv(index, inner)
        if axis != group[0]:
            own = tirx.FloorMod(own, extents[axis])
        terms.append(times(own, _stride(tensor, axis)))
    return terms


def _stride(tensor: Tensor, axis: int) -> Expr:
    return product(tensor.dims[axis + 1 :])


def evaluate(node: Node, read: Any) -> Expr:
    """The value as a TVM expression; `read(tensor)` gives the element at hand."""
    if isinstance(node, Load):
        return read(node.tensor)
    if isinstance(node, Scalar):
        return node.expr
    assert isinstance(node, Apply)
    return node.make(*(evaluate(arg, read) for arg in node.args))
