"""What an artifact costs beside its kernels: compile, load, size, a small call, memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import normgraph
from normgraph import NormSpec
from normgraph.scripts.bench_overheads import call_costs, small_shape

_KINDS = ("forward", "inference", "backward")
_LOADS = 7


@dataclass(frozen=True)
class Costs:
    """Of one artifact with forward, inference and backward.

    compile         seconds a graph, in a process that has compiled before, the self-test included
    load            seconds to check it, open it and load the library
    size            bytes of all its files; library: of the library alone
    calls           seconds a small call by kind, serial: inference and forward into given arrays,
                    backward with fresh ones, and forward with its arrays bound
    call_shape      the shape of those calls
    memory          bytes by kind the process grows by in a call with all arrays given
    memory_shape    the shape of those
    """

    op: str
    compile: float
    load: float
    size: int
    library: int
    calls: dict[str, float]
    call_shape: tuple[int, ...]
    memory: dict[str, int]
    memory_shape: tuple[int, ...]


def costs_of(
    spec: NormSpec, declared: tuple[int | str, ...], memory_shape: tuple[int, ...]
) -> Costs:
    """Build the artifact and measure all of it."""
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        graphs, path = Path(folder, "graphs"), Path(folder, "cpu")
        normgraph.graphs.export(spec, shape=declared, out=graphs, kinds=_KINDS)
        # The first build of a process imports TVM.
        normgraph.compile.build(graphs, target="cpu", out=Path(folder, "first"), cache=False)
        start = time.perf_counter()
        normgraph.compile.build(graphs, target="cpu", out=path, cache=False)
        taken = time.perf_counter() - start
        files = [each for each in path.rglob("*") if each.is_file()]
        shape = small_shape(declared) or ()
        return Costs(
            op=spec.op,
            compile=taken / len(_KINDS),
            load=_load_time(path),
            size=sum(each.stat().st_size for each in files),
            library=sum(each.stat().st_size for each in files if each.suffix == ".so"),
            calls=call_costs(path, shape) if shape else {},
            call_shape=shape,
            memory=_memory(path, memory_shape),
            memory_shape=memory_shape,
        )


def _load_time(path: Path) -> float:
    normgraph.load(path)
    taken = []
    for _ in range(_LOADS):
        start = time.perf_counter()
        normgraph.load(path)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _memory(path: Path, shape: tuple[int, ...]) -> dict[str, int]:
    """In a process of its own: nothing else may grow meanwhile."""
    command = [sys.executable, "-m", "normgraph.scripts.bench_memory", str(path)]
    done = subprocess.run(
        [*command, ",".join(map(str, shape))], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found
