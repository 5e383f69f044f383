"""bench: the peers, the JSON, and that a wrong peer is not timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.errors import AccuracyError, ArgumentError
from normgraph.scripts import bench_ort, bench_peers, bench_torch
from normgraph.scripts.bench import bench
from normgraph.scripts.bench_overheads import small_shape
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_report import BenchReport
from normgraph.scripts.bench_roster import BRIEF, Extras
from normgraph.scripts.bench_timing import time_apart, time_small, wait_for_quiet

SHAPE = ("N", 6, "H", "W")


@pytest.fixture(scope="session")
def artifact(build_artifact: Callable[..., Path]) -> Path:
    return build_artifact(NormSpec("batch_norm"), SHAPE)


@pytest.fixture(scope="session")
def report(artifact: Path) -> BenchReport:
    return bench(artifact, (2, 6, 5, 7), rounds=2, seconds=0.001, extras=Extras(compiled=False))


def quick(
    artifact: Path, shape: tuple[int, ...] = (2, 6, 5, 7), kinds: Sequence[str] = ("forward",)
) -> BenchReport:
    return bench(
        artifact, shape, kinds=kinds, rounds=1, seconds=0.001, extras=BRIEF, overheads=False
    )


def reasons(report: BenchReport) -> dict[str, str]:
    return {row.peer: row.reason for row in report.rows if row.timing is None}


def test_peers_and_the_memory_limit_are_there(report: BenchReport) -> None:
    for kind in ("forward", "inference", "backward"):
        ours = report.find(kind, "normgraph", "given")
        assert ours is not None
        assert ours.ratio == 1.0
        best = report.best_peer(kind)
        assert best is not None
        assert not best.limit
        assert not best.blocked
        assert not best.peer.startswith("normgraph")
        assert report.find(kind, "normgraph", "warm") is not None
        bound = report.find(kind, "normgraph, bound", "given")
        assert bound is not None
        assert bound.timing is not None
        assert bound.ratio == 1.0
        graph = report.find(kind, "onnxruntime, same graph", "given")
        assert graph is not None
        assert graph.timing is not None
        assert graph.ratio == graph.timing.median / bound.timing.median
        assert {row.peer.split(",")[0] for row in report.rows if row.bound} == {
            "normgraph",
            "onnxruntime",
        }
        own = report.find(kind, "onnxruntime, own operator", "given")
        assert (own is None) == (kind == "backward")
        alone = report.find(kind, "normgraph, dx alone", "given")
        assert (alone is None) == (kind != "backward")
        assert report.find(kind, "stock TVM", "warm") is not None
        name = "add of two arrays" if kind == "backward" else "copy of one array"
        for stores in ("", " (plain", " (non-temporal"):
            limit = report.find(kind, name + stores, "given")
            assert limit is not None
            assert limit.limit
            assert limit.timing is not None
            assert ours.timing is not None
            if stores != " (plain":
                over = ours.over_floor if stores else ours.over_limit
                assert over == pytest.approx(ours.timing.median / limit.timing.median)


def test_torch_is_a_peer_where_it_is_installed(report: BenchReport) -> None:
    pytest.importorskip("torch")
    for kind in ("forward", "inference", "backward"):
        assert report.find(kind, "torch eager", "warm") is not None
    assert "torch" in report.versions


def test_costs_beside_the_kernels(report: BenchReport) -> None:
    costs = report.overheads
    assert costs is not None
    assert costs.call_shape == (1, 6, 2, 2)
    for seconds, most in (
        (costs.graph_build, 1.0),
        (costs.compile, 60.0),
        (costs.inference_call, 1e-3),
        (costs.backward_call, 1e-3),
        (costs.forward_call, 1e-3),
        (costs.bound_call, 1e-3),
    ):
        assert seconds is not None
        assert 0.0 < seconds < most


def test_json_and_text(report: BenchReport) -> None:
    read = json.loads(report.to_json())
    assert set(read) == {
        "artifact", "operator", "dtype", "shape", "machine", "versions", "rows", "overheads",
    }  # fmt: skip
    assert read["shape"] == [2, 6, 5, 7]
    timed = [row for row in read["rows"] if row["timing"] is not None]
    assert timed
    for row in timed:
        timing = row["timing"]
        assert 0.0 < timing["best"] <= timing["low"] <= timing["median"] <= timing["high"]
        assert timing["calls"] >= 2
        assert row["threads"] >= 1
        assert row["heap"] in ("given", "warm", "cold")
    for row in read["rows"]:
        assert (row["timing"] is None) == bool(row["reason"])
    for text in (report.to_text(), report.to_markdown()):
        assert "onnxruntime, own operator: not timed: ONNX has no operator" in text
        assert "building one graph" in text
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(timed)
    assert len({line.count("|") for line in table}) == 1


def test_a_peer_that_is_wrong_is_not_timed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Path, kind: str, inputs: dict[str, Any], threads: int) -> Peer:
        return Peer("onnxruntime", lambda: {"y": inputs["x"] + np.float32(1)}, threads, False)

    monkeypatch.setattr(bench_ort, "same_graph", wrong)
    report = quick(artifact)
    assert reasons(report).keys() == {"onnxruntime, same graph"}
    reason = reasons(report)["onnxruntime, same graph"]
    assert "onnxruntime, forward, y: expected float64's answer" in reason
    assert "not timed: onnxruntime, forward, y" in report.to_text()


def test_a_peer_that_raises_is_not_timed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mixed dtype\nand more")

    monkeypatch.setattr(bench_torch, "torch_eager", fail)
    report = quick(artifact)
    assert reasons(report) == {"torch eager": "RuntimeError: mixed dtype"}
    assert report.find("forward", "normgraph", "given") is not None


def test_our_own_kernel_must_be_right(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(
        operator: Any, kind: str, inputs: dict[str, Any], *_: Any, fresh: bool, **__: Any
    ) -> Peer:
        return Peer("normgraph", lambda: {"y": inputs["x"]}, 1, fresh)

    monkeypatch.setattr(bench_peers, "ours", wrong)
    with pytest.raises(AccuracyError, match="normgraph, forward, y"):
        quick(artifact)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("batch_norm", "float16"), ("instance_norm", "bfloat16"), ("layer_norm", "bfloat16")],
)
def test_half_types(op: str, dtype: str, build_artifact: Callable[..., Path]) -> None:
    pytest.importorskip("torch")
    path = build_artifact(NormSpec(op), ("N", 6, 7), dtype, ("forward", "backward"))
    report = quick(path, (3, 6, 7), kinds=("forward", "backward"))
    for kind in ("forward", "backward"):
        assert report.find(kind, "torch eager", "warm") is not None, report.to_text()
        assert report.find(kind, "normgraph", "given") is not None
    assert all(name.startswith("onnxruntime") for name in reasons(report))


def test_a_shape_the_artifact_does_not_take_is_refused(artifact: Path) -> None:
    with pytest.raises(ArgumentError, match="N,6,H,W"):
        bench(artifact, (2, 5, 5, 7))


def test_calls_take_turns() -> None:
    order: list[str] = []
    found = time_apart(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds=0.0
    )
    assert "".join(order) == ("aaaa" + "bbbb") * 3
    assert {name: timing.calls for name, timing in found.items()} == {"a": 6, "b": 6}


HEAP = """
import resource
from pathlib import Path
import numpy as np
from normgraph.scripts.bench_timing import set_heap

def held():
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()

large, before = 5 << 29, held()
if set_heap(warm=True):
    array = np.empty(large, np.uint8)
    del array
    assert held() >= before + large
    set_heap(warm=False)
    assert held() < before + large // 2
"""


def test_a_warm_heap_keeps_what_is_freed() -> None:
    """However much it is: nobody writes to these bytes, so that they take no memory."""
    subprocess.run([sys.executable, "-c", HEAP], check=True)


def test_waiting_for_quiet_ends() -> None:
    start = time.monotonic()
    assert wait_for_quiet(0.0) in (True, False)
    assert time.monotonic() - start < 10.0


def test_small_calls_are_timed_in_batches() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    assert time_small(call, batches=3, batch=10) > 0.0
    assert count[0] == 30


def test_a_small_shape_needs_a_name() -> None:
    assert small_shape(("N", 64, "H", "W")) == (1, 64, 2, 2)
    assert small_shape(("N", 64)) == (4, 64)
    assert small_shape((8, 64)) is None
