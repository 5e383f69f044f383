"""CUDA source to machine code and PTX: by an nvcc that knows the target, else by NVRTC's wheel.

Floating point is IEEE throughout: no fast math, denormals kept, division and square root rounded
correctly. The one liberty is that a*b + c may be one fused operation, which rounds once where the
written form rounds twice; the kernels for CPUs take the same one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from normgraph.errors import CompileError, ToolMissing

# Chooses the compiler, nvcc or nvrtc, in place of the first one that is found.
VARIABLE = "NORMGRAPH_CUDA_COMPILER"
# The distributions behind NVRTC, those of the extra cuda.
WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl")

# The first CUDA whose compilers know an architecture.
_SINCE = {"sm_80": (11, 0), "sm_90": (11, 8), "sm_100": (12, 8)}

_FLOATS = ("-fmad=true", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
_STANDARD = "-std=c++17"


@dataclass(frozen=True)
class Image:
    """Code for one architecture: machine code for sm_90, or PTX for compute_90.

    log: what the compiler and the assembler said, with each kernel's registers and spills.
    """

    arch: str
    content: bytes
    log: str

    def shown(self) -> tuple[str, Callable[[], str]]:
        """A file's suffix and what to look at in it: PTX, or of machine code the log."""
        if self.arch.startswith("compute_"):
            return "ptx", self.content.rstrip(b"\0").decode
        return "log", lambda: self.log


class Compiler(Protocol):
    """nvcc or NVRTC. version: of CUDA, (13, 0)."""

    @property
    def name(self) -> str:
        """nvcc or nvrtc."""

    @property
    def version(self) -> tuple[int, int]:
        """The version of CUDA."""

    def identity(self) -> list[object]:
        """Tells it from every other compiler."""

    def compile(self, text: str, arch: str) -> Image:
        """One image. Raises CompileError with what the compiler said."""


@dataclass(frozen=True)
class Nvcc:
    """The CUDA toolkit's compiler driver."""

    path: str
    version: tuple[int, int]
    name: str = "nvcc"

    def identity(self) -> list[object]:
        """Its place, and what it says of itself."""
        done = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=True)
        return [self.name, self.path, done.stdout]

    def compile(self, text: str, arch: str) -> Image:
        """One image, by a run of nvcc."""
        machine_code = arch.startswith("sm_")
        form = "-cubin" if machine_code else "-ptx"
        virtual = f"compute_{arch.partition('_')[2]}"
        with tempfile.TemporaryDirectory(prefix="normgraph-") as folder:
            source, result = Path(folder, "kernels.cu"), Path(folder, "kernels.bin")
            source.write_text(text, encoding="utf-8")
            command = [self.path, form, f"-gencode=arch={virtual},code={arch}", _STANDARD, *_FLOATS]
            command += ["-Xptxas=-v", "-diag-suppress=177", "-o", str(result), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(
                    f"nvcc failed with status {done.returncode}: {' '.join(command)}\n{done.stderr}"
                )
            return Image(arch, result.read_bytes(), done.stderr)


class Nvrtc:
    """The compiler as a library, called through its C interface."""

    name = "nvrtc"

    def __init__(self, library: Path, includes: tuple[Path, ...]) -> None:
        for builtins in sorted(library.parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # it is looked up by name alone
        self._library = ctypes.CDLL(str(library))
        self._includes = includes
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def identity(self) -> list[object]:
        """The versions of its wheels."""
        return [self.name, *(importlib.metadata.version(name) for name in WHEELS)]

    def compile(self, text: str, arch: str) -> Image:
        """One image, compiled in this process."""
        program = ctypes.c_void_p()
        source = text.encode("utf-8")
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source, b"kernels.cu", 0, None, None
        )
        try:
            options = [f"--gpu-architecture={arch}", _STANDARD, *(f"-{each}" for each in _FLOATS)]
            options += [f"--include-path={each}" for each in self._includes]
            options += ["--diag-suppress=177"]
            if arch.startswith("sm_"):
                options += ["--ptxas-options=-v"]
            given = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
            status = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"NVRTC failed with status {status} for {arch}:\n{log}")
            kind = "CUBIN" if arch.startswith("sm_") else "PTX"
            return Image(arch, self._read(program, f"nvrtcGet{kind}"), log)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(what, program, content)
        return content.raw

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise CompileError(f"{name} failed with status {status}")


def find(archs: Sequence[str] = ()) -> Compiler:
    """nvcc where it is on the PATH or under $CUDA_HOME, else NVRTC: one that knows these archs.

    Raises ToolMissing where there is neither, or not the one that NORMGRAPH_CUDA_COMPILER names.
    """
    needed = max((_SINCE[arch] for arch in archs), default=(0, 0))
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "nvcc", "nvrtc"):
        raise ToolMissing(f"{VARIABLE}: expected nvcc or nvrtc, but it is {wanted!r}.")
    lacking = []
    for name, look in (("nvcc", _nvcc_here), ("nvrtc", nvrtc)):
        if wanted not in ("", name):
            continue
        found = look()
        if found is not None and found.version >= needed:
            return found
        lacking.append(_lack(name, found))
    what, of = "CUDA", ""
    if archs:
        what, of = ", ".join(archs), f" of CUDA {needed[0]}.{needed[1]} or later"
    raise ToolMissing(
        f"compiling for {what} needs a compiler{of}, and {', and '.join(lacking)}. "
        "pip install 'normgraph[cuda]', or install the CUDA toolkit."
    )


def _nvcc_here() -> Compiler | None:
    path = nvcc_path()
    return None if path is None else nvcc(path)


def _lack(name: str, found: Compiler | None) -> str:
    """Why a compiler is not taken."""
    if found is not None:
        return f"the {name} that is here is of CUDA {found.version[0]}.{found.version[1]}"
    if name == "nvcc":
        return "nvcc is not on the PATH, nor in bin under $CUDA_HOME"
    return f"NVRTC is not installed ({', '.join(missing_wheels())})"


def nvcc_path() -> str | None:
    """Where nvcc is, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which(str(Path(home, "bin", "nvcc"))) if home else None)


@lru_cache(maxsize=4)
def nvcc(path: str) -> Nvcc:
    """The nvcc at that path. Raises CompileError where it does not tell its version."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if done.returncode or found is None:
        raise CompileError(f"{path} --version does not work: {done.stdout}{done.stderr}")
    return Nvcc(path, (int(found[1]), int(found[2])))


@lru_cache(maxsize=1)
def nvrtc() -> Nvrtc | None:
    """NVRTC from its wheels, or None where one of them is missing."""
    if missing_wheels():
        return None
    library = _file("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+")
    half = _file("nvidia-cuda-runtime", r"cuda_fp16\.h")
    standard = _file("nvidia-cuda-cccl", r"cuda/std/cstdint")
    if library is None or half is None or standard is None:
        return None
    return Nvrtc(library, (half.parent, standard.parents[2]))


def missing_wheels() -> list[str]:
    """Of the distributions that NVRTC needs, those that are not installed."""
    missing = []
    for name in WHEELS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def _file(distribution: str, pattern: str) -> Path | None:
    for file in importlib.metadata.files(distribution) or ():
        if re.search(rf"(?:^|/){pattern}$", file.as_posix()):
            return Path(str(file.locate()))
    return None
