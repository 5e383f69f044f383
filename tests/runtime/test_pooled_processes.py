"""Pooled memory over the life of a process: fork, shutdown, too little memory, growth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.runtime.memory_size import memory_size

# What every program below starts with: an operator, and arrays for a call of 480 KB.
START = """
import gc, os, sys, threading
import numpy as np
import normgraph as ng

op = ng.load(sys.argv[1])
x = np.arange(120000, dtype=np.float32).reshape(2, 3, 20000)
rest = [np.full(3, value, np.float32) for value in (2, -3, 1, 2)]
right = x * 2 - 1

def check(array, scale=1):
    assert np.array_equal(array, right * scale), array
"""


@pytest.fixture
def run(toy: Any) -> Callable[..., str]:
    """Run a program after START; gives what it prints, and fails where it complains."""

    def execute(program: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", START + program, str(toy.artifact())],
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return execute


def test_a_forked_child_has_its_own_memory(run: Callable[..., str]) -> None:
    run("""
kept, dropped = op.inference(x, *rest), op.inference(x, *rest)
del dropped
assert ng.pool.stats().cached > 0
for _ in range(3):
    child = os.fork()
    if child == 0:
        try:
            assert ng.pool.stats().cached == 0
            check(kept)
            kept *= 3
            again = [op.inference(x, *rest) for _ in range(4)]
            for array in again:
                check(array)
                array.fill(0)
            check(kept, 3)
            del kept, array, again
            assert ng.pool.stats().in_use == 0
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    more = op.inference(x, *rest)
    assert os.waitpid(child, 0)[1] == 0
    check(kept)
    check(more)
    assert ng.pool.stats().in_use >= 2 * x.nbytes
    del more
""")


def test_a_child_forked_while_threads_allocate(run: Callable[..., str]) -> None:
    run(
        """
stop = threading.Event()

def work():
    while not stop.is_set():
        check(op.inference(x, *rest))

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(15):
    child = os.fork()
    if child == 0:
        check(op.inference(x, *rest))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
""",
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )  # of Python 3.12 on, for any such fork


def test_arrays_alive_at_the_end_of_the_interpreter(run: Callable[..., str]) -> None:
    program = """
import atexit, builtins

class Late:
    def __init__(self):
        self.me, self.array = self, op.inference(x, *rest)
    def __del__(self):
        check(self.array)

def hold(array):
    threading.Event().wait()

everywhere = op.inference(x, *rest)
sys.kept = op.inference(x, *rest)
builtins.kept = op.inference(x, *rest)[1:]
ng.runtime.call.kept = memoryview(op.inference(x, *rest))
cycle = Late()
threading.local().kept = op.inference(x, *rest)
threading.Thread(target=hold, args=(op.inference(x, *rest),), daemon=True).start()
atexit.register(lambda array: check(array), op.inference(x, *rest))
print("end")
"""
    assert run(program) == "end\n"


def test_resident_memory_stays_bounded(run: Callable[..., str]) -> None:
    """Over 400 shapes, of which the largest is 8 MB; fresh memory of all would be 1.5 GB."""
    grown = run(
        """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

assert ng.pool.limit == 32 * 1024**2
before = resident()
most = 0
for turn in range(400):
    length = 20000 + 37 * ((turn * 7919) % 8000)
    array = np.ones((2, 3, length), np.float32)
    op.inference(array, *rest)
    assert ng.pool.stats().cached <= ng.pool.limit
    most = max(most, resident() - before)
print(most)
""",
        NORMGRAPH_POOL_BYTES=str(32 * 1024**2),
    )
    # What is cached, one array in and one out (each of up to 8 MB), and what the heap keeps.
    assert 8 * 1024**2 < int(grown) < 72 * 1024**2


def test_where_memory_is_short_the_cache_goes(run: Callable[..., str]) -> None:
    run("""
import resource

MB = 1024**2
pool = ng.pool
pool.limit = 1024 * MB
cached = pool.empty((300 * MB,), np.dtype(np.uint8))
del cached
assert pool.stats().cached >= 300 * MB
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + 100 * MB, size + 100 * MB))
array = pool.empty((200 * MB,), np.dtype(np.uint8))  # fits only where the 300 MB were
array.fill(1)
assert pool.stats().cached == 0
try:
    pool.empty((300 * MB,), np.dtype(np.uint8))
except MemoryError as error:
    assert "300" in str(error)  # NumPy's own message
else:
    raise AssertionError("there is no memory for this")
assert (array[::4096] == 1).all()
check(op.inference(x, *rest))
""")


@pytest.mark.parametrize(
    ("groups", "files", "size"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1048576"}, 1048576),
        ("0::/a/b\n", {"a/b/memory.max": "2097152", "memory.max": "4194304"}, 2097152),
        ("0::/../a\n", {"memory.max": "4194304"}, 4194304),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "8388608"}, 8388608),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:memory:/a:b\n3:cpu:/\n", {"memory/a:b/memory.limit_in_bytes": "65536"}, 65536),
    ],
)
def test_the_memory_a_process_may_have(
    groups: str, files: dict[str, str], size: int | None, tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = memory_size(tmp_path / "proc", tmp_path / "groups")
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        total = int(meminfo.readline().split()[1]) * 1024
    assert found == (total if size is None else size)
    assert memory_size(tmp_path / "none", tmp_path / "none") == total
    assert 0 < ng.pool.limit <= total // 8
