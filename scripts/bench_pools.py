"""The same kernels on our thread pool and on TVM's: `python -m normgraph.scripts.bench_pools`.

Kernels are compiled once and linked twice: as in an artifact, and with the pointers to TVM's
runtime left open, which its loader sets. Both libraries take turns in one process on the same
arrays, after they gave the same bits. Then a small loop is timed launch by launch, on OpenMP's pool
as well. Prints Markdown. Times are microseconds: the 20th percentile of the calls.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

import normgraph
from normgraph import NormSpec
from normgraph.compile import graph_files, link, pipeline
from normgraph.compile.targets import Target, resolve
from normgraph.errors import AccuracyError, NormGraphError
from normgraph.scripts.argument_types import seconds, whole
from normgraph.scripts.bench_batch import Batch
from normgraph.scripts.bench_report import machine, machine_line, markdown_table
from normgraph.scripts.bench_threads import cores, prepare
from normgraph.scripts.bench_timing import time_apart
from normgraph.scripts.console import Progress, log
from normgraph.scripts.verify import versions

Array = NDArray[Any]
Sizes = Sequence[tuple[int, ...]]

KINDS = ("inference", "backward")
_IMAGES = ((2, 64, 32, 32), (8, 64, 56, 56), (64, 64, 96, 96))
_ROWS = ((64, 1024), (1024, 1024), (32768, 1024))
# An operator, the extents it is compiled for, and the shapes it is timed at.
CASES: tuple[tuple[NormSpec, tuple[int | str, ...], Sizes], ...] = (
    (NormSpec("instance_norm"), ("N", 64, "H", "W"), _IMAGES),
    (NormSpec("batch_norm"), ("N", 64, "H", "W"), _IMAGES),
    (NormSpec("layer_norm"), ("N", 1024), _ROWS),
)
# Bytes of x from which on the arrays lie in main memory, and what we may take of TVM's time there.
# So long calls are few in a round, and have more rounds.
DRAM, BOUND, MORE_ROUNDS = 64 << 20, 1.05, 3

LOOPS = (0, 16384, 65536, 262144)
_SOURCE = Path(__file__).with_name("bench_pools.c")
# Microseconds between two launches, and how many there are in a round. Ours sleep in the longer.
PAUSES = {5: 2000, 300: 200}
_POOLS: dict[str, list[str]] = {
    "on the calling thread": ["-DSERIAL"],
    "ours": [],
    "OpenMP": ["-fopenmp"],
    "TVM's": [],
}
# TVM's pool is not told which loops are too small for it; none of these is.
_NO_HINT = f"int {link.STAY_ON_THREAD}(int small) {{ return small = 0; }}\n"
_PLAIN = ("-std=gnu11", "-O2", "-fno-tree-vectorize", "-fPIC")


@dataclass(frozen=True)
class Point:
    """Seconds of one kernel at one shape: on one thread, on our pool and on TVM's."""

    op: str
    kind: str
    shape: tuple[int, ...]
    single: float
    ours: float
    theirs: float

    @property
    def size(self) -> int:
        """Bytes of x."""
        return 4 * prod(self.shape)

    @property
    def ratio(self) -> float:
        """Our time by TVM's."""
        return self.ours / self.theirs


def measure(
    cases: Sequence[tuple[NormSpec, tuple[int | str, ...], Sizes]],
    threads: int,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[Point]:
    """Time every kind of every case; raises AccuracyError where the pools give different bits."""
    points = []
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        for place, (spec, declared, shapes) in enumerate(cases):
            progress(f"{spec.op}: compile")
            kernels = Kernels(spec, declared, Path(folder, str(place)))
            for shape in shapes:
                progress(f"{spec.op}: {','.join(map(str, shape))}")
                batch = Batch(spec, shape)
                for kind in KINDS:
                    points.append(kernels.time(kind, batch, threads, rounds, seconds))
    return points


class Kernels:
    """The kinds of one operator, compiled once and linked for either pool."""

    def __init__(self, spec: NormSpec, declared: tuple[int | str, ...], folder: Path) -> None:
        self.spec = spec
        source, goal = folder / "graphs", resolve("cpu")
        normgraph.graphs.export(spec, shape=declared, dtype="float32", out=source, kinds=KINDS)
        self.graphs = {graph.kind: graph for graph in graph_files.read(source)}
        dump = pipeline.Dump(None)
        scheduled = {
            kind: pipeline.schedule(kind, graph.model, goal, dump, log)
            for kind, graph in self.graphs.items()
        }
        binary = folder / "kernels.o"
        pipeline.generate(scheduled, goal, binary, dump)
        self.ours = _loaded(binary, goal, with_pool=True)
        self.theirs = _loaded(binary, goal, with_pool=False)

    def time(self, kind: str, batch: Batch, threads: int, rounds: int, seconds: float) -> Point:
        """One kernel at one shape, after a look at what it gives."""
        graph = self.graphs[kind]
        given = batch.take([port.name for port in graph.inputs])
        sizes = {
            dim: size
            for port in graph.inputs
            for dim, size in zip(port.shape, given[port.name].shape, strict=True)
            if isinstance(dim, str)
        }
        shapes = [[sizes.get(str(dim), dim) for dim in port.shape] for port in graph.outputs]
        goals = [np.empty(shape, np.float32) for shape in shapes]
        request = sum(1 << 2 * place for place in range(len(goals)))  # every output is written
        arrays = [tvm_ffi.from_dlpack(array) for array in (*given.values(), *goals)]
        calls = {
            name: functools.partial(module[kind], *arrays, request)
            for name, module in (("ours", self.ours), ("theirs", self.theirs))
        }
        _same_bits(calls, goals, f"{self.spec.op}, {kind}, {batch.shape}")
        if 4 * prod(batch.shape) >= DRAM:
            rounds *= MORE_ROUNDS
        timings = time_apart(calls, rounds=rounds, seconds=seconds)
        normgraph.set_num_threads(1)
        single = time_apart({"one": calls["ours"]}, rounds=2, seconds=seconds)["one"]
        normgraph.set_num_threads(threads)
        ours, theirs = (timings[name].low for name in ("ours", "theirs"))
        return Point(self.spec.op, kind, batch.shape, single.low, ours, theirs)


def _same_bits(
    calls: Mapping[str, Callable[[], object]], goals: Sequence[Array], what: str
) -> None:
    found = []
    for call in calls.values():
        for goal in goals:
            goal.fill(np.nan)
        call()
        found.append([goal.copy() for goal in goals])
    if not all(np.array_equal(a, b, equal_nan=False) for a, b in zip(*found, strict=True)):
        raise AccuracyError(f"{what}: the two pools gave different results")


def _loaded(binary: Path, goal: Target, *, with_pool: bool) -> Any:
    library = binary.with_name("ours.so" if with_pool else "theirs.so")
    if with_pool:
        link.link(binary, library, goal)
    else:
        command = [str(link.compiler(goal)), "-shared", "-fPIC", "-o", str(library), str(binary)]
        subprocess.run([*command, "-lm", "-xc", "-"], check=True, text=True, input=_NO_HINT)
    return tvm_ffi.load_module(str(library))


def launch_times(
    threads: int, rounds: int = 5, pauses: Mapping[int, int] = PAUSES
) -> dict[tuple[str, int], list[float]]:
    """Seconds of a launch for each of LOOPS, by pool and by the pause before it, taking turns."""
    source, target = np.ones(max(LOOPS), np.float32), np.empty(max(LOOPS), np.float32)
    found: dict[tuple[str, int], list[list[Array]]] = {}
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        modules = _launchers(Path(folder))
        for _ in range(rounds):
            for name, module in modules.items():
                for pause, launches in pauses.items():
                    for place, elements in enumerate(LOOPS):
                        time.sleep(0.02)
                        taken = np.zeros(launches, np.int64)
                        arrays = (source.ctypes.data, target.ctypes.data)
                        module["launches"](
                            elements, *arrays, threads, 1000 * pause, launches, taken.ctypes.data
                        )
                        found.setdefault((name, pause), [[] for _ in LOOPS])[place].append(taken)
    return {
        key: [float(np.percentile(np.concatenate(each), 20)) * 1e-9 for each in of_loops]
        for key, of_loops in found.items()
    }


def _launchers(folder: Path) -> dict[str, Any]:
    """The loop in bench_pools.c on each pool; OpenMP's where the compiler has it."""
    goal = resolve("cpu")
    compiler = [str(link.compiler(goal)), *_PLAIN]
    compiler += [f"-I{path}" for path in (find_include_path(), find_dlpack_include_path())]
    modules: dict[str, Any] = {}
    for name, flags in _POOLS.items():
        binary, library = folder / f"{len(modules)}.o", folder / f"{len(modules)}.so"
        command = [*compiler, *flags, "-c", str(_SOURCE), "-o", str(binary)]
        if subprocess.run(command, check=name != "OpenMP").returncode:
            continue
        if name == "ours":
            link.link(binary, library, goal)
        else:
            command = [compiler[0], "-shared", *flags, "-o", str(library), str(binary)]
            subprocess.run(command, check=True)
        modules[name] = tvm_ffi.load_module(str(library))
    return modules


def document(
    points: Sequence[Point],
    launches: Mapping[tuple[str, int], Sequence[float]],
    threads: int,
    about: Mapping[str, Any],
) -> str:
    """The tables as Markdown, and whether the bound holds."""
    lines = [
        machine_line(about),
        "Versions: " + ", ".join(f"{name} {each}" for name, each in versions().items()) + ".",
        f"Threads: {threads}.",
        "",
    ]
    rows = [
        (
            point.op,
            point.kind,
            "×".join(map(str, point.shape)),
            _size(point.size),
            *(_microseconds(each) for each in (point.single, point.ours, point.theirs)),
            f"{point.ratio:.3f}",
        )
        for point in points
    ]
    heads = ("operator", "kind", "shape", "x", "one thread", "ours", "TVM's", "ours / TVM's")
    lines += markdown_table(rows, heads)
    far = [point.ratio for point in points if point.size >= DRAM]
    if far:
        verdict = "held" if max(far) <= BOUND else "missed"
        lines += [
            "",
            f"From {_size(DRAM)} on, ours / TVM's is {min(far):.3f} to {max(far):.3f}; the bound of"
            f" {BOUND} is {verdict}.",
        ]
    if launches:
        cells = [
            (name, str(pause), *map(_microseconds, launches[name, pause]))
            for pause in PAUSES
            for name in _POOLS
            if (name, pause) in launches
        ]
        lines += ["", *markdown_table(cells, ("a launch", "after", *map(str, LOOPS)))]
    return "\n".join(lines)


def _microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _size(size: int) -> str:
    return f"{size / (1 << 20):.3g} MB"


def main() -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="bench_pools", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=whole(1, cores()), help="default: all cores")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--seconds", type=seconds, default=0.04, help="a pool and round")
    options = parser.parse_args()
    about = machine()
    threads = prepare(options.threads or cores())
    progress = Progress()
    try:
        launches = launch_times(threads)
        points = measure(CASES, threads, options.rounds, options.seconds, progress)
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    print(document(points, launches, threads, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
