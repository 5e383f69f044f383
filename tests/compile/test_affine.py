"""Values multiplied out: fewer operations an element, the same number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from tvm import tirx

from normgraph.compile.affine import common_factor, multiplied_out
from normgraph.compile.tensor_program import ONE, Apply, Cast, Load, Node, Scalar, Tensor, loads
from normgraph.compile.tir import i64

WIDE = (ONE, i64(8))
NARROW = (ONE, ONE)
X, DY, GAMMA = (Load(Tensor(name, "float32", WIDE)) for name in ("x", "dy", "gamma"))
MEAN, DELTA, SCALE, BETA = (
    Load(Tensor(name, "float32", NARROW)) for name in ("mean", "delta", "scale", "beta")
)
NUMPY: dict[object, Callable[..., float]] = {
    tirx.Add: lambda a, b: a + b,
    tirx.Sub: lambda a, b: a - b,
    tirx.Mul: lambda a, b: a * b,
}


def add(a: Node, b: Node) -> Node:
    return Apply(tirx.Add, (a, b))


def sub(a: Node, b: Node) -> Node:
    return Apply(tirx.Sub, (a, b))


def mul(a: Node, b: Node) -> Node:
    return Apply(tirx.Mul, (a, b))


def varies(node: Node) -> bool:
    return any(tensor.dims is WIDE for tensor in loads(node))


def value(node: Node, given: Mapping[str, float]) -> float:
    """The value in float64."""
    if isinstance(node, Load):
        return given[node.tensor.name]
    if isinstance(node, Scalar):
        return float(node.expr.value)
    args = [value(arg, given) for arg in node.args]
    if len(args) == 1:
        return args[0] if isinstance(node.make, Cast) else -args[0]
    return NUMPY[node.make](*args)


def operations(node: Node) -> int:
    """Operations that are left in the row: those on what varies."""
    if not isinstance(node, Apply) or not varies(node):
        return 0
    return 1 + sum(operations(arg) for arg in node.args)


CASES: dict[str, tuple[Node, int]] = {
    # ((x - mean) - delta) scale + beta: one subtraction, one multiply-add
    "y": (add(mul(sub(sub(X, MEAN), DELTA), SCALE), BETA), 3),
    # ((x - mean) - delta) scale gamma + beta with gamma along the row
    "y of a layer": (add(mul(mul(sub(sub(X, MEAN), DELTA), SCALE), GAMMA), BETA), 5),
    "dx": (add(add(mul(DY, SCALE), mul(sub(X, MEAN), DELTA)), BETA), 6),
    # (dy (x - mean) - dy delta) scale: dy ((x - mean) scale - delta scale)
    "dgamma of a layer": (mul(sub(mul(DY, sub(X, MEAN)), mul(DY, DELTA)), SCALE), 4),
    "a difference of two": (sub(mul(X, SCALE), mul(DY, BETA)), 3),
    "a difference of what varies": (sub(X, DY), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_value_stays_and_the_row_does_no_more_than_needed(name: str) -> None:
    node, most = CASES[name]
    made = multiplied_out(node, varies)
    assert operations(made) <= most
    random = np.random.default_rng(0)
    for _ in range(20):
        names = ("x", "dy", "gamma", "mean", "delta", "scale", "beta")
        given = dict(zip(names, random.standard_normal(7), strict=True))
        assert value(made, given) == pytest.approx(value(node, given), rel=1e-12, abs=1e-12)


def _subtractions(node: Node) -> list[tuple[Node, ...]]:
    if not isinstance(node, Apply):
        return []
    mine = [node.args] if node.make is tirx.Sub else []
    return mine + [each for arg in node.args for each in _subtractions(arg)]


def test_x_minus_mean_is_never_multiplied_out() -> None:
    """Rounding cancels in x - mean; x scale - mean scale loses it at large means."""
    for name in ("y", "y of a layer", "dx", "dgamma of a layer"):
        made = multiplied_out(CASES[name][0], varies)
        assert (X, MEAN) in _subtractions(made), name


def test_equal_products_stay_as_written() -> None:
    """dy s t - t dy s is zero as written, and not after one of the two became a multiply-add."""
    node = sub(mul(mul(DY, SCALE), X), mul(X, mul(DY, BETA)))
    assert multiplied_out(node, varies) is node


def test_a_cast_read_counts_as_read() -> None:
    x = Apply(Cast("float32"), (X,))
    made = multiplied_out(add(mul(sub(sub(x, MEAN), DELTA), SCALE), BETA), varies)
    assert (x, MEAN) in _subtractions(made)


def test_a_factor_of_the_whole_row_is_found() -> None:
    factor, rest = common_factor(mul(DY, mul(GAMMA, SCALE)), varies)
    assert factor is SCALE
    assert [tensor.name for tensor in loads(rest)] == ["dy", "gamma"]
    factor, rest = common_factor(mul(DY, sub(X, MEAN)), varies)
    assert factor is None
    assert operations(rest) == 2
    assert common_factor(X, varies) == (None, X)
