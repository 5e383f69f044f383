"""From an object file to a shared library: step 8 of the pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

from normgraph.compile.targets import Target
from normgraph.errors import CompileError, ToolMissing

_HERE = Path(__file__).parent
# What a kernel needs of TVM's runtime; see backend.c.
_BACKEND = tuple(
    _HERE / f"{name}.c"
    for name in ("backend", "cpu_count", "placement", "thread_pool", "workspace")
)
# Tells the pool whether a kernel's loops are too small for several threads.
STAY_ON_THREAD = "normgraph_stay_on_thread"
# The rest stays inside: another library's function of the same name is not called instead, and the
# loader does not put TVM's functions in place of ours.
_EXPORTS = "{ global: __tvm_ffi_*; local: *; };"


@dataclass(frozen=True)
class Sources:
    """C files that are linked in, and where their headers are; by default what CPU kernels need."""

    files: Sequence[Path] = _BACKEND
    includes: Sequence[Path] = ()


_NATIVE = ("cc", "gcc", "clang")


def compiler(target: Target) -> str | None:
    """The C compiler that links for the target, or None: $CC, cc, gcc, clang; or a cross gcc."""
    native = target.triple.split("-")[0] == os.uname().machine
    names = [os.environ["CC"]] if native and os.environ.get("CC") else []
    names += list(_NATIVE) if native else [f"{target.triple}-gcc"]
    return next((found for name in names if (found := shutil.which(name))), None)


def link(object_file: Path, library: Path, target: Target, sources: Sources | None = None) -> bool:
    """Link `object_file` with C files, by default thread pool and workspaces, into `library`.

    Returns False where only a cross linker is missing: the object is then the result. Raises
    ToolMissing where this machine has no C compiler for itself, CompileError where linking fails.
    """
    tool = compiler(target)
    if tool is None:
        if target.triple.split("-")[0] != os.uname().machine:
            return False
        raise ToolMissing(
            f"linking needs a C compiler, and none of $CC, {', '.join(_NATIVE)} is on the PATH. "
            "Install one (Debian: apt-get install gcc)."
        )
    exports = library.with_suffix(".map")
    exports.write_text(_EXPORTS, encoding="utf-8")
    command = [tool, "-std=gnu11", "-shared", "-fPIC", "-O2", "-s", "-pthread"]
    command += [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    command += [f"-Wl,--version-script={exports}", "-o", str(library), str(object_file)]
    chosen = sources or Sources()
    command += [f"-I{folder}" for folder in chosen.includes]
    command += [*map(str, chosen.files), "-lm", "-ldl"]
    _run(command)
    _refuse_open_symbols(library, tool)
    return True


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"linking failed with status {done.returncode}: {' '.join(command)}\n{done.stderr}"
        )
    return done.stdout


def _refuse_open_symbols(library: Path, tool: str) -> None:
    """A gate: what a library needs is in the C library or in tvm_ffi's C interface.

    Symbols of the C library carry a version.
    """
    nm = _run([tool, "-print-prog-name=nm"]).strip()
    lines = [
        line.split() for line in _run([nm, "-D", "--undefined-only", str(library)]).splitlines()
    ]
    needed = [words[-1] for words in lines if words[-2:-1] == ["U"]]
    foreign = [name for name in needed if "@" not in name and not name.startswith("TVMFFI")]
    if foreign:
        raise CompileError(
            f"the library needs {', '.join(foreign)}, which neither the C library nor tvm_ffi has."
        )
