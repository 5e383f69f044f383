"""How a GPU check times, on a CUDA device that takes the time it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from normgraph.scripts import gpu_timing


class Clock:
    """A device whose time only its kernels take, launched by a host that takes its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.graph: list[tuple[str, float]] | None = None
        # By kernel the cycles in which the host launches it; those the device waited last.
        self.launch: dict[str, int] = {}
        self.waits: list[int] = []

    def kernel(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.graph is not None:
                self.graph.append((name, seconds))
                return
            self.now += seconds + 20e-6
            self.log.append(name)

        return call

    def refused(self) -> None:
        if self.graph is not None:
            raise RuntimeError("not while a graph is captured")
        self.now += 20e-6

    @property
    def torch(self) -> Any:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self, stream: object) -> None:
                clock.log.append("event")
                self.at = clock.now

            def query(self) -> bool:
                return clock.waits[-1] < clock.launch.get(clock.log[-1], 0)

            def synchronize(self) -> None:
                clock.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.held: list[tuple[str, float]] = []

            def replay(self) -> None:
                clock.now += sum(seconds for _, seconds in self.held)
                clock.log.append("+".join(dict.fromkeys(name for name, _ in self.held)))
                clock.log.append(f"{len(self.held)} calls")

        class Capture:
            def __init__(self, graph: Graph, stream: object) -> None:
                self.into = graph

            def __enter__(self) -> None:
                clock.graph = self.into.held

            def __exit__(self, *_: object) -> None:
                clock.graph = None

        class Torch:
            class cuda:
                pass

        cuda: Any = Torch.cuda
        cuda.Event, cuda.CUDAGraph, cuda.graph = Event, Graph, Capture
        cuda.current_stream = cuda.synchronize = staticmethod(lambda: None)
        cuda._sleep = staticmethod(clock.sleep)
        return Torch

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.waits.append(cycles)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One, which the host's monotonic clock is too."""
    made = Clock()
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    return made


def test_a_launch_is_not_timed_and_the_device_is_warm(clock: Clock) -> None:
    torch = clock.torch
    calls = [clock.kernel("a", 3e-6), clock.kernel("b", 5e-6)]
    made = gpu_timing.prepare(torch, calls, 10**6)
    assert made.captured
    assert made.calls * 4e-6 > 2e-3
    assert clock.log == ["a", "a", "b", "b"]
    clock.log.clear()
    start = clock.now
    timing = gpu_timing.contest(torch, {"ours": made})["ours"]
    assert timing.median == pytest.approx(4e-6)
    assert timing.rounds == 25
    replay = ["a+b", f"{made.calls} calls"]
    first = clock.log.index("sleep")
    assert clock.log[:first] == replay * (first // 2)
    assert first // 2 * made.calls * 4e-6 >= 0.25
    assert clock.log[first:] == ["sleep", "event", *replay, "event", "wait"] * 25
    assert clock.now > start


def test_contestants_take_turns_in_changing_orders(clock: Clock) -> None:
    torch = clock.torch
    names = ("x", "y", "z")
    made = {n: gpu_timing.prepare(torch, [clock.kernel(n, 1e-3)], 10**9) for n in names}
    clock.log.clear()
    taken = gpu_timing.contest(torch, made, rounds=6)
    assert [timing.median for timing in taken.values()] == pytest.approx([1e-3] * 3)
    timed = [name for name in clock.log[clock.log.index("sleep") :] if name in names]
    rounds = ["".join(timed[at : at + 3]) for at in range(0, 18, 3)]
    assert rounds == ["xyz", "xzy", "zxy", "zyx", "yzx", "yxz"]


def test_the_device_waits_until_the_host_has_launched_a_round(clock: Clock) -> None:
    names = ("quick", "slow", "endless")
    made = {
        n: gpu_timing.prepare(clock.torch, [clock.kernel(n, 1e-3)], 10**9, graph=False)
        for n in names
    }
    clock.launch = {"slow": 7_000_000, "endless": 10**12}
    taken = gpu_timing.contest(clock.torch, made, rounds=3)
    assert {name: timing.starved for name, timing in taken.items()} == {
        "quick": False,
        "slow": False,
        "endless": True,
    }
    assert {timing.rounds for timing in taken.values()} == {3}
    million = 10**6
    assert clock.waits[:11] == [each * million for each in (2, 2, 4, 8, 2, 4, 8, 16, 32, 64, 128)]
    assert sorted(clock.waits[11:]) == [each * million for each in (2, 2, 8, 8, 128, 128)]


def test_rounds_that_the_device_waited_for_do_not_count_beside_others(clock: Clock) -> None:
    rounds = [gpu_timing._Round(9.0, True)] * 2 + [gpu_timing._Round(1.0, False)] * 3
    assert gpu_timing._timing(rounds) == gpu_timing.Timing(1.0, 1.0, 1.0, 3)
    assert gpu_timing._timing(rounds[:4]).starved is False
    assert gpu_timing._timing(rounds[:3]) == gpu_timing.Timing(9.0, 1.0, 9.0, 3, True)


def test_calls_that_are_launched_one_by_one_fit_into_a_stream(clock: Clock) -> None:
    made = gpu_timing.prepare(clock.torch, [clock.refused] * 2, 0)
    assert not made.captured
    assert made.calls == 200
    assert gpu_timing.prepare(clock.torch, [clock.kernel("a", 1e-6)] * 2, 0).calls == 1000


def test_what_cannot_be_captured_is_launched_and_says_so(clock: Clock) -> None:
    made = gpu_timing.prepare(clock.torch, [clock.refused], 10**9)
    assert not made.captured
    before = clock.now
    made.run()
    assert clock.now == pytest.approx(before + made.calls * 20e-6)
    eager = partial(gpu_timing.prepare, clock.torch, [clock.kernel("a", 1e-3)], 10**9)
    assert eager().captured
    assert not eager(graph=False).captured


def test_a_rotation_is_larger_than_the_cache() -> None:
    for nbytes in (1, 10**5, 10**8, 10**10):
        sets = gpu_timing.sets_for(nbytes, 60 * 2**20)
        assert 2 <= sets <= 64
        assert sets == 64 or sets * nbytes >= 4 * 60 * 2**20


@pytest.mark.parametrize(("nbytes", "sets"), [(0, 64), (10**7, 24), (10**8, 3), (10**10, 2)])
def test_a_round_is_long_and_holds_every_set(nbytes: int, sets: int) -> None:
    repeats = gpu_timing.repeats_for(nbytes, sets)
    assert repeats >= 1
    assert sets * repeats >= 1000 or sets * repeats * nbytes >= 4e12 * 4e-3 * 0.8
    assert sets * repeats <= 1000 + sets
