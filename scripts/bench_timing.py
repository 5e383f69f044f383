"""Timing in one process with pools kept apart and the heap in a known state."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Thread pools spin for some milliseconds after their last task. With as many spinning threads as
# cores the next pool would share its cores with them.
_POOL_REST = 0.020
# mallopt's parameter numbers (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the 20th and the 80th percentile, the fastest, and how many.

    On a busy machine the fastest call is the one nobody disturbed; on a quiet one it is near the
    median.
    """

    median: float
    low: float
    high: float
    best: float
    calls: int


def set_heap(*, warm: bool) -> bool:
    """Let freed memory be kept for the next call (warm), or given back to the system (cold).

    A cold heap faults every page of a fresh large output in anew, which costs more than many
    kernels. Returns False where the C library has no mallopt (only glibc has it): the heap is then
    as the system leaves it.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return False
    if warm:
        libc.mallopt(_MMAP_MAX, 0)
        # Never; the largest number it takes is passed by two arrays of 1 GB.
        libc.mallopt(_TRIM_THRESHOLD, -1)
    else:
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, 128 * 1024)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
    return True


def wait_for_quiet(limit: float) -> bool:
    """Wait until the machine has been idle for two seconds, `limit` seconds at most.

    Idle is at most a twentieth of the cores' time, read from /proc/stat. Returns False where it
    never was, or where the system does not say.
    """
    end = time.monotonic() + limit
    while True:
        before = _idle_ticks()
        if before is None:
            return False
        time.sleep(2.0)
        after = _idle_ticks()
        if after is not None and after[0] - before[0] >= 0.95 * (after[1] - before[1]):
            return True
        if time.monotonic() >= end:
            return False


def _idle_ticks() -> tuple[int, int] | None:
    """Clock ticks of all cores since the start: idle, and all together."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(word) for word in path.read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def time_apart(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time each call in turn, `rounds` times over, resting between them.

    In a round a call is repeated for about `seconds` (at least twice), after two calls that are not
    timed. Taking turns spreads a slow moment of the machine over all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_POOL_REST)
            call()
            call()
            end = time.perf_counter() + seconds
            taken = samples[name]
            least = len(taken) + 2
            while len(taken) < least or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return {name: _summary(taken) for name, taken in samples.items()}


def time_small(call: Callable[[], object], *, batches: int = 60, batch: int = 500) -> float:
    """Seconds a call of microseconds: the fastest batch of many calls.

    The clock is read around each batch. A slower batch was interrupted: it says something of the
    machine and nothing of the call.
    """
    taken = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(batch):
            call()
        taken.append((time.perf_counter() - start) / batch)
    return min(taken)


def _summary(taken: list[float]) -> Timing:
    ordered = sorted(taken)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[round(0.2 * last)],
        high=ordered[round(0.8 * last)],
        best=ordered[0],
        calls=len(ordered),
    )
