"""Operators loaded and dropped again and again leave no mapping, thread, file or memory behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import normgraph as ng

# argv: artifacts. Prints how often each was loaded.
_CYCLES = """
import gc, os, sys
import numpy as np
import normgraph as ng

x = np.ones((16, 6, 1031), np.float32)
ones = np.ones(6, np.float32)

def cycle(path):
    op = ng.load(path)
    y = op.inference(x, ones, ones)
    assert (y == 1).all()

def state():
    gc.collect()
    code = [line for line in open("/proc/self/maps") if " r-xp " in line]
    ours = sum("kernels-" in line or "memfd:normgraph-" in line for line in code)
    pages = int(open("/proc/self/statm").read().split()[1])
    threads, files = (len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd"))
    return (ours, len(code), threads, files), pages * os.sysconf("SC_PAGESIZE")

ng.set_num_threads(3)
for turn in range(50):
    for path in sys.argv[1:]:
        cycle(path)
before = state()
for turn in range(1000):
    for path in sys.argv[1:]:
        cycle(path)
after = state()
assert after[0] == before[0], (before, after)
assert after[0][0] == 1, after  # the library that the thread pool came with
assert after[1] - before[1] < 2**20, (before, after)  # half a kilobyte a cycle
print("fine")
"""


def test_thousands_of_operators_come_and_go(build_artifact: Callable[..., Path]) -> None:
    paths = [
        build_artifact(spec, ("N", 6, "L"), "float32", ("inference",))
        for spec in (ng.NormSpec("instance_norm"), ng.NormSpec("group_norm", groups=2))
    ]
    done = subprocess.run(
        [sys.executable, "-c", _CYCLES, *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"
