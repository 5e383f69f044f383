"""Code of its own for each range of lengths that a short row may have.

An open extent would cost a short row half as much again as its elements do: loops of one or two
rounds, each with its counter, and registers that wait for what may follow. So the length is looked
at once for all rows of a block, and where it is small the code is nearly as if it were known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from normgraph.compile.knobs import knobs
from normgraph.compile.tir import Expr, Stmt, constant, floordiv, i64, when


@dataclass(frozen=True)
class Length:
    """The elements of a row, of which there are `least` to `most` (None: any number)."""

    elements: Expr
    least: int = 0
    most: int | None = None

    @staticmethod
    def of(elements: Expr, most: int | None = None) -> Length:
        """A length of which no more is known than the expression says, and at most `most`."""
        known = constant(elements)
        return Length(elements, 0, most) if known is None else Length(elements, known, known)

    def whole(self, width: int) -> Expr:
        """How many times `width` elements there are."""
        if self.most is not None and self.least // width == self.most // width:
            return i64(self.least // width)
        return floordiv(self.elements, width)


def by_length(elements: Expr, most: int | None, lanes: int, code: Callable[[Length], Stmt]) -> Stmt:
    """`code` for rows of so many elements, once for each range of short lengths and for the rest.

    most: what `elements` does not exceed, or None. The first range ends in front of a vector; then
    one begins at every multiple of a vector of eight or more elements, in the longer half of those
    that have code at every second.
    """
    longest = knobs().exact_row
    if constant(elements) is not None or longest == 0:
        return code(Length.of(elements, most))
    step = max(lanes, 8)
    starts = [lanes, *range(step, longest // 2, step), *range(longest // 2, longest + 1, 2 * step)]
    return _chosen(elements, sorted({0, *starts}), None if most is None else most + 1, code)


def _chosen(
    elements: Expr, starts: list[int], end: int | None, code: Callable[[Length], Stmt]
) -> Stmt:
    if len(starts) == 1:
        return code(Length(elements, starts[0], None if end is None else end - 1))
    middle = len(starts) // 2
    below = _chosen(elements, starts[:middle], starts[middle], code)
    above = _chosen(elements, starts[middle:], end, code)
    return when(tirx.GE(elements, i64(starts[middle])), above, below)
