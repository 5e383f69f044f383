"""How many threads kernels use.

All artifacts of a process share one pool, which comes with the first library that is loaded
(compile/thread_pool.c). It starts its threads when a kernel first needs them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, SupportsIndex

import tvm_ffi

from normgraph.errors import ArgumentError, ArgumentTypeError

VARIABLE = "NORMGRAPH_NUM_THREADS"
MOST_THREADS = 256

_lock = threading.Lock()
# What was asked for while there was no pool to tell.
_asked: int | None = None


def _unlock() -> None:
    """In a forked child: nobody is left there to release the lock, should it have been held."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)


def set_num_threads(n: SupportsIndex, /) -> None:
    """Let each later call of a kernel use at most n threads, the calling one included.

    n: from 1 to 256; 1 runs everything on the calling thread. It holds for the whole process and
    goes before the environment variable NORMGRAPH_NUM_THREADS. Calls under way are not changed.
    Results do not depend on it.
    """
    global _asked
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise ArgumentTypeError(f"set_num_threads: expected a whole number, but {n!r} came.")
    threads = n.__index__()
    if not 1 <= threads <= MOST_THREADS:
        raise ArgumentError(
            f"set_num_threads: expected 1 to {MOST_THREADS}, but {threads} came. Give the number of"
            f" threads a kernel may use; 1 for the calling one alone."
        )
    with _lock:
        tell = _pool("set_num_threads")
        _asked = threads if tell is None else None
        if tell is not None:
            tell(threads)


def get_num_threads() -> int:
    """The number of threads that kernels may use.

    Until it is set: NORMGRAPH_NUM_THREADS, or else the CPUs that the process may use (affinity),
    but no more than its control group's CPU quota, rounded up.

    Raises ArgumentError where nothing was set and NORMGRAPH_NUM_THREADS is not such a number.
    """
    with _lock:
        if _asked is not None:
            return _asked
        ask = _pool("get_num_threads")
    try:
        if ask is not None:
            return int(ask())
    except ValueError:  # the variable is wrong, which is said below
        pass
    wanted = from_environment()
    return wanted or min(len(_cpus()), cpu_quota(Path("/")) or MOST_THREADS, MOST_THREADS)


def prepare() -> None:
    """Once a library is loaded: tell its pool what was asked for."""
    global _asked
    with _lock:
        tell = _pool("set_num_threads")
        if _asked is not None and tell is not None:
            tell(_asked)
            _asked = None


def from_environment() -> int | None:
    """NORMGRAPH_NUM_THREADS, or None where it is not set or empty; ArgumentError if it is wrong."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_THREADS:
        return int(text)
    raise ArgumentError(
        f"{VARIABLE}: expected a whole number from 1 to {MOST_THREADS}, but it is {text!r}. Set it"
        f" to the number of threads a kernel may use, or unset it."
    )


def cpu_quota(root: Path) -> int | None:
    """How many CPUs the control groups of this process allow, rounded up; None for no limit.

    root: where /proc and /sys/fs/cgroup are. The groups above count as well. In a container the
    path of its group may be the host's, and the group itself is then mounted at the top.
    """
    limits = []
    for line in _lines(root / "proc/self/cgroup"):
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in ("cpu", "cpu,cpuacct") if controllers else ("", "unified"):
            place = root / "sys/fs/cgroup" / mount
            parts = [part for part in group.split("/") if part]
            for depth in range(len(parts) + 1):
                limits.append(_limit(place.joinpath(*parts[:depth]), v2=not controllers))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path, *, v2: bool) -> int | None:
    if v2:
        words = " ".join(_lines(group / "cpu.max")).split()
    else:
        words = _lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        return None  # "max" and -1 set no limit
    return -(-int(words[0]) // int(words[1]))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpus() -> set[int]:
    """The CPUs of all threads together: a pool may have bound the calling one to one of them."""
    cpus: set[int] = set()
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:  # no /proc here
        return os.sched_getaffinity(0)
    for thread in threads:
        try:
            cpus |= os.sched_getaffinity(int(thread))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return cpus


def _pool(name: str) -> Any:
    return tvm_ffi.get_global_func(f"normgraph.{name}", allow_missing=True)
