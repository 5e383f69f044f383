"""The schedule of last resort: the graph's blocks one after the other, each a plain loop nest.

Correct for any function of maps and reductions, and slow: every intermediate is a whole tensor in
memory, and one thread does the work. `build` says when a graph falls through to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx

from normgraph.compile.kernel_frame import ADD, NULL, WRITE, item_size, rounded_sum
from normgraph.compile.targets import Target
from normgraph.compile.tir import Expr, Stmt, both, demand, i64, nest, seq, when

NAME = "plain"


def apply(func: Any, outputs: Sequence[str], target: Target) -> Any:
    """The function as loops, computing all outputs and storing those that `req` asks for."""
    del target
    lowered = _loops(func)
    n_inputs = len(func.params) - len(outputs)
    req = tirx.Var("req", "int64")
    params: list[Any] = []
    checks: list[Stmt] = []
    views: list[Stmt] = []
    stores: list[Stmt] = []
    for index, old in enumerate(lowered.params):
        if index < n_inputs:
            own = _param(old.shape, old.dtype, old.name)
            views.append(tirx.DeclBuffer(old, data=own.data))
        else:
            k = index - n_inputs
            name = outputs[k]
            sizes = [tirx.Var(f"{name}_{i}", "int64") for i in range(len(old.shape))]
            own = _param(sizes, old.dtype, name)
            request = tirx.BitwiseAnd(tirx.shift_right(req, i64(2 * k)), i64(3))
            fits = [tirx.EQ(s, want) for s, want in zip(sizes, old.shape, strict=True)]
            if fits:
                message = f"{name} does not have the shape the inputs give"
                checks.append(demand(tirx.Or(tirx.EQ(request, i64(NULL)), both(fits)), message))
            views.append(tirx.AllocBuffer(old))
            stores.append(_store(own, old, request))
        params.append(own)
    body = seq([*checks, *views, lowered.body, *stores])
    return tirx.PrimFunc([*params, req], body).with_attr("tirx.noalias", False)


def _loops(func: Any) -> Any:
    """The blocks lowered to loops and buffer accesses, nothing moved."""
    passes = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.BF16ComputeLegalize(),
    ]
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.ir.transform.Sequential(passes)(module)["main"]


def _param(shape: Sequence[Expr], dtype: Any, name: str) -> Any:
    return tirx.decl_buffer(shape, dtype, name, data_alignment=item_size(dtype))


def _store(own: Any, computed: Any, request: Expr) -> Stmt:
    axes = [(f"i{k}", dim) for k, dim in enumerate(computed.shape)]

    def write(index: list[Expr]) -> Stmt:
        return tirx.BufferStore(own, tirx.BufferLoad(computed, index), index)

    def add(index: list[Expr]) -> Stmt:
        old, new = tirx.BufferLoad(own, index), tirx.BufferLoad(computed, index)
        return tirx.BufferStore(own, rounded_sum(old, new), index)

    added = when(tirx.EQ(request, i64(ADD)), nest(axes, add))
    return when(tirx.EQ(request, i64(WRITE)), nest(axes, write), added)
