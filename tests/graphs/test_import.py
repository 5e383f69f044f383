"""The compiler's importer takes every graph, down to calls of primitive functions."""

from __future__ import annotations

from typing import Any

import pytest

from normgraph import graphs

relax = pytest.importorskip("tvm.relax")
frontend = pytest.importorskip("tvm.relax.frontend.onnx")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_graph_becomes_calls_of_primitive_functions(case: Any, dtype: str) -> None:
    for kind in graphs.kinds(case.spec):
        for shape in (case.shape, case.names):
            module = frontend.from_onnx(graphs.build(case.spec, kind, shape, dtype))
            for step in ("LegalizeOps", "FoldConstant", "DeadCodeElimination"):
                module = getattr(relax.transform, step)()(module)
            for block in module["main"].body.blocks:
                for binding in block.bindings:
                    if isinstance(binding.value, relax.Call):
                        assert binding.value.op.name == "relax.call_tir"
                    else:
                        assert isinstance(binding.value, (relax.Var, relax.Tuple))
