"""The pipeline, as one list: what happens to a graph on its way to a library.

 1. read       the ONNX graph, checked
 2. import     ONNX -> Relax, dimension names as symbolic extents
 3. legalise   each node -> a call of a TIR function; constants folded
 4. fuse       the calls -> one destination-passing PrimFunc, one block a node
 5. schedule   the first rule that takes the function -> loops
 6. lower      loops -> a packed function on flat memory    (all kinds of an artifact together)
 7. generate   LLVM -> object code                          (all kinds of an artifact together)
               for CUDA also kernels -> CUDA source -> machine code and PTX
 8. link       object + thread pool -> shared library       (all kinds of an artifact together)
               for CUDA with the launcher and the code for the devices

Steps 1 to 5 run here, one graph at a time; `codegen`, `cuda_codegen` and `link` do the rest.
`--debug-dump DIR` writes the state after each of the steps 1 to 7 as DIR/<kind>.<step>.<suffix>,
`all` for all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from normgraph.compile import (
    codegen,
    cuda_codegen,
    cuda_compilers,
    cuda_link,
    cuda_plain_rule,
    cuda_report,
    cuda_rules,
    importing,
    plain_rule,
    slice_rule,
)
from normgraph.compile.link import Sources
from normgraph.compile.targets import Target
from normgraph.errors import CompileError, NormGraphError

# By kind of target, in order of preference; the last one takes every function.
RULES: dict[str, tuple[Any, ...]] = {
    "llvm": (slice_rule, plain_rule),
    "cuda": (cuda_rules, cuda_plain_rule),
}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """What is linked with the object file.

    compiler: of the CUDA code, with its version. kernels: see `cuda_report.assembled`.
    """

    sources: Sources = field(default_factory=Sources)
    compiler: cuda_compilers.Compiler | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheduled:
    """A graph's scheduled function and the rule that made it."""

    func: Any
    rule: str


class Dump:
    """Writes the state after each step; does nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, step: str, suffix: str, text: Callable[[], str]) -> None:
        if self.folder is not None:
            (self.folder / f"{name}.{step}.{suffix}").write_text(text(), encoding="utf-8")


def schedule(
    kind: str, model: onnx.ModelProto, target: Target, dump: Dump, progress: Progress
) -> Scheduled:
    """Steps 1 to 5 for one graph."""
    try:
        dump(kind, "1-read", "onnx.txt", lambda: onnx.printer.to_text(model))
        module = importing.to_relax(model)
        dump(kind, "2-import", "relax.py", module.script)
        module = importing.legalize(module)
        dump(kind, "3-legalise", "relax.py", module.script)
        func = importing.with_every_input(importing.fuse(module), model)
        dump(kind, "4-fuse", "tir.py", func.script)
        scheduled = _first_rule(kind, func, [o.name for o in model.graph.output], target, progress)
        dump(kind, f"5-schedule-{scheduled.rule}", "tir.py", scheduled.func.script)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(
            f"{kind}: this graph does not compile for {target.name}: {type(error).__name__}: "
            f"{str(error).strip()}. Graphs that normgraph exported do; if this is one, it is a "
            f"defect, and a --debug-dump shows the step it stops at."
        ) from error
    return scheduled


def _first_rule(
    kind: str, func: Any, outputs: Sequence[str], target: Target, progress: Progress
) -> Scheduled:
    rules = RULES[target.kind]
    for rule in rules:
        made = rule.apply(func, outputs, target)
        if made is not None:
            if rule is rules[-1]:
                progress(f"{kind}: no schedule rule knows this pattern; compiled plainly, slow")
            return Scheduled(made, rule.NAME)
    raise CompileError(f"{kind}: no schedule rule took the function")


def generate(
    scheduled: Mapping[str, Scheduled], target: Target, object_file: Path, dump: Dump
) -> Generated:
    """Steps 6 and 7 for all kinds of an artifact. Raises ToolMissing without a CUDA compiler."""
    functions = {kind: each.func for kind, each in scheduled.items()}
    try:
        if target.kind == "cuda":
            return _generate_cuda(functions, target, object_file, dump)
        dump("all", "6-lower", "tir.py", lambda: codegen.lower(functions, target.to_tvm()).script())
        module = codegen.generate(functions, target.to_tvm())
        _write_object(module, object_file, dump)
        return Generated()
    except NormGraphError:
        raise
    except Exception as error:
        raise CompileError(
            f"code generation for {target.name} failed: {type(error).__name__}: {error}"
        ) from error


def _generate_cuda(
    functions: Mapping[str, Any], target: Target, object_file: Path, dump: Dump
) -> Generated:
    compiler = cuda_compilers.find(target.archs)
    dump("all", "6-lower", "tir.py", lambda: cuda_codegen.lower(functions, target).script())
    parts = cuda_codegen.split(functions, target)
    text = cuda_codegen.source_of(parts, target)
    dump("all", "7-generate", "cu", lambda: text)
    with ThreadPoolExecutor(len(target.images)) as pool:
        images = list(pool.map(partial(compiler.compile, text), target.images))
    for image in images:
        dump("all", f"7-generate-{image.arch}", *image.shown())
    _write_object(cuda_codegen.host_module(parts, target), object_file, dump)
    sources = cuda_link.write(object_file.parent, parts.kernels, images)
    said = {image.arch: image.log for image in images}
    return Generated(sources, compiler, cuda_report.assembled(said))


def _write_object(module: Any, object_file: Path, dump: Dump) -> None:
    dump("all", "7-generate", "ll", lambda: str(module.inspect_source("ll")))
    dump("all", "7-generate", "s", lambda: str(module.inspect_source("asm")))
    module.write_to_file(str(object_file), "o")
