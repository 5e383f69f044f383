"""Threads of several pools in one process: how many, and which core each is bound to.

A pool that spins while another works takes a core from it, and two threads of one team on one core
wait for the scheduler's turns, 4 or 8 ms at a time. So the calling thread is bound to the first
core and the OpenMP threads, which torch, Inductor and the memory limits share, to those after it.
TVM binds its own threads so, and onnxruntime is told to. Ours leave the core of the calling thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import normgraph
from normgraph.runtime.threads import MOST_THREADS

# The system counts a thread's time in hundredths of a second.
_WATCHED = 0.15


@functools.cache
def cores() -> int:
    """How many cores this process may use, as it was at the first call."""
    return len(allowed())


@functools.cache
def allowed() -> tuple[int, ...]:
    """The cores this process may use, as it was at the first call, before any thread is bound."""
    return tuple(sorted(os.sched_getaffinity(0)))


def prepare(threads: int) -> int:
    """Size the pools to come, and say how many threads our kernels will use."""
    allowed()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    normgraph.set_num_threads(min(threads, MOST_THREADS))
    return normgraph.get_num_threads()


@contextlib.contextmanager
def bound(threads: int) -> Iterator[bool]:
    """The calling thread and torch's OpenMP threads on a core each; yields whether that was done.

    OpenMP reads its own settings when it is loaded, which importing the runtime may have done
    before; so its threads are found by the processor time they take while it works.
    """
    before = os.sched_getaffinity(0)
    done = False
    if threads > 1 and len(allowed()) >= threads and importlib.util.find_spec("torch") is not None:
        done = _bind_team(_openmp_work(threads), threads)
    try:
        yield done
    finally:
        os.sched_setaffinity(0, before)


def _bind_team(work: Callable[[], object], threads: int) -> bool:
    """Bind the threads that take processor time while `work` is called again and again."""
    main = threading.get_native_id()
    start = _processor_time()
    end = time.monotonic() + _WATCHED
    while time.monotonic() < end:
        work()
    taken = {each: ticks - start.get(each, 0) for each, ticks in _processor_time().items()}
    team = sorted((each for each in taken if each != main), key=lambda each: -taken[each])
    team = [each for each in team[: threads - 1] if taken[each] > 0]
    if len(team) != threads - 1:
        return False
    for thread, core in zip((main, *team), allowed(), strict=False):
        os.sched_setaffinity(thread, {core})
    return True


def _openmp_work(threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    values = torch.zeros(1 << 21)
    return functools.partial(torch.add, values, values, out=torch.empty_like(values))


def _processor_time() -> dict[int, int]:
    """Ticks each thread of this process has run."""
    found = {}
    for path in Path("/proc/self/task").glob("*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        found[int(path.parent.name)] = int(words[11]) + int(words[12])
    return found
