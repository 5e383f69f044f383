"""The key of a build in the compile cache: everything that the result depends on.

The version of normgraph is not enough, because a checkout changes under the same version. So the
key holds a digest of the sources themselves: of the schedule rules, of the C files that are linked
in, of the reference that gives the self-test its answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

import normgraph
from normgraph import graphs as graph_layer
from normgraph.compile import cache_size, cuda_compilers, link
from normgraph.compile.graph_files import Graph
from normgraph.compile.knobs import knobs
from normgraph.compile.targets import Target

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "onnx", "numpy", "ml_dtypes")
# What compilers and linkers look at beside their arguments.
_VARIABLES = (
    "COMPILER_PATH", "CPATH", "C_INCLUDE_PATH", "GCC_EXEC_PREFIX", "LD_RUN_PATH", "LIBRARY_PATH",
)  # fmt: skip


def sources_digest() -> str:
    """sha256 over the names and the contents of all sources that take part in a build."""
    total = hashlib.sha256()
    for folder in _source_folders():
        files = [file for file in folder.iterdir() if file.suffix in (".py", ".c", ".h")]
        for file in sorted(files, key=lambda file: file.name):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{folder.name}/{file.name} {content}\n".encode())
    return total.hexdigest()


def _source_folders() -> tuple[Path, ...]:
    modules = (str(normgraph.__file__), str(graph_layer.__file__), __file__)
    return tuple(Path(module).parent for module in modules)


# Of the code that is running, as near as can be told; later the files may be other ones.
_AT_IMPORT = sources_digest()


def build_key(graphs: Sequence[Graph], goals: Sequence[Target], self_test: bool) -> str | None:
    """sha256 over all of it, or None where it cannot be told, so that nothing may be cached.

    That is where a source has changed since it was imported, or a tool does not say what it is.
    """
    try:
        if sources_digest() != _AT_IMPORT:
            return None
        facts: dict[str, Any] = {
            "graphs": [[g.kind, hashlib.sha256(g.content).hexdigest()] for g in graphs],
            "targets": [_target(goal) for goal in goals],
            "self_test": self_test,
            "knobs": dataclasses.asdict(knobs()),
            "cache": cache_size.last_level_cache(),
            "normgraph": [normgraph.__version__, _AT_IMPORT],
            "packages": {name: version(name) for name in _PACKAGES},
            "tvm": [
                _file(str(file)) for file in sorted(Path(tvm.__file__).parent.glob("lib*/*.so"))
            ],
            "llvm": int(codegen.llvm_version_major()),
            "host": [platform.machine(), *platform.libc_ver(), *sys.version_info[:2]],
            "environment": {
                name: value
                for name, value in os.environ.items()
                if name in _VARIABLES or name.startswith("TVM_")
            },
        }
    except (OSError, subprocess.SubprocessError):
        return None
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _target(goal: Target) -> list[Any]:
    """A target, and the tools that make a library for it. A device's compiler belongs here too."""
    tool = link.compiler(goal)
    compiler = cuda_compilers.find(goal.archs) if goal.kind == "cuda" else None
    return [
        dataclasses.asdict(goal),
        str(goal.to_tvm()),
        # Whether its self-test is run.
        goal.runs_here and (compiler is None or goal.obstacle(compiler.version) is None),
        None if tool is None else _toolchain(tool, *_file(tool)),
        None if compiler is None else compiler.identity(),
    ]


@lru_cache(maxsize=8)
def _toolchain(tool: str, *_: Any) -> list[Any]:
    """What a C compiler says it is, and the linker it calls."""
    said = _output(tool, "--version")
    linker = shutil.which(_output(tool, "-print-prog-name=ld").strip())
    return [tool, said, None if linker is None else _file(linker)]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def _file(path: str) -> list[Any]:
    """Which file it is, without reading all of it."""
    place = os.path.realpath(path)
    status = os.stat(place)
    return [place, status.st_size, status.st_mtime_ns]
