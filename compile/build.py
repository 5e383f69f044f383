"""`build`: a directory of exported graphs to an artifact."""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from normgraph import __version__
from normgraph.compile import cache as compile_cache
from normgraph.compile import cache_key, graph_files, link, pipeline, self_test, vectors
from normgraph.compile.artifact import FORMAT, FORMAT_VERSION, LOADER_RANGE, Draft, write
from normgraph.compile.graph_files import Graph
from normgraph.compile.pipeline import Generated
from normgraph.compile.targets import Target, resolve_all
from normgraph.compile.vectors import Case, Port
from normgraph.errors import CompileError

# TVM builds functions on a stack that all threads share.
_ONE_AT_A_TIME = threading.Lock()

# Larger inputs take the float64 answers gigabytes and minutes. No self-test of more is loaded.
_MOST_TESTED = 2**25


@dataclass(frozen=True)
class Library:
    """What was compiled for one target.

    suffix: .so, or .o where the target's linker is not here. rules: the schedule rule of each
    kind. self_test: "passed", or "not run" where this machine does not run the target. generated:
    what step 7 made for it.
    """

    target: Target
    suffix: str
    content: bytes
    rules: Mapping[str, str]
    self_test: str
    generated: Generated


def build(
    src: str | os.PathLike[str],
    target: str | Sequence[str] = "cpu",
    out: str | os.PathLike[str] = "build/artifact",
    *,
    debug_dump: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    self_test: bool = True,
    cache: bool = True,
) -> Path:
    """Compile a directory of exported graphs into an artifact directory; returns its path.

    src: holds `<kind>.onnx` files from `graphs.export`, all of one spec, shape and dtype.
    target: a name from `targets()`, a CPU as LLVM names it, a name from `target_groups()`, or
    several of these. The artifact gets a library for each target; a host loads the one of those it
    runs that uses the most of it.
    out: the artifact's directory; an artifact that is there is replaced in one step.
    debug_dump: a directory for the IR after each step up to the machine code; of several targets,
    each has a directory in it.
    progress: called with a line per step.
    self_test: run the kernels on vectors with float64 answers before anything is written, for each
    target this machine can run; the vectors travel with the artifact. False leaves them out, as
    do shapes that have more than 2**25 elements where each symbolic dim is 2 to 13.

    cache: take what was built before of the same graphs for the same targets from the compile
    cache. False builds in any case, as do debug_dump and the environment's NORMGRAPH_CACHE=off.

    Raises ArtifactNotFound where src has no graphs; TargetError for an unknown target;
    ArgumentError for a wrong value in one of the cache's variables; ToolMissing without a C
    compiler, or for CUDA without a CUDA compiler; CompileError where a graph does not compile, was
    not exported by normgraph, gives wrong results, or where out cannot be written; DeviceError
    where a CUDA device refuses the self-test.
    """
    say = progress or (lambda message: None)
    kept = compile_cache.from_environment() if cache else None
    goals = resolve_all(target)
    _check_out(Path(src), Path(out))
    graphs = graph_files.read(Path(src))
    folder = None if debug_dump is None else Path(debug_dump)
    with _ONE_AT_A_TIME:
        # What is to be dumped has to be built.
        key = cache_key.build_key(graphs, goals, self_test) if kept and folder is None else None
        if kept is None or key is None:
            draft = _built(graphs, goals, self_test, folder, say)
        else:
            draft = kept.fetch(key, lambda: _built(graphs, goals, self_test, None, say), say)
        write(draft, Path(out))
    say(f"wrote {Path(out)}")
    return Path(out)


def _built(
    graphs: Sequence[Graph],
    goals: Sequence[Target],
    tested: bool,
    dump: Path | None,
    say: Callable[[str], None],
) -> Draft:
    """Steps 1 to 8 for each target, and the self-test."""
    cases = _cases(graphs, say) if tested else []
    libraries = []
    for goal in goals:
        folder = dump / goal.name if dump is not None and len(goals) > 1 else dump
        libraries.append(_library(graphs, goal, cases, pipeline.Dump(folder), say))
    return _draft(graphs, libraries, cases)


def _check_out(src: Path, out: Path) -> None:
    """Say before the work what would stop it after."""
    if out.exists() and not out.is_dir():
        raise CompileError(f"{out}: expected a directory for the artifact, and it is a file.")
    if out.exists() and src.exists() and out.samefile(src):
        raise CompileError(
            f"{out}: the artifact would lie among the graphs it is made of, and its copies of them "
            "would be taken for more. Give another directory for it."
        )


def _library(
    graphs: Sequence[Graph],
    goal: Target,
    cases: Sequence[Case],
    dump: pipeline.Dump,
    say: Callable[[str], None],
) -> Library:
    """Steps 1 to 8 for one target, and the self-test where this machine runs it.

    Of the time, nearly all goes into step 7, so the steps that every target has in common are done
    for each.
    """
    scheduled = {}
    for graph in graphs:
        say(f"{graph.kind}: schedule for {goal.name}")
        scheduled[graph.kind] = pipeline.schedule(graph.kind, graph.model, goal, dump, say)
    with tempfile.TemporaryDirectory(prefix="normgraph-") as folder:
        say(f"generate code for {goal.name} and link")
        binary = Path(folder, "kernels.o")
        generated = pipeline.generate(scheduled, goal, binary, dump)
        library = Path(folder, "kernels.so")
        if link.link(binary, library, goal, generated.sources):
            binary = library
        else:
            say(f"no linker for {goal.name} here: the artifact gets an object file, to be linked")
        status = "not run"
        if cases and goal.runs_here and binary is library:
            compiler = generated.compiler
            obstacle = None if compiler is None else goal.obstacle(compiler.version)
            if obstacle is None:
                say(f"self-test of {goal.name}")
                outputs = {graph.kind: graph.outputs for graph in graphs}
                self_test.run(library, cases, outputs, goal.device)
                status = "passed"
            else:
                say(f"self-test of {goal.name} not run: {obstacle}")
        rules = {kind: each.rule for kind, each in scheduled.items()}
        content = binary.read_bytes()
        return Library(goal, binary.suffix, content, rules, status, generated)


def _cases(graphs: Sequence[Graph], say: Callable[[str], None]) -> list[Case]:
    largest = max(vectors.most_elements(graph.inputs) for graph in graphs)
    if largest > _MOST_TESTED:
        say(f"no self-test: inputs of {largest} elements are too many; normgraph verify does it")
        return []
    return [c for g in graphs for c in vectors.cases(g.spec, g.kind, g.inputs, g.outputs)]


def _draft(graphs: Sequence[Graph], libraries: Sequence[Library], cases: Sequence[Case]) -> Draft:
    draft = Draft()
    kinds = {
        graph.kind: {
            "function": graph.kind,
            "graph": draft.add(f"graph-{graph.kind}", ".onnx", graph.content),
            "inputs": [_entry(port) for port in graph.inputs],
            "outputs": [_entry(port) for port in graph.outputs],
            "rule": ", ".join(dict.fromkeys(each.rules[graph.kind] for each in libraries)),
        }
        for graph in graphs
    }
    meta = graphs[0].meta
    draft.manifest.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "normgraph_version": __version__,
            "spec": json.loads(meta["normgraph.spec"]),
            "shape": json.loads(meta["normgraph.shape"]),
            "dtype": meta["normgraph.dtype"],
            "kinds": kinds,
            "libraries": [_described(each, draft) for each in libraries],
            "self_test": {
                **draft.add("selftest", ".npz", _vectors(cases)),
                "status": _status(libraries),
                "cases": [case.entry() for case in cases],
            },
            "requires": {"tvm_ffi": LOADER_RANGE},
            "versions": {
                "tvm": version("apache-tvm"),
                "tvm_ffi": version("apache-tvm-ffi"),
                "onnx": onnx.__version__,
            },
        }
    )
    return draft


def _status(libraries: Sequence[Library]) -> str:
    """Of all libraries together."""
    return "passed" if all(each.self_test == "passed" for each in libraries) else "not run"


def _described(library: Library, draft: Draft) -> dict[str, Any]:
    target = library.target
    described: dict[str, Any] = {
        "name": target.name,
        "kind": target.kind,
        "triple": target.triple,
        "mcpu": target.mcpu,
        "features": list(target.features),
    }
    compiler = library.generated.compiler
    if compiler is not None:
        described["archs"] = list(target.images)
        described["cuda"] = ".".join(map(str, compiler.version))
        described["compiler"] = compiler.name
        described["kernels"] = dict(library.generated.kernels)
    return {
        **draft.add(f"kernels-{target.name}", library.suffix, library.content),
        "form": "library" if library.suffix == ".so" else "object",
        "self_test": library.self_test,
        "target": described,
    }


def _entry(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _vectors(cases: Sequence[Case]) -> bytes:
    stored = {key: array for case in cases for key, array in case.stored.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored)  # type: ignore[arg-type]
    return buffer.getvalue()
