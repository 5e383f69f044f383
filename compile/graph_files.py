"""Reading the graphs that `graphs.export` wrote: step 1 of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from normgraph.compile.vectors import Port
from normgraph.errors import ArtifactNotFound, CompileError, SpecError
from normgraph.graphs.layout import resolve_layout
from normgraph.graphs.signature import signature
from normgraph.spec import NormSpec

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class Graph:
    """One exported graph; `content` is its file as it was read, `meta` what it says of itself."""

    kind: str
    spec: NormSpec
    model: onnx.ModelProto
    content: bytes
    meta: Mapping[str, str]
    inputs: list[Port]
    outputs: list[Port]


def read(src: Path) -> list[Graph]:
    """The graphs of one export, by file name.

    Raises ArtifactNotFound where there are none, CompileError where a file is not a graph of
    `graphs.export` or where they are of different exports.
    """
    files = sorted(src.glob("*.onnx")) if src.is_dir() else []
    if not files:
        raise ArtifactNotFound(
            f"{src}: expected a directory with <kind>.onnx files, and there are none. Write them "
            "with `normgraph export` or normgraph.graphs.export."
        )
    graphs: dict[str, Graph] = {}
    for file in files:
        graph = _graph(file)
        if graph.kind in graphs:
            raise CompileError(
                f"{file}: expected one graph a kind, and another file holds {graph.kind} too. "
                "Remove one of them."
            )
        graphs[graph.kind] = graph
    first, *others = graphs.values()
    for graph in others:
        for key in ("normgraph.spec", "normgraph.shape", "normgraph.dtype"):
            if graph.meta[key] != first.meta[key]:
                raise CompileError(
                    f"{src}: {graph.kind}.onnx and {first.kind}.onnx differ in {key}: "
                    f"{graph.meta[key]} and {first.meta[key]}. One artifact holds the kinds of one "
                    "export. If one is left over from an earlier export, remove it; else export "
                    "each into a directory of its own."
                )
    return [first, *others]


def _graph(file: Path) -> Graph:
    content = file.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise CompileError(
            f"{file}: expected an ONNX model, and it is not a valid one: {error}. Export it again."
        ) from error
    meta = {entry.key: entry.value for entry in model.metadata_props}
    missing = [k for k in ("spec", "kind", "shape", "dtype") if f"normgraph.{k}" not in meta]
    if missing:
        raise CompileError(
            f"{file}: expected a graph that normgraph exported, and its metadata lacks normgraph."
            f"{missing[0]}. Export it with `normgraph export` or normgraph.graphs.export."
        )
    kind = meta["normgraph.kind"]
    try:
        spec = NormSpec.from_dict(json.loads(meta["normgraph.spec"]))
        shape = json.loads(meta["normgraph.shape"])
        wanted = signature(resolve_layout(spec, shape, meta["normgraph.dtype"]), kind)
    except (SpecError, ValueError, TypeError) as error:
        raise CompileError(
            f"{file}: expected a graph that normgraph exported, and its metadata is not: {error}. "
            "Export it again."
        ) from error
    inputs = [_port(file, value) for value in model.graph.input]
    outputs = [_port(file, value) for value in model.graph.output]
    expected = [[Port(p.name, p.dtype, p.shape) for p in ports] for ports in wanted]
    # A debug build has outputs of its own behind the usual ones.
    if [inputs, outputs[: len(expected[1])]] != expected:
        raise CompileError(
            f"{file}: expected the inputs and outputs of {kind} of {spec.op}, "
            f"{_listed(expected[0])} -> {_listed(expected[1])}, and it has {_listed(inputs)} -> "
            f"{_listed(outputs)}. Export it again."
        )
    return Graph(kind, spec, model, content, meta, inputs, outputs)


def _port(file: Path, value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        raise CompileError(
            f"{file}: expected {', '.join(_DTYPES.values())} tensors, and {value.name} is none. "
            "Export it again."
        )
    dims = [d.dim_param if d.HasField("dim_param") else int(d.dim_value) for d in tensor.shape.dim]
    return Port(value.name, _DTYPES[tensor.elem_type], tuple(dims))


def _listed(ports: list[Port]) -> str:
    return ", ".join(f"{p.name} {p.dtype}{_shape(p.shape)}" for p in ports)


def _shape(dims: tuple[Any, ...]) -> str:
    return f"[{','.join(str(d) for d in dims)}]"
