"""What an artifact adds to a start: `python -m normgraph.scripts.bench_start ARTIFACT [--runs 9]`.

Each run is a process of its own. It imports numpy and tvm_ffi, then normgraph's runtime, loads the
artifact and calls its first kind once, with small arrays. Prints the milliseconds that each of
these took (the median of the runs) and the resident memory that it added.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import normgraph
from normgraph.errors import ArtifactError, NormGraphError
from normgraph.scripts.argument_types import path, whole
from normgraph.scripts.bench_overheads import small_shape
from normgraph.scripts.console import log, table

STEPS = ("import numpy, tvm_ffi", "import normgraph.runtime", "load", "first call")
# What the last three may add together.
MOST_SECONDS, MOST_BYTES = 0.040, 15 << 20

# Prints a list of (wall seconds, processor seconds, bytes), one for each of STEPS, and the modules
# that the last three imported. argv: the artifact, and sizes of its dimensions by name.
_CHILD = """
import json, os, sys, time

def now():
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return time.perf_counter(), time.process_time(), pages * os.sysconf("SC_PAGESIZE")

marks = [now()]
import numpy
import tvm_ffi
marks.append(now())
before = set(sys.modules)
start = now()
import normgraph.runtime
marks.append(now())
operator = normgraph.runtime.load(sys.argv[1])
marks.append(now())
sizes = json.loads(sys.argv[2])
kind = operator.kinds[0]
inputs = [
    numpy.ones([sizes.get(dim, dim) for dim in entry["shape"]], entry["dtype"])
    for entry in operator.manifest["kinds"][kind]["inputs"]
]
ready = now()
getattr(operator, kind)(*inputs)
marks.append(now())
pairs = [(marks[0], marks[1]), (start, marks[2]), (marks[2], marks[3]), (ready, marks[4])]
steps = [[b - a for a, b in zip(*pair)] for pair in pairs]
print(json.dumps({"steps": steps, "modules": sorted(set(sys.modules) - before)}))
"""


@dataclass(frozen=True)
class Start:
    """Wall seconds, processor seconds and bytes of each step, and what the last three imported."""

    wall: tuple[float, ...]
    processor: tuple[float, ...]
    memory: tuple[int, ...]
    modules: tuple[str, ...]


def start(path: str | os.PathLike[str], sizes: Mapping[str, int]) -> Start:
    """Start a process that loads the artifact and calls it."""
    command = [sys.executable, "-c", _CHILD, os.fspath(path), json.dumps(sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ArtifactError(f"{path}: a process that loads and calls it failed: {done.stderr}")
    found = json.loads(done.stdout)
    wall, processor, memory = zip(*found["steps"], strict=True)
    return Start(wall, processor, memory, tuple(found["modules"]))


def sizes_of(declared: Sequence[int | str]) -> dict[str, int]:
    """Small sizes for the names among the dimensions of x."""
    shape = small_shape(tuple(declared)) or ()
    return {dim: size for dim, size in zip(declared, shape, strict=False) if isinstance(dim, str)}


def report(starts: Sequence[Start]) -> str:
    """The table, and whether the last three steps together keep to what they may add."""
    wall = [statistics.median(each) for each in zip(*(one.wall for one in starts), strict=True)]
    memory = [statistics.median(each) for each in zip(*(one.memory for one in starts), strict=True)]
    added = statistics.median(sum(one.wall[1:]) for one in starts)
    grown = statistics.median(sum(one.memory[1:]) for one in starts)
    steps = zip((*STEPS, "the last three"), (*wall, added), (*memory, grown), strict=True)
    rows = [(name, f"{1e3 * taken:.1f}", f"{size / 2**20:.2f}") for name, taken, size in steps]
    kept = added <= MOST_SECONDS and grown <= MOST_BYTES
    bounds = f"{1e3 * MOST_SECONDS:.0f} ms and {MOST_BYTES >> 20} MB"
    verdict = f"within {bounds}" if kept else f"more than {bounds}"
    return f"{table(rows, ('step', 'ms', 'MB'))}\n\n{verdict}"


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="bench_start", description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=path)
    parser.add_argument("--runs", type=whole(1), default=9)
    options = parser.parse_args()
    try:
        sizes = sizes_of(normgraph.load(options.artifact).shape)
        starts = [start(options.artifact, sizes) for _ in range(options.runs + 1)]
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    print(report(starts[1:]))  # the first one reads the files from the disk
    return 0


if __name__ == "__main__":
    sys.exit(main())
