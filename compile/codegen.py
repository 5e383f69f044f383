"""From scheduled PrimFuncs to machine code: steps 6 and 7 of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.expr import StringImm
from tvm.tirx.compilation_pipeline import finalize_device_passes, finalize_host_passes

from normgraph.compile import half_types

_PIPELINE = "normgraph"


def lowering_passes() -> list[Any]:
    """What turns loops over buffers into a packed function on flat memory.

    TVM's own list for scheduled functions is not used: its HoistIfThenElse drops the first branch
    of an if/else chain in a parallel loop. StmtSimplify is left out because it folds x - x to 0,
    which it is not for infinities and NaN; common subexpressions are left to LLVM.
    """
    return [
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[Any, Any, Any]:
    passes = tvm.ir.transform.Sequential(lowering_passes())
    return passes, finalize_host_passes, finalize_device_passes


def lower(functions: Mapping[str, Any], target: Any) -> Any:
    """The functions as `generate` hands them to LLVM, to be looked at."""
    module = tirx.transform.BindTarget(target.with_host(target))(_module(functions, target))
    return tvm.ir.transform.Sequential(lowering_passes())(module)


def generate(functions: Mapping[str, Any], target: Any) -> Any:
    """One TVM runtime module with the functions under their names, compiled by LLVM."""
    tirx.register_tir_pipeline(_PIPELINE, _pipeline)
    return tirx.build(_module(functions, target), target=target, pipeline=_PIPELINE)


def _module(functions: Mapping[str, Any], target: Any) -> Any:
    text = StringImm(half_types.functions(target))
    named = {
        name: _with_conversions(func, text)
        .with_attr("global_symbol", name)
        .with_attr("tirx.is_entry_func", False)
        for name, func in functions.items()
    }
    return tvm.IRModule(named)


def _with_conversions(func: Any, text: Any) -> Any:
    """The function with LLVM's text of the conversions at hand where it takes a half type."""
    if not any(str(getattr(p, "dtype", "")) in half_types.HALF_TYPES for p in func.params):
        return func
    return func.with_body(tirx.AttrStmt(0, "pragma_import_llvm", text, func.body))
