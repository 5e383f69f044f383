"""CUDA kernels without a GPU: their source compiled for this host and run by a small emulator.

    program = emulator.compile(source)                          # CUDA C++ text, as it is shipped
    run = program.run(
        [("kernel", (2, 1, 1), (64, 1, 1), ["y", "x", 100])],   # kernel, grid, block, arguments
        inputs={"x": x}, outputs={"y": ((100,), "float32")}, seed=1,
    )
    run.arrays["y"]; run.findings

The source stays as it is, but for the declarations of shared memory, which become references to
memory of the block that runs (`translate`). Each thread is a fiber; threads and blocks run in an
order of chance (`seed`). The compiler calls the emulator at every load and store, so that every
access is checked for its bounds, for what it reads, and for a barrier between it and what other
threads do. Volatile stores reach other blocks late and in any order, but for fences. Folder
tests/simt/emulator holds the emulator in C++, one file a role.

The package registries have no emulator for CUDA C++: of Debian's and PyPI's, oclgrind takes OpenCL
and Numba's simulator takes kernels written in Python.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
Size = tuple[int, int, int]
Shape = tuple[int, ...]
# Whether this host rounds a*b + c once, and what a compiler has to be told for it.
_FUSES = platform.machine() != "x86_64" or " fma " in Path("/proc/cpuinfo").read_text()
_FUSING = ("-mfma",) if _FUSES and platform.machine() == "x86_64" else ()
# Plain C++ for the emulator; what a kernel is compiled with tells it of every access.
_PLAIN = ("-std=c++17", "-O2", "-w", "-fPIC", "-U_FORTIFY_SOURCE")
_CHECKED = (
    "-std=c++17",
    "-Og",  # compiles in half the time of -O1
    "-w",
    "-g1",
    "-fPIC",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds",
    "-fno-strict-aliasing",  # sources take a float4 from a float's address, as nvcc allows
    "-fno-exceptions",
)
# A product and a sum rounded twice, or once as on a GPU: for that g++ has to optimise.
_ROUNDED = {False: ("-ffp-contract=off",), True: ("-ffp-contract=fast", "-O2", *_FUSING)}
# Volatile accesses are told apart: words that blocks tell one another values by.
_VOLATILE = {
    "g++": ("--param=tsan-distinguish-volatile=1",),
    "clang++": ("-mllvm", "-tsan-distinguish-volatile=1"),
}
# Without the sanitizers' own libraries: the emulator has the functions that they would give.
_LINKED = ("-shared", "-nodefaultlibs", "-lm", "-lc")
_SHARED = re.compile(
    r"(?P<dynamic>extern\s+)?(?:static\s+)?__shared__\s+"
    r"(?:(?:alignas|__align__)\s*\(\s*(?P<align>\d+)\s*\)\s*)?"
    r"(?P<type>\w[\w:]*(?:\s+\w[\w:]*)*?)\s+(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\]\s*)*);"
)
_KERNEL = re.compile(
    r"__global__\s+(?P<words>(?:(?:void|__\w+__)\s*(?:\([^()]*\))?\s+)*)(?P<name>\w+)\s*\("
)
_BOUND = re.compile(r"__launch_bounds__\s*\(\s*(\d+)")


@dataclass(frozen=True)
class Launch:
    """One launch: arguments are names of arrays, None for a null pointer, or numbers.

    "x+8" points 8 bytes behind the beginning of x.
    """

    kernel: str
    grid: Size
    block: Size
    args: Sequence[str | int | float | None]
    shared: int = 0  # bytes of dynamic shared memory
    cluster: Size = (1, 1, 1)
    cooperative: bool = False


@dataclass(frozen=True)
class Finding:
    """What the emulator reports, once a kind and place; `source` is that line of the kernel."""

    kind: str
    text: str
    line: int
    source: str
    count: int


@dataclass(frozen=True)
class Run:
    """The arrays after the last launch, and what was found on the way."""

    arrays: Mapping[str, Array]
    findings: Sequence[Finding] = field(default_factory=tuple)

    @property
    def kinds(self) -> set[str]:
        """The kinds of what was found."""
        return {finding.kind for finding in self.findings}

    @property
    def clean(self) -> dict[str, Array]:
        """The arrays of a run that has to be without findings."""
        assert not self.findings, "\n".join(
            f"{f.kind}: {f.text} (line {f.line}: {f.source}; {f.count} times)"
            for f in self.findings
        )
        return dict(self.arrays)


def numpy_type(name: str) -> np.dtype[Any]:
    """The dtype of that name, bfloat16 among them."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def kernels_of(source: str) -> dict[str, int]:
    """The kernels a source holds, and their __launch_bounds__ (0: none)."""
    found: dict[str, int] = {}
    for match in _KERNEL.finditer(source):
        bound = _BOUND.search(match["words"])
        found[match["name"]] = max(found.get(match["name"], 0), int(bound[1]) if bound else 0)
    return found


def translate(source: str) -> str:
    """The C++ for a CUDA source: its text, and a register of its kernels behind it.

    A declaration of shared memory becomes that of a reference to the running block's own.
    """
    numbers = itertools.count(1)

    def declaration(match: re.Match[str]) -> str:
        kind, name, align = match["type"], match["name"], match["align"] or "1"
        dims = match["dims"].strip()
        if match["dynamic"]:
            return f'{kind}* {name} = simt::dynamic_shared<{kind}>("{name}", {align});'
        made = f'simt::shared<{kind}{dims}>({next(numbers)}, "{name}", {align})'
        return f"{kind} (&{name}){dims} = {made};"

    text = _SHARED.sub(declaration, source)
    if "__shared__" in text:
        at = text.index("__shared__")
        raise ValueError(
            f"a declaration of shared memory is not understood: {text[at : at + 80]!r}"
        )
    kernels = "".join(f"SIMT_KERNEL({n}, {bound})\n" for n, bound in kernels_of(source).items())
    return f'#include "simt.h"\n#line 1 "kernel.cu"\n{text}\n{kernels}'


class Program:
    """The kernels of one source, compiled."""

    def __init__(self, source: str, path: Path, runner: Path, folder: Path) -> None:
        self.source = source
        self.path = path
        self.runner = runner
        self.folder = folder  # for what its runs read and write
        self.kernels = tuple(kernels_of(source))
        self._lines = source.splitlines()
        self._runs = itertools.count()

    def run(
        self,
        launches: Iterable[Launch | Sequence[Any]],
        *,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[Shape, str]] | None = None,
        updates: Mapping[str, Array] | None = None,
        scratch: Mapping[str, tuple[Shape, str]] | None = None,
        seed: int = 0,
        misaligned: Mapping[str, int] | None = None,
        timeout: float = 120.0,
    ) -> Run:
        """Run launches one after another on arrays of exactly these sizes.

        inputs     may not be written
        outputs    (shape, dtype): hold NaN at first; each element has to be written
        updates    may be read and written; copies, the caller's arrays stay as they are
        scratch    (shape, dtype): hold NaN at first; may be read only where written
        misaligned bytes by which an array lies off the 256-byte alignment of a fresh allocation
        """
        made = [each if isinstance(each, Launch) else Launch(*each) for each in launches]
        given = {**inputs, **(updates or {})}
        empty = {
            name: np.empty(shape, numpy_type(dtype))
            for name, (shape, dtype) in {**(outputs or {}), **(scratch or {})}.items()
        }
        arrays = {n: np.asarray(a, order="C") for n, a in {**given, **empty}.items()}
        roles = {
            **dict.fromkeys(inputs, "input"),
            **dict.fromkeys(updates or {}, "update"),
            **dict.fromkeys(outputs or {}, "output"),
            **dict.fromkeys(scratch or {}, "scratch"),
        }
        assert len(roles) == sum(map(len, (inputs, outputs or {}, updates or {}, scratch or {})))
        lines = [f"seed {seed}"]
        for name, array in arrays.items():
            offset = 256 + (misaligned or {}).get(name, 0)
            lines.append(f"array {name} {roles[name]} {array.nbytes} {array.itemsize} {offset}")
        for launch in made:
            lines.extend(_request(launch, list(arrays)))
        head = "\n".join([*lines, "end"]) + "\n"
        stem = f"{self.path.parent.name}.{next(self._runs)}"
        files = [self.folder / f"{stem}.{end}" for end in ("in", "out")]
        files[0].write_bytes(head.encode() + b"".join(arrays[name].tobytes() for name in given))
        done = subprocess.run(
            [self.runner, self.path, *files],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"the emulator refused: {done.stderr}"
        result = files[1].read_bytes()
        for file in files:
            file.unlink()
        found, _, data = result.partition(b"end\n")
        return Run(dict(_split(data, arrays)), self.findings(found.decode()))

    def findings(self, text: str) -> list[Finding]:
        """The findings that the emulator wrote."""
        rows = [line.split("\t", 4) for line in text.splitlines()]
        lines = self._lines_of([pc for _, line, pc, _, _ in rows if line == "0"])
        found = []
        for kind, line, pc, count, message in rows:
            number = int(line) or lines.get(pc, 0)
            source = self._lines[number - 1].strip() if 0 < number <= len(self._lines) else ""
            found.append(Finding(kind, message, number, source, int(count)))
        return found

    def _lines_of(self, addresses: Sequence[str]) -> dict[str, int]:
        """The kernel's line behind each return address; 0 where the debugger's tool has none."""
        tool = shutil.which("addr2line")
        if not addresses or tool is None:
            return {}
        found = {}
        for address in set(addresses) - {"0"}:
            before = hex(int(address, 16) - 1)  # the call itself
            frames = subprocess.run(
                [tool, "-i", "-e", self.path, before], capture_output=True, text=True, check=True
            ).stdout
            lines = re.findall(r"kernel\.cu:(\d+)", frames)
            found[address] = int(lines[0]) if lines else 0
        return found


def _request(launch: Launch, names: Sequence[str]) -> list[str]:
    """The lines that ask for one launch."""
    sizes = " ".join(map(str, (*launch.grid, *launch.block, *launch.cluster)))
    head = f"launch {launch.kernel} {sizes} {launch.shared} {int(launch.cooperative)}"
    lines = [f"{head} {len(launch.args)}"]
    for arg in launch.args:
        if arg is None:
            lines.append("n")
        elif isinstance(arg, str):
            name, _, offset = arg.partition("+")
            lines.append(f"a {names.index(name)} {offset or 0}")
        elif isinstance(arg, int | np.integer):
            lines.append(f"i {int(arg)}")
        else:
            lines.append(f"f {float(arg).hex()}")
    return lines


def _split(data: bytes, arrays: Mapping[str, Array]) -> Iterable[tuple[str, Array]]:
    start = 0
    for name, array in arrays.items():
        part = np.frombuffer(data, array.dtype, array.size, start)
        yield name, part.reshape(array.shape).copy()
        start += array.nbytes


class Emulator:
    """Compiles sources, each once a session. `folder` is for files of this process.

    fuses: whether programs compiled with fused=True differ.
    """

    fuses = _FUSES

    def __init__(self, folder: Path, code: Path, make_once: Callable[..., Path]) -> None:
        self.folder = folder
        self.code = code
        self._make_once = make_once
        compiler = shutil.which("g++") or shutil.which("clang++")
        assert compiler, "a C++ compiler is needed: install g++ or clang++"
        self.compiler = compiler
        self._volatile = _VOLATILE[Path(compiler).name]
        self._programs: dict[tuple[str, bool], Program] = {}
        self.engine = make_once("emulator", self._compile_engine)
        self.driver = self.engine / "libsimt.so"
        self.runner = self.engine / "runner"

    def _compile_engine(self, folder: Path) -> None:
        files = sorted(self.code.glob("*.cpp"))
        objects = [str(folder / f"{file.stem}.o") for file in files]
        self._together(
            (*_PLAIN, "-c", str(file), "-o", made)
            for file, made in zip(files, objects, strict=True)
        )
        main, driver = str(folder / "main.o"), str(folder / "libsimt.so")
        objects.remove(main)
        self._together([("-shared", *objects, "-o", driver, "-ldl")])
        self._together([(main, driver, "-o", str(folder / "runner"))])
        if Path(self.compiler).name == "g++":
            # Half of what a small source takes; g++ takes it where it would take simt.h.
            header = ("-x", "c++-header", str(self.code / "simt.h"))
            words = (*_CHECKED, *_ROUNDED[False], *self._volatile, *header)
            self._run((*words, "-o", str(folder / "simt.h.gch")))

    def compile(self, source: str, *, fused: bool = False) -> Program:
        """The program of one source. fused: a*b + c is rounded once, where the host can."""
        return self.compile_all([source], fused=fused)[0]

    def compile_all(self, sources: Sequence[str], *, fused: bool = False) -> list[Program]:
        """The programs of several sources, compiled side by side."""
        wanted = [(each, fused) for each in sources]
        missing = [each for each in dict.fromkeys(wanted) if each not in self._programs]
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda each: self._program(*each), missing)
            self._programs.update(zip(missing, made, strict=True))
        return [self._programs[each] for each in wanted]

    def _program(self, source: str, fused: bool) -> Program:
        def make(folder: Path) -> None:
            file = folder / "program.cpp"
            file.write_text(translate(source), encoding="utf-8")
            words = (f"-I{self.engine}", f"-I{self.code}", str(file), str(self.driver))
            made = ("-o", str(folder / "program.so"))
            rounded = _ROUNDED[fused]
            self._run((*_CHECKED, *rounded, *self._volatile, *_LINKED, *words, *made))

        name = f"program-{hashlib.sha256(source.encode()).hexdigest()[:16]}{'-fused' * fused}"
        path = self._make_once(name, make) / "program.so"
        return Program(source, path, self.runner, self.folder)

    def _together(self, commands: Iterable[Sequence[str]]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._run, commands))

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            [self.compiler, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory, make_once: Callable[..., Path]) -> Emulator:
    """The emulator, compiled once a session."""
    code = Path(__file__).parent / "emulator"
    return Emulator(tmp_path_factory.mktemp("simt"), code, make_once)


@pytest.fixture(scope="session")
def launch() -> Callable[..., Launch]:
    """Makes a `Launch`: kernel, grid, block, args, then shared=, cluster=, cooperative=."""
    return Launch


@pytest.fixture(scope="session")
def numpy_dtype() -> Callable[[str], np.dtype[Any]]:
    """The NumPy dtype of a name, bfloat16 among them."""
    return numpy_type
