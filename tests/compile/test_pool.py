"""The thread pool of the libraries: every task once, errors, forks, many libraries, scratch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng

# Put before the scripts below: a probe, and loops of it that are held against what they must give.
_PROBE = """
import os, sys, threading, time
import numpy as np
import tvm_ffi

def tell(threads):
    tvm_ffi.get_global_func("normgraph.set_num_threads")(threads)

def right(module, elements=1000, num_task=0):
    hits = np.zeros(elements, np.int32)
    module["run"](elements, hits.ctypes.data, -1, 0, num_task)
    return bool((hits == 1).all())

def own_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile
    return sorted(name for name in names if name.startswith("normgraph-"))

def in_child(module, check):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if check(module) else 2
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        time.sleep(0.001)
    os.kill(child, 9)
    raise SystemExit("a child hangs")
"""


@pytest.fixture
def probe(probe_library: Path) -> Iterator[Any]:
    """The probe in this process; the number of threads is put back afterwards."""
    module = tvm_ffi.load_module(str(probe_library))
    before = ng.get_num_threads()
    yield module
    ng.set_num_threads(before)


@pytest.fixture(scope="module")
def script(probe_library: Path) -> Callable[..., str]:
    """script(text, *arguments): what it prints, run by itself with the probe's path first."""

    def run(text: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROBE + text, str(probe_library)]
            + [str(each) for each in arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    return run


def _run(probe: Any, elements: int, *, refused: int = -1, inner: int = 0, num_task: int = 0) -> Any:
    hits = np.zeros(elements * max(inner, 1), np.int32)
    probe["run"](elements, hits.ctypes.data, refused, inner, num_task)
    return hits


@pytest.mark.parametrize("count", range(1, 9))
def test_each_element_is_met_once(count: int, probe: Any) -> None:
    ng.set_num_threads(count)
    for elements in (1, 2, 7, 64, 1000, 100_000):
        for _ in range(20):
            assert (_run(probe, elements) == 1).all()


@pytest.mark.parametrize("num_task", [1, 3, 1000, 5000])
def test_as_many_tasks_as_are_asked_for(num_task: int, probe: Any) -> None:
    ng.set_num_threads(4)
    assert (_run(probe, 4999, num_task=num_task) == 1).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_so_many_threads_work_at_once(count: int, probe: Any) -> None:
    ng.set_num_threads(count)
    assert probe["threads_at_once"](count) == count


def test_a_long_loop_is_cut_finer_than_a_short_one(probe: Any) -> None:
    """Four tasks a thread, and one; a loop is timed again now and then."""
    ng.set_num_threads(3)

    def becomes(tasks: int, microseconds: int) -> bool:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if probe["tasks"](microseconds) == tasks:
                return True
        return False

    assert probe["tasks"](200) == 12  # not known yet
    assert all(probe["tasks"](200) == 12 for _ in range(40))
    assert becomes(3, 0)
    assert becomes(12, 200)


def test_an_error_of_a_task_reaches_the_caller(probe: Any) -> None:
    ng.set_num_threads(3)
    for refused in (0, 50, 99):
        with pytest.raises(ValueError, match="an element is refused"):
            _run(probe, 100, refused=refused)
    assert (_run(probe, 100) == 1).all()


def test_a_loop_in_a_task(probe: Any) -> None:
    ng.set_num_threads(3)
    assert (_run(probe, 50, inner=40) == 1).all()


def test_eight_threads_launch_at_once(probe: Any) -> None:
    """Eight callers over three threads, while a ninth changes the number of threads."""
    end = time.monotonic() + 3.0
    wrong: list[int] = []
    launches = [0] * 8

    def work(place: int) -> None:
        while time.monotonic() < end:
            elements = 1 + (launches[place] * 37 + place) % 3000
            if not (_run(probe, elements) == 1).all():
                wrong.append(elements)
            launches[place] += 1

    callers = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for caller in callers:
        caller.start()
    count = 0
    while time.monotonic() < end:
        ng.set_num_threads(1 + count % 6)
        count += 1
        time.sleep(0.002)
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []
    assert min(launches) > 0


def test_threads_begin_with_the_first_loop_and_have_names(script: Callable[..., str]) -> None:
    out = script(
        """
module = tvm_ffi.load_module(sys.argv[1])
tell(4)
assert own_threads() == []
assert module["threads_at_once"](4) == 4
print(*own_threads())
for task in os.listdir("/proc/self/task"):
    status = open(f"/proc/self/task/{task}/status").read()
    if status.startswith("Name:\\tnormgraph-"):
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        # Stopped by no signal but those of its own faults, and the two nobody can block.
        assert blocked & (1 << 2 - 1) and blocked & (1 << 15 - 1) and not blocked & (1 << 11 - 1)
tell(2)
end = time.monotonic() + 30
while own_threads() != ["normgraph-1"] and time.monotonic() < end:
    time.sleep(0.01)
print(*own_threads())
"""
    )
    assert out.splitlines() == ["normgraph-1 normgraph-2 normgraph-3", "normgraph-1"]


def test_idle_threads_sleep(script: Callable[..., str]) -> None:
    out = script(
        """
module = tvm_ffi.load_module(sys.argv[1])
tell(4)
assert module["threads_at_once"](4) == 4
time.sleep(0.2)
before = time.process_time()
time.sleep(1.0)
print(time.process_time() - before)
"""
    )
    assert float(out) < 0.1


def test_a_child_works_after_a_fork(script: Callable[..., str]) -> None:
    script(
        """
module = tvm_ffi.load_module(sys.argv[1])
tell(3)
assert right(module)
for _ in range(20):
    in_child(module, right)
    assert right(module)
in_child(module, lambda module: module["threads_at_once"](3) == 3)
in_child(module, lambda module: in_child(module, right) is None and right(module))
"""
    )


def test_a_fork_while_other_threads_launch(script: Callable[..., str]) -> None:
    script(
        """
module = tvm_ffi.load_module(sys.argv[1])
tell(3)
stop = False
def launch():
    while not stop:
        assert right(module, 20_000)
others = [threading.Thread(target=launch) for _ in range(2)]
for other in others:
    other.start()
def check(module):
    return all(right(module, 5000) for _ in range(20)) and module["threads_at_once"](3) == 3
for _ in range(30):
    in_child(module, check)
stop = True
for other in others:
    other.join()
"""
    )


def test_libraries_share_one_pool_that_outlives_them(
    script: Callable[..., str], probe_library: Path, tmp_path: Path
) -> None:
    """Five libraries, each loaded and unloaded 1000 times: no more threads, mappings or memory."""
    copies = [shutil.copy(probe_library, tmp_path / f"copy-{i}.so") for i in range(5)]
    out = script(
        """
import gc
def state():
    mapped = sum("copy-" in line for line in open("/proc/self/maps"))
    pages = int(open("/proc/self/statm").read().split()[1])
    return mapped, len(os.listdir("/proc/self/task")), pages
def cycle(path):
    module = tvm_ffi.load_module(path, keep_module_alive=False)
    assert right(module)
    del module
for path in sys.argv[2:]:
    cycle(path)
tell(3)
loaded = [tvm_ffi.load_module(path, keep_module_alive=False) for path in sys.argv[2:]]
assert all(module["threads_at_once"](3) == 3 for module in loaded)
assert own_threads() == ["normgraph-1", "normgraph-2"], own_threads()
del loaded
gc.collect()
before = state()
for turn in range(1000):
    for path in sys.argv[2:]:
        cycle(path)
after = state()
assert after[:2] == before[:2], (before, after)
assert (after[2] - before[2]) * os.sysconf("SC_PAGESIZE") < 2**20, (before, after)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "copy-" in line}))
""",
        *copies,
    )
    assert out.split() == ["1"]  # the one that offers the pool stays


def test_threads_beyond_what_the_system_gives(script: Callable[..., str]) -> None:
    """Where no thread can be started, the calling one does all."""
    script(
        """
import ctypes, resource
module = tvm_ffi.load_module(sys.argv[1])
tell(200)
ctypes.CDLL(None).mallopt(-8, 1)  # one arena: that of a thread would take an unknown part
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
# 30 stacks of 8 MiB with their guard pages, and half of one for what these threads allocate.
most = used + 30 * (2**23 + 4096) + 2**22
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert right(module, 100_000) and right(module)
assert len(own_threads()) < 199
"""
    )


def _scratch(probe: Any, size: int, count: int) -> list[int]:
    blocks = np.zeros(count, np.int64)
    probe["scratch"](size, blocks.ctypes.data, count)
    return [int(block) for block in blocks]


def test_scratch_is_aligned_and_kept(probe: Any) -> None:
    for size in (0, 1, 1000, 300_000, 2**26):
        blocks = _scratch(probe, size, 3)
        assert all(block % 64 == 0 for block in blocks)
        assert len(set(blocks)) == 3
    first = _scratch(probe, 5000, 2)
    assert sorted(_scratch(probe, 4000, 2)) == sorted(first)


def test_scratch_of_threads_goes_with_them(probe: Any) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def work() -> None:
        _scratch(probe, 2**20, 4)

    sizes = []
    for _ in range(3):
        for _ in range(100):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        sizes.append(resident())
    assert sizes[-1] - sizes[0] < 20 * 2**20  # one thread keeps up to 4 MiB


def test_no_memory_for_scratch_is_an_error(probe: Any) -> None:
    with pytest.raises(MemoryError, match="workspace"):
        _scratch(probe, 2**60, 1)
