"""Short constructors for the TIR statements the schedule rules write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.ir.expr import StringImm
from tvm.ir.prim.expr import FloatImm, IntImm

from normgraph.compile.half_types import HALF_TYPES, narrow, widen

Expr = Any
Stmt = Any


def i64(value: int) -> Expr:
    """An int64 constant."""
    return IntImm("int64", value)


def zero(dtype: str) -> Expr:
    """Zero of a floating-point type."""
    return FloatImm(dtype, 0.0)


def constant(expr: Expr) -> int | None:
    """The value of an integer constant, else None."""
    return int(expr.value) if isinstance(expr, IntImm) else None


def times(a: Expr, b: Expr) -> Expr:
    """a * b for sizes, folded where one is a constant."""
    x, y = constant(a), constant(b)
    if x is not None and y is not None:
        return i64(x * y)
    if x == 1:
        return b
    if y == 1:
        return a
    return tirx.Mul(a, b)


def plus(a: Expr, b: Expr) -> Expr:
    """a + b for sizes, folded where both are constants."""
    x, y = constant(a), constant(b)
    if x is not None and y is not None:
        return i64(x + y)
    if x == 0:
        return b
    if y == 0:
        return a
    return tirx.Add(a, b)


def product(factors: Sequence[Expr]) -> Expr:
    """The product of sizes."""
    return reduce(times, factors, i64(1))


def floordiv(a: Expr, b: int) -> Expr:
    """a // b for sizes."""
    value = constant(a)
    return i64(value // b) if value is not None else tirx.FloorDiv(a, i64(b))


def quotient(a: Expr, b: Expr) -> Expr:
    """a // b for sizes of which TVM need not see that they are not negative.

    Where it does not, its FloorDiv takes several instructions, or fails to compile.
    """
    return tirx.Div(a, b)


def modulo(a: Expr, b: int) -> Expr:
    """a % b for a power of two, as a mask, from which LLVM sees how short a loop is."""
    value = constant(a)
    return i64(value % b) if value is not None else tirx.BitwiseAnd(a, i64(b - 1))


def least(a: Expr, b: Expr) -> Expr:
    """min(a, b) for sizes."""
    x, y = constant(a), constant(b)
    return i64(min(x, y)) if x is not None and y is not None else tirx.Min(a, b)


def largest(a: Expr, b: Expr) -> Expr:
    """max(a, b) for sizes."""
    x, y = constant(a), constant(b)
    return i64(max(x, y)) if x is not None and y is not None else tirx.Max(a, b)


def total(terms: Sequence[Expr]) -> Expr:
    """The sum of sizes."""
    return reduce(plus, terms, i64(0))


def seq(stmts: Sequence[Stmt | None]) -> Stmt:
    """A sequence, flattened by one level; None entries are left out."""
    flat: list[Stmt] = []
    for stmt in stmts:
        if stmt is None:
            continue
        flat.extend(stmt.seq if isinstance(stmt, tirx.SeqStmt) else [stmt])
    if not flat:
        return tirx.Evaluate(IntImm("int32", 0))
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def loop(
    extent: Expr,
    body: Callable[[Expr], Stmt],
    *,
    name: str,
    kind: str = "serial",
    start: Expr | None = None,
) -> Stmt:
    """`for name in range(start, start + extent)`; a serial loop of one is just its body."""
    if kind in ("serial", "parallel") and constant(extent) == 1:
        return body(i64(0) if start is None else start)
    kinds = {
        "serial": tirx.ForKind.SERIAL,
        "parallel": tirx.ForKind.PARALLEL,
        "vectorized": tirx.ForKind.VECTORIZED,
    }
    var = tirx.Var(name, "int64")
    return tirx.For(var, i64(0) if start is None else start, extent, kinds[kind], body(var))


def vector_loop(width: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """`body` for `width` lanes at once."""
    if width == 1:
        return body(i64(0))
    return loop(i64(width), body, name="lane", kind="vectorized")


def nest(
    axes: Sequence[tuple[str, Expr]],
    body: Callable[[list[Expr]], Stmt],
    done: tuple[Expr, ...] = (),
) -> Stmt:
    """Nested serial loops, outermost first."""
    if len(done) == len(axes):
        return body(list(done))
    name, extent = axes[len(done)]
    return loop(extent, lambda var: nest(axes, body, (*done, var)), name=name)


def runs(extent: Expr, length: int, one: Callable[[Expr, Expr], Stmt]) -> Stmt:
    """`extent` steps in runs of at most `length`; `one(first, count)` does a run."""
    known = constant(extent)
    if known is not None and known <= length:
        return one(i64(0), extent) if known else seq([])
    count = tirx.FloorDiv(plus(extent, i64(length - 1)), i64(length))

    def run(index: Expr) -> Stmt:
        first = times(index, i64(length))
        return one(first, tirx.Min(i64(length), tirx.Sub(extent, first)))

    return loop(count, run, name="run")


def bind(name: str, value: Expr, out: list[Stmt], dtype: str = "int64") -> Expr:
    """Name a value once; constants and variables stay as they are."""
    if isinstance(value, (IntImm, tirx.Var)):
        return value
    var = tirx.Var(name, dtype)
    out.append(tirx.Bind(var, value))
    return var


def load(buffer: Any, index: Expr) -> Expr:
    """An element of a flat buffer."""
    return tirx.BufferLoad(buffer, [index])


def cast(dtype: str, value: Expr) -> Expr:
    """`value` as `dtype`."""
    if str(value.ty.dtype) in HALF_TYPES:
        value = widen(value)
    if dtype in HALF_TYPES:
        return narrow(dtype, value)
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def when(condition: Expr | None, then: Stmt, otherwise: Stmt | None = None) -> Stmt:
    """`if condition`; None is always true."""
    return then if condition is None else tirx.IfThenElse(condition, then, otherwise)


def demand(condition: Expr, message: str) -> Stmt:
    """Raise ValueError(message) from the kernel unless the condition holds."""
    # The constructor takes the condition first, whatever its parameter names say.
    return tirx.AssertStmt(condition, StringImm("ValueError"), [StringImm(message)])


def both(conditions: Sequence[Expr]) -> Expr:
    """All of the conditions."""
    return reduce(tirx.And, conditions)


def either(conditions: Sequence[Expr]) -> Expr:
    """Any of the conditions."""
    return reduce(tirx.Or, conditions)
