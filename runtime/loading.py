"""Loading a library's code into the process: the very bytes that were checked.

Between a check and the loader's own reading a file can be cut, rewritten or replaced, and after it
too, because the loader maps the file: code that is not there any more ends the process (SIGBUS,
SIGSEGV). The loader also takes a path it has loaded before for the same library, whatever is there
now. So the file is read once, and what was read goes to the loader through memory that is sealed
against changes, under a name that is used once. Where the system does not let such memory be run, a
file of our own takes its place.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import tvm_ffi

from normgraph.errors import ArtifactError, ArtifactIncompatible
from normgraph.runtime.library import Library

# <linux/memfd.h>: the memory is for running. Kernels before 6.3 do not know it.
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

# Where files in memory have paths.
_MEMORY = "/proc/self/fd"

_counter = itertools.count(1)


class LoadedLibrary:
    """A library in the process. One for CPUs is unloaded when it and its functions are gone."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def function(self, name: str) -> Callable[..., Any] | None:
        """The function of that name, or None where there is none."""
        try:
            found: Callable[..., Any] = self._module.get_function(name)
        except AttributeError:
            return None
        return found


# By sha256, so that operators of the same artifact run the same code.
_loaded: WeakValueDictionary[str, LoadedLibrary] = WeakValueDictionary()

# Those for CUDA devices, which stay: their code stays on the devices, where graphs may launch it,
# and each of them knows what it has loaded. Loaded anew, one would load it once more.
kept: dict[str, LoadedLibrary] = {}


def load_library(library: Library) -> LoadedLibrary:
    """Load `library.content`.

    Raises ArtifactIncompatible where the system's loader refuses it, ArtifactError where the system
    has no place for it.
    """
    known = _loaded.get(library.sha256)
    if known is not None:
        return known
    errors: list[Exception] = []
    for place in (_sealed_memory, _private_file):
        try:
            with place(library) as path:
                made = _loaded.setdefault(library.sha256, LoadedLibrary(_load(path)))
                return kept.setdefault(library.sha256, made) if library.kind == "cuda" else made
        except (RuntimeError, OSError, ValueError) as error:
            errors.append(error)
    reason = "; ".join(
        f"{place}: {str(error).strip():.300}"
        for place, error in zip(("from memory", "from a temporary file"), errors, strict=True)
    )
    memory, file = map(_is_refused, errors)
    # Memory has no path where /proc is not mounted.
    if file and (memory or not os.path.isdir(_MEMORY)):
        raise ArtifactError(
            f"{library.path}: the library cannot be handed to the system's loader ({reason})."
            f" Set TMPDIR to a folder that can be written to, on a file system that is not mounted"
            f" noexec; where memory is short, give the process more."
        )
    raise ArtifactIncompatible(
        f"{library.path}: the system's loader refuses the library ({reason}). Compile the artifact"
        f" again on or for this host."
    )


def _is_refused(error: Exception) -> bool:
    """Whether the system let no code come from there, whatever the code is.

    The text is glibc's for a file on a file system from which nothing may be run.
    """
    return isinstance(error, OSError) or "failed to map segment" in str(error)


def _load(path: str) -> Any:
    # What tvm_ffi.load_module calls for a file that ends in .so.
    return tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")


@contextmanager
def _sealed_memory(library: Library) -> Iterator[str]:
    """A path of a file in memory that nobody can change."""
    name, flags = f"normgraph-{library.sha256[:12]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        memory = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        memory = os.memfd_create(name, flags)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(library.content)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        # The loader knows libraries by the text of their paths, and numbers of open files come
        # again. Of each path the number in binary, written in ways to say nothing, tells it apart.
        unique = bin(next(_counter))[2:].replace("0", "/").replace("1", "./")
        with _passing_link(f"{_MEMORY}/{unique}{memory}") as path:
            yield path
    finally:
        os.close(memory)


@contextmanager
def _passing_link(path: str) -> Iterator[str]:
    """A name for the path that nothing has later.

    tvm_ffi opens every loaded library by its name when it makes an error's backtrace. The number of
    an open file may then be that of another file, and one that is cut ends the process (SIGBUS).
    Where no folder can be written to, the path has to do.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="normgraph-"))
            link = os.path.join(folder, "kernels.so")
            os.symlink(path, link)
            path = link
        yield path


@contextmanager
def _private_file(library: Library) -> Iterator[str]:
    """A path of a file in a folder that is new, for us alone, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="normgraph-") as folder:
        file = Path(folder, "kernels.so")
        file.write_bytes(library.content)
        yield str(file)
