"""From an object file to a shared library: step 8 of the pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from normgraph.compile.targets import Target
from normgraph.errors import CompileError, ToolMissing

STUBS = Path(__file__).with_name("backend_stubs.c")

_NATIVE = ("cc", "gcc", "clang")


def compiler(target: Target) -> str | None:
    """The C compiler that links for the target, or None: $CC, cc, gcc, clang; or a cross gcc."""
    native = target.triple.split("-")[0] == os.uname().machine
    names = [os.environ["CC"]] if native and os.environ.get("CC") else []
    names += list(_NATIVE) if native else [f"{target.triple}-gcc"]
    return next((found for name in names if (found := shutil.which(name))), None)


def link(object_file: Path, library: Path, target: Target) -> bool:
    """Link `object_file` with the runtime stubs into `library`.

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
    # -Bsymbolic: a library calls its own conversions of half types, whatever else in the process
    # has functions of the same names.
    command = [tool, "-shared", "-fPIC", "-O2", "-s", "-Wl,-Bsymbolic", "-o", str(library)]
    command += [str(object_file), str(STUBS), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"linking failed with status {done.returncode}: {' '.join(command)}\n{done.stderr}"
        )
    return True
