"""The named steps of the backward: dvar and dmean as outputs of a debug build.

A kernel that gives dx alone could be right by luck of cancelling errors; the debug graph has the
same nodes and gives dvar and dmean as well.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import normgraph
from normgraph import NormSpec
from normgraph.scripts.verify_onnx import NotRun

Array = NDArray[Any]

KINDS = ("backward", "backward_from_output")
_TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def steps_of(spec: NormSpec) -> tuple[str, ...]:
    """The steps before dx: rms_norm has no mean, so no dmean."""
    return ("dvar",) if spec.op == "rms_norm" else ("dvar", "dmean")


def debug_graph(
    spec: NormSpec, kind: str, shape: tuple[int | str, ...], dtype: str
) -> onnx.ModelProto:
    """The graph of `kind` with dvar and dmean among its outputs.

    `delta`, which a debug build gives out as well, is left out: it is zero but for rounding, so
    there is nothing to hold its value against.
    """
    model = normgraph.graphs.build(spec, kind, shape, dtype, debug=True)
    kept = [output for output in model.graph.output if output.name != "delta"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return model


def outputs_of(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """The (name, dtype) of each output of a graph."""
    return [
        (output.name, _TYPE_NAMES[output.type.tensor_type.elem_type])
        for output in model.graph.output
    ]


class DebugKernels:
    """The debug graphs of some kinds, compiled like any other export into a folder of their own."""

    def __init__(self, models: Mapping[str, onnx.ModelProto], target: str) -> None:
        if importlib.util.find_spec("tvm") is None:
            raise NotRun("TVM is not installed: pip install 'normgraph[compile]'")
        self._outputs = {kind: outputs_of(model) for kind, model in models.items()}
        self._folder = tempfile.TemporaryDirectory(prefix="normgraph-debug-")
        try:
            source = Path(self._folder.name, "graphs")
            source.mkdir()
            for kind, model in models.items():
                onnx.save(model, source / f"{kind}.onnx")
            path = normgraph.compile.build(source, target, out=Path(self._folder.name, "artifact"))
            self._operator = normgraph.load(path)
        except BaseException:
            self._folder.cleanup()
            raise

    def run(self, kind: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output of the debug kernel of `kind`."""
        found = self._operator.call(kind, *inputs.values())
        names = [name for name, _ in self._outputs[kind]]
        return dict(zip(names, map(np.asarray, found), strict=True))

    def __enter__(self) -> DebugKernels:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
