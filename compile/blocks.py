"""Takes a fused PrimFunc apart into its blocks: one loop nest around one store each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad, Var
from tvm.s_tir.stmt import SBlock, SBlockRealize

Expr = Any  # a TVM scalar expression; TVM ships no types


class NotCanonical(Exception):
    """A function is not of the form a rule reads; the message says where it departs."""


BINARY = (
    tirx.Add,
    tirx.Sub,
    tirx.Mul,
    tirx.Div,
    tirx.Mod,
    tirx.FloorDiv,
    tirx.FloorMod,
    tirx.Max,
    tirx.Min,
    tirx.EQ,
    tirx.NE,
    tirx.LT,
    tirx.LE,
    tirx.GT,
    tirx.GE,
    tirx.And,
    tirx.Or,
)


@dataclass(eq=False)
class Block:
    """One block of the fused function, taken apart."""

    name: str
    buffer: Any
    spatial: list[Var]
    reduce: list[tuple[Var, Expr]]
    value: Expr
    combine: str  # "map", "sum" or "product"


def is_float(buffer: Any) -> bool:
    """Whether a buffer's elements are floating-point numbers."""
    return "float" in str(buffer.dtype)


def same(index: Expr, var: Var) -> bool:
    """Whether an index is just this variable."""
    return isinstance(index, Var) and bool(index.same_as(var))


def tensor_loads(expr: Expr) -> Iterator[TensorLoad]:
    """Every tensor read in a TVM scalar expression."""
    if isinstance(expr, TensorLoad):
        yield expr
    elif isinstance(expr, tirx.Cast):
        yield from tensor_loads(expr.value)
    elif isinstance(expr, BINARY):
        yield from tensor_loads(expr.a)
        yield from tensor_loads(expr.b)
    elif isinstance(expr, Call):
        for arg in expr.args:
            yield from tensor_loads(arg)


def top_level(func: Any) -> list[Any]:
    """The statements of a function's body, in order."""
    body = func.body.block.body if isinstance(func.body, SBlockRealize) else func.body
    return list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]


def take_apart(stmt: Any) -> Block:
    """The block of a loop nest. Raises NotCanonical where it is more than one store."""
    while isinstance(stmt, tirx.For):
        stmt = stmt.body
    if not isinstance(stmt, SBlockRealize) or not isinstance(stmt.block.body, tirx.BufferStore):
        raise NotCanonical("a statement is not a loop nest around one store")
    block: SBlock = stmt.block
    store = block.body
    spatial = [iv.var for iv in block.iter_vars if int(iv.iter_type) == 0]
    reduce = [(iv.var, iv.dom.extent) for iv in block.iter_vars if int(iv.iter_type) != 0]
    if not reduce:
        return Block(block.name_hint, store.buffer, spatial, [], store.value, "map")
    combine = {tirx.Add: "sum", tirx.Mul: "product"}.get(type(store.value))
    reads_itself = combine and isinstance(store.value.a, TensorLoad)
    if not reads_itself or not store.value.a.source.same_as(store.buffer):
        raise NotCanonical(f"{block.name_hint} reduces with something other than a sum")
    if combine == "sum" and float(block.init.value.value) != 0.0:
        raise NotCanonical(f"{block.name_hint} starts its sum from {block.init.value}")
    return Block(block.name_hint, store.buffer, spatial, reduce, store.value.b, str(combine))
