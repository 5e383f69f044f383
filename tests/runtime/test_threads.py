"""One operator, many threads, many shapes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.threads import from_environment


def test_many_threads_get_their_own_answers(op: Any, toy: Any) -> None:
    failures: list[tuple[int, str]] = []
    start = threading.Barrier(8)

    def work(length: int) -> None:
        inputs = toy.inputs("backward", n=3, length=length)
        answers = toy.outputs("backward", inputs)
        acc = np.zeros(3, np.float32)
        start.wait()
        for turn in range(1, 200):
            result = op.backward(*inputs, out={"dbeta": acc}, grad_req={"dbeta": "add"})
            right = {**answers, "dbeta": answers["dbeta"] * turn}
            failures.extend(
                (length, name)
                for name, answer in right.items()
                if not np.array_equal(getattr(result, name), answer)
            )

    threads = [threading.Thread(target=work, args=(length,)) for length in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# One operator for each way in which a kernel's work is cut into tasks. Up to 32768 elements of x
# are one task; the sizes lie on both sides, so threads meet in the pool and outside of it.
SPECS: dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]] = {
    "batch_norm": (ng.NormSpec("batch_norm", momentum=None), ("N", 6, "L")),
    "instance_norm": (
        ng.NormSpec("instance_norm", track_running_stats=True, momentum=None),
        ("N", 6, "L"),
    ),
    "layer_norm": (ng.NormSpec("layer_norm"), ("N", "L", 6)),
}
SIZES = ((3, 37), (9, 601), (16, 1031), (31, 257))


def _drawn(op: Any, kind: str, n: int, length: int, seed: int) -> list[Any]:
    rng = np.random.default_rng([seed, n, length])
    sizes = {"N": n, "L": length}
    shapes = [
        [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        for spec in op.signature(kind).inputs
    ]
    return [np.asarray(rng.uniform(0.5, 1.0, shape), np.float32) for shape in shapes]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Kernels use three threads, on any machine."""
    before = ng.get_num_threads()
    ng.set_num_threads(3)
    yield
    ng.set_num_threads(before)


@pytest.mark.parametrize("name", SPECS)
def test_many_threads_in_compiled_kernels(
    name: str, build_operator: Callable[..., Any], three_threads: None
) -> None:
    """Each thread gets, bit for bit, what it gets where no other thread runs."""
    op = build_operator(*SPECS[name])
    count = 8
    start = threading.Barrier(count)
    failures: list[str] = []

    def calls(seed: int) -> Iterator[tuple[str, list[Any], Any]]:
        for n, length in SIZES:
            for kind in ("forward", "backward"):
                inputs = _drawn(op, kind, n, length, seed)
                yield f"{kind} {n}x{length}", inputs, op.call(kind, *inputs)

    def work(alone: list[tuple[str, list[Any], Any]], first: int) -> None:
        start.wait()
        for turn in range(first, first + 40):
            label, inputs, answers = alone[turn % len(alone)]
            found = op.call(label.split()[0], *inputs)
            failures.extend(
                f"{label} {output}"
                for output, got, answer in zip(answers._fields, found, answers, strict=True)
                if got.tobytes() != answer.tobytes()
            )

    threads = [
        threading.Thread(target=work, args=(list(calls(seed)), seed)) for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# In a process without TVM and the compiler, as in the bare install. argv: an artifact.
_BARE = """
import os, sys, time
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "torch", "tvm"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
import normgraph as ng
from normgraph.errors import ArgumentError, ArgumentTypeError

def own_threads():
    tasks = os.listdir("/proc/self/task")
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
    return sorted(name for name in names if name.startswith("normgraph-"))

def awaited(count):  # a thread names itself once it has a turn
    end = time.monotonic() + 60
    while len(own_threads()) < count and time.monotonic() < end:
        time.sleep(0.01)
    return own_threads()

def call():
    x = np.ones((16, 6, 1031), np.float32)
    ones = np.ones(6, np.float32)
    return op.inference(x, ones, ones, ones, ones)
"""


def _bare(text: str, path: object = "", **environment: str) -> subprocess.CompletedProcess[str]:
    rest = {key: value for key, value in os.environ.items() if key != "NORMGRAPH_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", _BARE + text, str(path)],
        capture_output=True,
        text=True,
        env={**rest, **environment},
        check=False,
    )


def test_kernels_use_threads_in_the_bare_install(build_artifact: Callable[..., Any]) -> None:
    path = build_artifact(*SPECS["instance_norm"])
    done = _bare(
        """
ng.set_num_threads(3)  # before there is a library
op = ng.load(sys.argv[1])
print(ng.get_num_threads(), *own_threads())
call()
print(*awaited(2))
ng.set_num_threads(4)
call()
print(*awaited(3))
""",
        path,
    )
    assert done.returncode == 0, done.stderr
    threads = ["normgraph-1", "normgraph-2", "normgraph-3"]
    assert [line.split() for line in done.stdout.splitlines()] == [["3"], threads[:2], threads]


def test_the_environment_variable(build_artifact: Callable[..., Any]) -> None:
    path = build_artifact(*SPECS["instance_norm"])
    text = "print(ng.get_num_threads()); op = ng.load(sys.argv[1]); print(ng.get_num_threads())"
    done = _bare(text, path, NORMGRAPH_NUM_THREADS="5")
    assert (done.stdout.split(), done.stderr) == (["5", "5"], "")
    done = _bare(f"ng.set_num_threads(2); {text}", path, NORMGRAPH_NUM_THREADS="5")
    assert done.stdout.split() == ["2", "2"]
    for wrong in ("0", "-1", "two", "2.5", "257", "1000000000000000000000", " 3"):
        done = _bare("op = ng.load(sys.argv[1])", path, NORMGRAPH_NUM_THREADS=wrong)
        assert done.returncode == 1
        message = (
            f"NORMGRAPH_NUM_THREADS: expected a whole number from 1 to 256, but it is {wrong!r}"
        )
        assert message in done.stderr


def test_the_number_of_cpus_that_may_be_used(build_artifact: Callable[..., Any]) -> None:
    """One CPU gives one thread; a thread bound by itself does not bind the pool."""
    path = build_artifact(*SPECS["instance_norm"])
    text = """
import os
import subprocess
import sys
import threading
print(ng.get_num_threads())
op = ng.load(sys.argv[1])
print(ng.get_num_threads())
"""
    narrowed = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert _bare(narrowed + text, path, OPENBLAS_NUM_THREADS="1").stdout.split()[-1:] == ["1"]
    whole = len(os.sched_getaffinity(0))
    bound = "import threading; stay = threading.Event()\n"
    bound += "threading.Thread(target=stay.wait, daemon=True).start()\n" + narrowed + text
    expected = [str(min(whole, ng.get_num_threads()))] * 2
    assert _bare(bound, path).stdout.split() == expected


def test_what_set_num_threads_takes() -> None:
    before = ng.get_num_threads()
    try:
        for count in (1, 256, np.int64(7)):
            ng.set_num_threads(count)
            assert ng.get_num_threads() == count
        for wrong in (0, -3, 257, 2**70):
            with pytest.raises(ArgumentError, match="expected 1 to 256"):
                ng.set_num_threads(wrong)
        for odd in (True, 2.0, "2", None):
            with pytest.raises(ArgumentTypeError, match="expected a whole number"):
                ng.set_num_threads(odd)  # type: ignore[arg-type]
        assert ng.get_num_threads() == 7
    finally:
        ng.set_num_threads(before)


_FORK = """
import os, signal, threading
import tvm_ffi
import normgraph as ng

inside, go_on = threading.Event(), threading.Event()
whole = tvm_ffi.get_global_func

def slow(*args, **kwargs):
    inside.set()
    go_on.wait()
    return whole(*args, **kwargs)

tvm_ffi.get_global_func = slow
other = threading.Thread(target=ng.set_num_threads, args=(2,))
other.start()
inside.wait()
child = os.fork()
if child == 0:
    tvm_ffi.get_global_func = whole
    signal.alarm(20)
    ng.set_num_threads(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
go_on.set()
other.join()
raise SystemExit(status)
"""


def test_a_child_forked_while_the_count_is_set() -> None:
    """The thread that sets it is not in the child, and cannot let go of what it holds there."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_number_of_many_digits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMGRAPH_NUM_THREADS", "1" * 5000)
    with pytest.raises(ArgumentError, match="expected a whole number from 1 to 256"):
        from_environment()
