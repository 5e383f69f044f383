"""`build`: a directory of exported graphs to an artifact."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from normgraph import __version__
from normgraph.compile import graph_files, link, pipeline, self_test, vectors
from normgraph.compile.artifact import FORMAT, FORMAT_VERSION, Writer, writing
from normgraph.compile.graph_files import Graph
from normgraph.compile.targets import Target, resolve
from normgraph.compile.vectors import Case, Port
from normgraph.errors import CompileError

# TVM builds functions on a stack that all threads share.
_ONE_AT_A_TIME = threading.Lock()

# Larger static inputs take the float64 answers gigabytes and minutes.
_MOST_TESTED = 2**25


def build(
    src: str | os.PathLike[str],
    target: str = "cpu",
    out: str | os.PathLike[str] = "build/artifact",
    *,
    debug_dump: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    self_test: bool = True,
) -> Path:
    """Compile a directory of exported graphs into an artifact directory; returns its path.

    src: holds `<kind>.onnx` files from `graphs.export`, all of one spec, shape and dtype.
    target: a name from `targets()`, or a CPU as LLVM names it.
    out: the artifact's directory; an artifact that is there is replaced in one step.
    debug_dump: a directory for the IR after each step up to the machine code.
    progress: called with a line per step.
    self_test: run the kernels on vectors with float64 answers before anything is written, where
    this machine can run the target; the vectors travel with the artifact. False leaves them out, as
    do static shapes of more than 2**25 elements.

    Raises ArtifactNotFound where src has no graphs; TargetError for an unknown target; ToolMissing
    without a C compiler; CompileError where a graph does not compile, was not exported by
    normgraph, gives wrong results, or where out cannot be written.
    """
    say = progress or (lambda message: None)
    goal = resolve(target)
    _check_out(Path(src), Path(out))
    graphs = graph_files.read(Path(src))
    with _ONE_AT_A_TIME:
        return _build(graphs, goal, Path(out), debug_dump, say, self_test)


def _check_out(src: Path, out: Path) -> None:
    """Say before the work what would stop it after."""
    if out.exists() and not out.is_dir():
        raise CompileError(f"{out}: expected a directory for the artifact, and it is a file.")
    if out.exists() and src.exists() and out.samefile(src):
        raise CompileError(
            f"{out}: the artifact would lie among the graphs it is made of, and its copies of them "
            "would be taken for more. Give another directory for it."
        )


def _build(
    graphs: Sequence[Graph],
    goal: Target,
    out: Path,
    debug_dump: str | os.PathLike[str] | None,
    say: Callable[[str], None],
    self_test: bool,
) -> Path:
    dump = pipeline.Dump(None if debug_dump is None else Path(debug_dump))
    scheduled = {}
    for graph in graphs:
        say(f"{graph.kind}: schedule for {goal.name}")
        scheduled[graph.kind] = pipeline.schedule(graph.kind, graph.model, goal, dump, say)
    with tempfile.TemporaryDirectory(prefix="normgraph-") as folder:
        say("generate code and link")
        binary = _library(scheduled, goal, Path(folder), dump)
        cases = _cases(graphs, say) if self_test else []
        status = "not run"
        if cases and goal.runs_here and binary.suffix == ".so":
            say("self-test")
            _check(binary, cases, graphs)
            status = "passed"
        content = binary.read_bytes()
    with writing(out) as writer:
        _write(writer, graphs, scheduled, goal, binary.suffix, content, cases, status)
    say(f"wrote {out}")
    return out


def _library(
    scheduled: Mapping[str, pipeline.Scheduled], target: Target, folder: Path, dump: pipeline.Dump
) -> Path:
    """The linked library, or the object file where the target's linker is not here."""
    object_file = folder / "kernels.o"
    pipeline.generate(scheduled, target, object_file, dump)
    library = folder / "kernels.so"
    return library if link.link(object_file, library, target) else object_file


def _cases(graphs: Sequence[Graph], say: Callable[[str], None]) -> list[Case]:
    largest = max(math.prod(d for d in p.shape if isinstance(d, int)) for p in graphs[0].inputs)
    if largest > _MOST_TESTED:
        say(f"no self-test: inputs of {largest} elements are too many; normgraph verify does it")
        return []
    return [c for g in graphs for c in vectors.cases(g.spec, g.kind, g.inputs, g.outputs)]


def _check(library: Path, cases: Sequence[Case], graphs: Sequence[Graph]) -> None:
    self_test.run(library, cases, {graph.kind: graph.outputs for graph in graphs})


def _write(
    writer: Writer,
    graphs: Sequence[Graph],
    scheduled: Mapping[str, pipeline.Scheduled],
    target: Target,
    suffix: str,
    library: bytes,
    cases: Sequence[Case],
    status: str,
) -> None:
    kinds = {
        graph.kind: {
            "function": graph.kind,
            "graph": writer.add(f"graph-{graph.kind}", ".onnx", graph.content),
            "inputs": [_entry(port) for port in graph.inputs],
            "outputs": [_entry(port) for port in graph.outputs],
            "rule": scheduled[graph.kind].rule,
        }
        for graph in graphs
    }
    described = {
        "name": target.name,
        "kind": target.kind,
        "triple": target.triple,
        "mcpu": target.mcpu,
        "features": list(target.features),
    }
    meta = graphs[0].meta
    writer.commit(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "normgraph_version": __version__,
            "spec": json.loads(meta["normgraph.spec"]),
            "shape": json.loads(meta["normgraph.shape"]),
            "dtype": meta["normgraph.dtype"],
            "kinds": kinds,
            "libraries": [
                {
                    **writer.add(f"kernels-{target.name}", suffix, library),
                    "form": "library" if suffix == ".so" else "object",
                    "target": described,
                }
            ],
            "self_test": {
                **writer.add("selftest", ".npz", _vectors(cases)),
                "status": status,
                "cases": [case.entry() for case in cases],
            },
            "versions": {
                "tvm": version("apache-tvm"),
                "tvm_ffi": version("apache-tvm-ffi"),
                "onnx": onnx.__version__,
            },
        }
    )


def _entry(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _vectors(cases: Sequence[Case]) -> bytes:
    stored = {key: array for case in cases for key, array in case.stored.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored)  # type: ignore[arg-type]
    return buffer.getvalue()
