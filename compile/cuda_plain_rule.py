"""The CUDA schedule of last resort: the plain rule's loops in a kernel of one thread.

Correct for any function of maps and reductions, and slow: `build` says when a graph falls through
to it. Every intermediate is a tensor in device memory. Roofline: none; one thread waits for every
access in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.prim.expr import IntImm

from normgraph.compile import plain_rule
from normgraph.compile.targets import Target
from normgraph.compile.tir import Stmt, seq

NAME = "plain"


def apply(func: Any, outputs: Sequence[str], target: Target) -> Any:
    """The function as one kernel of one thread, behind its checks and its workspaces."""
    whole = plain_rule.apply(func, outputs, target)
    body = whole.body.seq if isinstance(whole.body, tirx.SeqStmt) else [whole.body]
    host = (tirx.AssertStmt, tirx.AllocBuffer)
    outside = [stmt for stmt in body if isinstance(stmt, host)]
    inside = seq([stmt for stmt in body if not isinstance(stmt, host)])
    launched = _launch("blockIdx.x", _launch("threadIdx.x", inside))
    return tirx.PrimFunc(whole.params, seq([*outside, launched])).with_attr("tirx.noalias", False)


def _launch(tag: str, body: Stmt) -> Stmt:
    one = IntImm("int32", 1)
    axis = tirx.IterVar(tvm.ir.Range(IntImm("int32", 0), one), tirx.Var(tag, "int32"), 1, tag)
    return tirx.AttrStmt(axis, "thread_extent", one, body)
