"""Rows of docs/reliability.md: threads and processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import normgraph as ng

Row = Callable[[object], None]

# On both sides of the size from which a call is shared out among threads.
SIZES = ((2, 37), (5, 601), (9, 1031), (31, 257))


def in_threads(work: Callable[[int], None]) -> None:
    """Run it in eight threads at once, and fail where one of them does."""
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        start.wait()
        try:
            work(seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_eight_threads(norm: Any, stress_seconds: float, row: Row) -> None:
    """eight threads that use one operator"""
    end = time.monotonic() + stress_seconds
    calls = [0] * 8

    def work(seed: int) -> None:
        """Each result is, bit for bit, the first one for the same input, which was checked."""
        cases = []
        for n, length in SIZES:
            x = norm.x(n, length, seed)
            dy = x[::-1].copy()
            norm.check(x)
            y = norm.op.forward(x, norm.gamma, norm.beta)
            gradients = norm.op.backward(dy, x, norm.gamma, y.mean, y.inv_std)
            cases.append((dy, x, y, gradients))
        while time.monotonic() < end:
            for dy, x, y, gradients in cases:
                again = norm.op.forward(x, norm.gamma, norm.beta)
                back = norm.op.backward(dy, x, norm.gamma, y.mean, y.inv_std)
                for got, first in zip((*again, *back), (*y, *gradients), strict=True):
                    assert got.tobytes() == first.tobytes()
                calls[seed] += 1

    in_threads(work)
    assert min(calls) > 0
    row("right")


def test_fork_after_use(run_python: Callable[..., str], row: Row) -> None:
    """a child forked after the parent has computed on several threads"""
    said = run_python("""
ng.set_num_threads(2)
op = ng.load(sys.argv[1])
x = data(64, 4000)
assert right(op, x)
for turn in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if right(op, x) else 1)
    end = time.monotonic() + 30
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert right(op, x)
print("right")
""")
    row(said.strip())


def test_concurrent_load(norm_artifact: Path, norm_of: Any, row: Row) -> None:
    """eight threads that load one artifact at once"""

    def work(seed: int) -> None:
        for _ in range(5):
            norm = norm_of(ng.load(norm_artifact))
            norm.check(norm.x(2, 11, seed))

    in_threads(work)
    row("right")


def test_many_loads(run_python: Callable[..., str], row: Row) -> None:
    """loading and dropping the same file 200 times"""
    said = run_python("""
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

x = data(2, 5)
for _ in range(50):
    assert right(ng.load(sys.argv[1]), x)
before = resident()
for _ in range(200):
    assert right(ng.load(sys.argv[1]), x)
grown = resident() - before
print("no growth" if grown < 2**20 else f"grows by {grown} bytes")
""")
    row(said.strip())
