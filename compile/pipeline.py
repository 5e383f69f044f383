"""The pipeline, as one list: what happens to a graph on its way to a library.

 1. read       the ONNX graph, checked
 2. import     ONNX -> Relax, dimension names as symbolic extents
 3. legalise   each node -> a call of a TIR function; constants folded
 4. fuse       the calls -> one destination-passing PrimFunc, one block a node
 5. schedule   the first rule that takes the function -> loops
 6. lower      loops -> a packed function on flat memory    (all kinds of an artifact together)
 7. generate   LLVM -> object code                          (all kinds of an artifact together)
 8. link       object + thread pool -> shared library       (all kinds of an artifact together)

Steps 1 to 5 run here, one graph at a time; `codegen` and `link` do the rest. `--debug-dump DIR`
writes the state after each of the steps 1 to 7 as DIR/<kind>.<step>.<suffix>, `all` for all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from normgraph.compile import codegen, importing, plain_rule, slice_rule
from normgraph.compile.targets import Target
from normgraph.errors import CompileError

# In order of preference; the last one takes every function.
RULES = (slice_rule, plain_rule)

Progress = Callable[[str], None]


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
    for rule in RULES:
        made = rule.apply(func, outputs, target)
        if made is not None:
            if rule is RULES[-1]:
                progress(f"{kind}: no schedule rule knows this pattern; compiled plainly, slow")
            return Scheduled(made, rule.NAME)
    raise CompileError(f"{kind}: no schedule rule took the function")


def generate(
    scheduled: Mapping[str, Scheduled], target: Target, object_file: Path, dump: Dump
) -> None:
    """Steps 6 and 7 for all kinds of an artifact."""
    try:
        functions = {kind: each.func for kind, each in scheduled.items()}
        dump("all", "6-lower", "tir.py", lambda: codegen.lower(functions, target.to_tvm()).script())
        module = codegen.generate(functions, target.to_tvm())
        dump("all", "7-generate", "ll", lambda: str(module.inspect_source("ll")))
        dump("all", "7-generate", "s", lambda: str(module.inspect_source("asm")))
        module.write_to_file(str(object_file), "o")
    except Exception as error:
        raise CompileError(
            f"code generation for {target.name} failed: {type(error).__name__}: {error}"
        ) from error
