"""What a GPU check computes and times, on kernels for the CPU and a CUDA device of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ToolMissing
from normgraph.scripts import gpu_timing, gpu_torch
from normgraph.scripts.gpu_behaviour import CHECKS, Behaviour
from normgraph.scripts.gpu_cases import KINDS, Case
from normgraph.scripts.gpu_run import Bench

SPECS = [
    ng.NormSpec("batch_norm"),
    ng.NormSpec("instance_norm"),
    ng.NormSpec("group_norm", groups=2),
    ng.NormSpec("layer_norm"),
    ng.NormSpec("rms_norm"),
]
CASE = Case(ng.NormSpec("batch_norm"), (4, 6, 3, 5), "float32")


@pytest.fixture
def folder(build_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    """The artifacts of CASE, for the CPU."""
    built = build_artifact(CASE.spec, CASE.declared, "float32", KINDS)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / CASE.name).symlink_to(built)
    return tmp_path / "artifacts"


@pytest.fixture
def host_bench(folder: Path, torch_on_host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench on these whose device is the host, which does not wait to be warm."""
    monkeypatch.setattr(gpu_timing, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(gpu_timing, "_MOST_CALLS", 2)
    torch = torch_on_host.TorchOnHost(pytest.importorskip("torch"))
    return torch_on_host.HostBench(torch, folder, 4096)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_the_oracle_agrees_with_the_reference(spec: ng.NormSpec) -> None:
    torch = pytest.importorskip("torch")
    shape = (3, 5) if spec.op in ("layer_norm", "rms_norm") else (3, 4, 2, 5)
    inputs = gpu_torch.draw(torch, spec, shape, "float32", 3, "cpu")
    forward: dict[str, Any] = {}
    for kind in ("forward", "inference", "backward"):
        got = gpu_torch.answers(torch, spec, kind, inputs)
        names = [name for name, *_ in ports(spec, kind)]
        given = {name: inputs[name].numpy() for name in names if name in inputs}
        given |= {name: forward[name] for name in names if name in ("mean", "inv_std")}
        want = ng.graphs.reference.run(spec, kind, given)
        if kind == "forward":
            forward = want
        assert set(got) == set(want)
        for name, value in want.items():
            shaped = got[name].detach().numpy().reshape(value.shape)
            np.testing.assert_allclose(shaped, value, rtol=1e-5, atol=1e-6, err_msg=name)


def ports(spec: ng.NormSpec, kind: str) -> list[tuple[str, ...]]:
    shape = ("N", 5) if spec.op in ("layer_norm", "rms_norm") else ("N", 4, "H", "W")
    model = ng.graphs.build(spec, kind, shape=shape, dtype="float32")
    return [(value.name,) for value in model.graph.input]


def test_an_error_is_seen_in_any_element() -> None:
    torch = pytest.importorskip("torch")
    want = torch.linspace(-1, 1, 100, dtype=torch.float64)
    got = want.float()
    assert gpu_torch.worst("y", "float32", got, want, {}) < 0.1
    for wrong in (1e-3, float("nan")):
        spoiled = got.clone()
        spoiled[71] += wrong
        assert gpu_torch.worst("y", "float32", spoiled, want, {}) > 1
    half = want.half()
    assert gpu_torch.worst("y", "float16", half, want, {}) < 1
    assert gpu_torch.worst("y", "float16", half * 1.01, want, {}) > 1


@pytest.mark.parametrize("shape", [CASE.shape, (3, 6, 5, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_checks_run_on_kernels_for_the_cpu(
    shape: tuple[int, ...], kind: str, folder: Path
) -> None:
    """The same calls on the same artifacts, but for the device."""
    bench = Bench(pytest.importorskip("torch"), folder, 0, "cpu")
    found = bench.numeric(CASE, shape, kind)
    assert found is not None
    assert found["passed"], found
    assert found["what"].endswith(kind)


def test_what_is_not_defined_is_no_result(folder: Path) -> None:
    """A forward of one value a channel is refused, and no backward comes without its statistics."""
    bench = Bench(pytest.importorskip("torch"), folder, 0, "cpu")
    made = {kind: bench.numeric(CASE, (1, 6, 1, 1), kind) for kind in KINDS}
    assert made.pop("inference") is not None
    assert set(made.values()) == {None}


def test_a_wrong_artifact_is_reported(tmp_path: Path, build_artifact: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    case = Case(ng.NormSpec("rms_norm", eps=1.0), (4, 6), "float32")
    built = build_artifact(ng.NormSpec("rms_norm"), case.declared, "float32", KINDS)
    (tmp_path / case.name).symlink_to(built)
    found = Bench(torch, tmp_path, 0, "cpu").numeric(case, case.shape, "forward")
    assert found is not None
    assert not found["passed"]
    assert "y " in found["detail"]


@pytest.mark.parametrize(
    "what",
    [
        "captured in a CUDA graph",
        "held through 100 replays",
        "on two streams at a time",
        "an output that is added to",
        "an input that is not compact",
    ],
)
def test_checks_of_calls_pass(what: str, host_bench: Any) -> None:
    assert Behaviour(host_bench).check(what, CASE) == {
        "what": f"{CASE.title}: {what}",
        "passed": True,
        "detail": "",
    }


def test_replays_that_give_something_else_are_seen(host_bench: Any) -> None:
    """As of a team that finds the words of the call before."""
    graph = host_bench.torch.cuda.CUDAGraph

    class Twice(graph):  # type: ignore[misc, valid-type]
        def replay(self) -> None:
            super().replay()
            for _, targets in self.calls:
                targets[-1].mul_(2.0)

    host_bench.torch.cuda.CUDAGraph = Twice
    assert not Behaviour(host_bench).check("held through 100 replays", CASE)["passed"]


def test_what_the_host_cannot_do_is_a_failed_check(host_bench: Any) -> None:
    made = Behaviour(host_bench).check("an array on the CPU is refused", CASE)
    assert not made["passed"]
    assert len(CHECKS) == 9


@pytest.mark.parametrize("peer", ["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_a_peer_and_copies_are_timed(kind: str, peer: str, host_bench: Any) -> None:
    made = host_bench.time(CASE, kind, peer)
    assert set(made["us"]) == {"ours", peer, "copy"}
    assert all(value > 0 for value in made["us"].values())
    assert made["failures"] == []


def test_a_peer_that_fails_costs_itself_alone(
    host_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(torch: Any, forward: Any) -> Any:
        raise ValueError("no compiler")

    monkeypatch.setattr(gpu_torch, "compiled", fail)
    made = host_bench.time(CASE, "forward", "compiled")
    assert set(made["us"]) == {"ours", "copy"}
    assert made["failures"] == [f"compiled {CASE.title} forward: ValueError: no compiler"]


def test_limits_are_those_of_the_fastest_copy(host_bench: Any) -> None:
    made = host_bench.limits()
    assert made["copy_bandwidth"] == max(made["copies"].values())
    assert set(made["copies"]) == {"copy", "copy by a kernel", "copy outside a graph"}
    assert made["launch_us"] > 0


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu_torch.usable()
    monkeypatch.delattr(torch.nn.functional, "rms_norm")
    with pytest.raises(ToolMissing, match=r"needs torch 2\.4 or later.*rms_norm.*Set PYTHON"):
        gpu_torch.usable()


class Clock:
    """A device whose time only its kernels take, launched by a host that takes its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.graph: list[tuple[str, float]] | None = None

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
        cuda._sleep = staticmethod(lambda cycles: clock.log.append("sleep"))
        return Torch


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
    taken = gpu_timing.contest(torch, made, rounds=3)
    assert [timing.median for timing in taken.values()] == pytest.approx([1e-3] * 3)
    timed = [name for name in clock.log[clock.log.index("sleep") :] if name in names]
    assert timed == ["x", "y", "z", "y", "z", "x", "z", "x", "y"]


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
