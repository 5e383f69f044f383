"""What a GPU check computes and times, on kernels for the CPU and a CUDA device of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
    """PyTorch has no forward of one value a channel, so no backward is held to it either."""
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
    assert made["captured"] == ["ours", peer]
    assert made["starved"] == []


def test_a_time_with_the_host_in_it_is_told(
    host_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "_replay", lambda *_: None)
    monkeypatch.setattr(host_bench.torch.cuda.Event, "query", lambda event: True)
    made = host_bench.time(CASE, "forward", "eager")
    assert made["captured"] == []
    assert made["starved"] == ["ours", "eager"]
    assert [text.partition(": ")[2] for text in made["failures"]] == [
        *["it cannot be captured in a graph; does not count"] * 2,
        *["the device waited for its launches; does not count"] * 2,
    ]


def test_a_torch_without_donated_buffers_compiles(
    host_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 2.4, whose settings refuse a name they do not know."""

    class Settings:
        __slots__ = ()

    old = SimpleNamespace(import_module=lambda name: Settings())
    monkeypatch.setattr(gpu_torch, "importlib", old)
    assert gpu_torch.compiled(host_bench.torch, len) is len


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
