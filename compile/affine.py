"""Rewrites values so that a row does the fewest operations an element.

Along a row most operands are constant (a mean, a scale). A value that is linear in the others is
brought into the form `sum of coefficient * term + constant`, whose coefficients and constant are
computed once in front of the row: ((x - mean) - delta) * scale + beta takes one subtraction and one
fused multiply-add. The difference x - mean stays a term of its own, for there rounding cancels;
everything that is multiplied out lies behind it, so a result moves by a few units in the last
place of its summands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir.prim.expr import FloatImm

from normgraph.compile.tensor_program import Apply, Load, Node, Scalar, is_read, loads
from normgraph.compile.tir import Expr

Varies = Callable[[Node], bool]


@dataclass(frozen=True)
class _Sum:
    """`terms` (coefficient, None for 1, and what it multiplies) plus `constant`, None for 0."""

    terms: tuple[tuple[Node | None, Node], ...]
    constant: Node | None


def multiplied_out(value: Node, varies: Varies) -> Node:
    """`value` as a sum of products. `varies` says whether a node changes along the row.

    A value in which a product stands twice is left as it is: its terms may be meant to cancel
    (those of dx where each slice is one element do), which they do exactly only as written.
    """
    if isinstance(value, Apply) and varies(value):
        if _is_linear(value):
            parts = _expanded(value, varies)
            operands = [sorted(id(t) for t in loads(term)) for _, term in parts.terms]
            twice = any(each in operands[:k] for k, each in enumerate(operands))
            return value if twice else _written(parts)
        return Apply(value.make, tuple(multiplied_out(arg, varies) for arg in value.args))
    return value


def common_factor(value: Node, varies: Varies) -> tuple[Node | None, Node]:
    """`value` as (what does not vary, what does) where it is a product of the two."""
    if not (isinstance(value, Apply) and varies(value)):
        return None, value
    parts = _expanded(value, varies) if _is_linear(value) else None
    if parts is None or parts.constant is not None or len(parts.terms) != 1:
        return None, multiplied_out(value, varies)
    return parts.terms[0]


def _is_linear(value: Apply) -> bool:
    return value.make in (tirx.Add, tirx.Sub, tirx.Mul)


def _expanded(node: Node, varies: Varies) -> _Sum:
    if not varies(node):
        return _Sum((), node)
    if not isinstance(node, Apply) or not _is_linear(node):
        return _Sum(((None, multiplied_out(node, varies)),), None)
    left, right = node.args
    if node.make is tirx.Mul:
        return _product(left, right, varies)
    if is_read(left) and not varies(right):
        return _Sum(((None, node),), None)
    a, b = _expanded(left, varies), _expanded(right, varies)
    if node.make is tirx.Sub:
        b = _Sum(tuple(_negative(*each) for each in b.terms), _negated(b.constant))
    return _Sum((*a.terms, *b.terms), _plus(a.constant, b.constant))


def _product(left: Node, right: Node, varies: Varies) -> _Sum:
    if varies(left) and varies(right):
        pairs = [common_factor(side, varies) for side in (left, right)]
        known = [c for c, _ in pairs if c is not None]
        coefficient = _times(*known) if len(known) == 2 else (known[0] if known else None)
        return _Sum(((coefficient, _times(pairs[0][1], pairs[1][1])),), None)
    inner, factor = (left, right) if varies(left) else (right, left)
    parts = _expanded(inner, varies)
    scaled = tuple((factor if c is None else _times(c, factor), t) for c, t in parts.terms)
    constant = None if parts.constant is None else _times(parts.constant, factor)
    return _Sum(scaled, constant)


def _written(parts: _Sum) -> Node:
    """The sum as a chain of multiply-adds, the constant last.

    So dx of a slice of one element is zero exactly: dy scale and the constant, which is -dy scale,
    are both rounded.
    """
    factored = _shared_operand(parts)
    if factored is not None:
        return factored
    value: Node | None = None
    for coefficient, term in parts.terms:
        product = term if coefficient is None else _times(term, coefficient)
        value = product if value is None else Apply(tirx.Add, (value, product))
    whole = _plus(value, parts.constant)
    assert whole is not None
    return whole


def _shared_operand(parts: _Sum) -> Node | None:
    """a * (b * p) + q * a as a * (b * p + q)."""
    if len(parts.terms) != 2 or parts.constant is not None:
        return None
    (p, product), (q, single) = parts.terms
    if not (isinstance(product, Apply) and product.make is tirx.Mul and q is not None):
        return None
    for mine, other in (product.args, tuple(reversed(product.args))):
        if _same(mine, single):
            scaled = other if p is None else _times(other, p)
            return _times(mine, Apply(tirx.Add, (scaled, q)))
    return None


def _same(a: Node, b: Node) -> bool:
    if isinstance(a, Load) and isinstance(b, Load):
        return a.tensor is b.tensor
    if isinstance(a, Apply) and isinstance(b, Apply):
        one = len(a.args) == len(b.args) == 1 and a.make == b.make
        return a is b or (one and _same(a.args[0], b.args[0]))
    return False


def _times(a: Node, b: Node) -> Node:
    return _combined(tirx.Mul, (a, b))


def _plus(a: Node | None, b: Node | None) -> Node | None:
    if a is None or b is None:
        return b if a is None else a
    return _combined(tirx.Add, (a, b))


def _negative(coefficient: Node | None, term: Node) -> tuple[Node | None, Node]:
    if coefficient is None:
        return None, _negated_node(term)
    return _negated_node(coefficient), term


def _negated(node: Node | None) -> Node | None:
    return None if node is None else _negated_node(node)


def _negated_node(node: Node) -> Node:
    return _combined(_negation, (node,))


def _negation(value: Expr) -> Expr:
    return tirx.Mul(value, FloatImm(str(value.ty.dtype), -1.0))


def _combined(make: Callable[..., object], args: Sequence[Node]) -> Node:
    if all(isinstance(arg, Scalar) for arg in args):
        return Scalar(make(*(arg.expr for arg in args if isinstance(arg, Scalar))))
    return Apply(make, tuple(args))
