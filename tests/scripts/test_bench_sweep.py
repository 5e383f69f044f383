"""The sweep: its shapes, what a point holds, and what the document says of slower rows."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.errors import AccuracyError
from normgraph.scripts import bench_batch, bench_contest, bench_growth, bench_sweep, bench_torch
from normgraph.scripts.bench_batch import Batch
from normgraph.scripts.bench_growth import document
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_room import no_more_than_there_is, room
from normgraph.scripts.bench_sweep import FAMILIES, Point
from normgraph.scripts.bench_timing import Timing

OWN = {"normgraph", "normgraph, bound", "limit"}
PEERS = {"torch eager", "onnxruntime, same graph", "onnxruntime, own operator"}
ABOUT = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}


def measure(family: bench_sweep.Family, size: int = 1 << 10) -> list[Point]:
    """A look at one size."""
    return bench_sweep.measure([family], 2, size, 1, 0.0005, lambda _: None)


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep has the size it is given, and no other."""
    monkeypatch.setattr(bench_sweep, "sizes", lambda largest: [largest])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.spec.op)
def test_shapes_of_the_sweep_have_the_size(family: bench_sweep.Family) -> None:
    size = bench_sweep.SMALLEST
    while size <= bench_sweep.LARGEST:
        shape = family.shape(size)
        assert 4 * prod(shape) == size
        for dim, each in zip(family.declared, shape, strict=True):
            assert isinstance(dim, str) or dim == each
        size *= bench_sweep.STEP


def test_sizes_of_the_sweep_stop_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_sweep.sizes(1 << 14) == [1 << 10, 1 << 12, 1 << 14]
    assert bench_sweep.sizes(1 << 60)[-1] < 1 << 50
    monkeypatch.setattr(bench_sweep, "room", lambda: 8 << 12)
    assert bench_sweep.sizes(1 << 60) == [1 << 10, 1 << 12]


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_sweep_measures_and_checks(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch repeated four times, ours against everybody."""
    size = 1 << 20
    monkeypatch.setattr(bench_batch, "REPEATED", size // 4)
    points = measure(FAMILIES[place], size)
    assert [point.kind for point in points] == ["forward", "backward"]
    peers = {*PEERS, *({"torch eager, as group_norm"} if place == 0 else ())}
    for point in points:
        assert 4 * prod(point.shape) == point.size == size
        assert set(point.seconds) >= OWN
        # oneDNN's name has its version where it is installed.
        timed = {name for name in point.seconds if not name.startswith("oneDNN")} - OWN
        missing = {name for name in point.missing if not name.startswith("oneDNN")}
        assert timed | missing == peers
        assert len(point.seconds) + len(point.missing) == len(OWN) + len(peers) + 1
        # Nobody is wrong.
        assert not any("off by" in reason for reason in point.missing.values())
        ratios = {
            name: point.seconds[
                "normgraph, bound" if name.startswith("onnxruntime") else "normgraph"
            ][0] / seconds[0]
            for name, seconds in point.seconds.items()
            if name not in OWN
        }  # fmt: skip
        assert point.best == max(ratios, key=lambda name: ratios[name])
        ours = point.seconds[point.same_sort][0]
        assert ratios[point.best] == ours / point.seconds[point.best][0]
        assert point.slower == (ours > point.seconds[point.best][2])


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(
    ("bound", "best", "same_sort"),
    [
        (0.5, "torch eager", "normgraph"),
        (0.9, "onnxruntime, own operator", "normgraph, bound"),
    ],
)
def test_a_point_is_slower_where_our_call_of_the_same_sort_is(
    bound: float, best: str, same_sort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {
        "normgraph": 1.0, "normgraph, bound": bound, "torch eager": 1.2,
        "onnxruntime, own operator": 0.8,
    }  # fmt: skip

    def fake(calls: Mapping[str, object], **_: Any) -> dict[str, Timing]:
        return {
            name: Timing(each, each, 1.05 * each, each, 2)
            for name in calls
            for each in [seconds.get(name, 9.0)]
        }

    monkeypatch.setattr(bench_contest, "time_apart", fake)
    point = measure(FAMILIES[4])[0]
    assert (point.best, point.same_sort) == (best, same_sort)
    assert point.slower == (same_sort == "normgraph, bound")


@pytest.mark.usefixtures("one_size")
def test_a_peer_without_memory_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(*_: Any) -> Peer:
        def call() -> Mapping[str, Any]:
            raise MemoryError("no room for 4 GB")

        return Peer("torch eager", call, 2, fresh=True)

    monkeypatch.setattr(bench_torch, "torch_eager", large)
    for point in measure(FAMILIES[4]):
        assert point.missing["torch eager"] == "MemoryError: no room for 4 GB"
        assert point.best


def test_memory_that_there_is_not_is_refused() -> None:
    """Arrays that nobody writes to take none, and each alone would be given."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = []
    with no_more_than_there_is():
        part = room() // 8
        with pytest.raises(MemoryError):
            held += [np.empty(part, np.uint8) for _ in range(10)]
        assert np.ones(1 << 20, np.uint8).all()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("wrong", ["dx", "dgamma"])
def test_a_repeated_batch_with_one_wrong_part_is_found(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_batch, "REPEATED", 1 << 12)
    batch = Batch(NormSpec("layer_norm"), (16, 256))
    assert batch.times == 4
    want = {"dx": np.ones((4, 256)), "dgamma": np.ones(256)}
    good = {"dx": np.ones((16, 256), np.float32), "dgamma": np.full(256, 4, np.float32)}
    batch.check(Peer("good", lambda: good, 1, fresh=False), "backward", want)
    bad = {name: array.copy() for name, array in good.items()}
    bad[wrong][-1] = 2.0
    with pytest.raises(AccuracyError, match=f"bad, backward, {wrong}"):
        batch.check(Peer("bad", lambda: bad, 1, fresh=False), "backward", want)


@pytest.mark.parametrize(("samples", "times"), [(32, 4), (35, 5), (37, 1), (2, 2), (1, 1)])
def test_a_repeated_batch_has_the_shape_that_is_asked_for(
    samples: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_batch, "REPEATED", samples * 256 * 4 // 6)
    batch = Batch(NormSpec("layer_norm"), (samples, 256))
    assert batch.times == times
    assert batch.take(["x"])["x"].shape == (samples, 256)


def test_a_peer_of_the_sweep_that_gives_nothing_is_wrong() -> None:
    batch = Batch(NormSpec("layer_norm"), (2, 256))
    with pytest.raises(AccuracyError, match="idle, backward: gave none of dx"):
        batch.check(Peer("idle", dict, 1, fresh=False), "backward", {"dx": np.ones((2, 256))})


def point(
    op: str, best: str, same_sort: str, seconds: Mapping[str, float], **changes: Any
) -> dict[str, Any]:
    """A row of 64 KB as JSON has it; slower where the best peer's median is below ours."""
    values = {"normgraph": 4e-6, "normgraph, bound": 2e-6, "limit": 1e-6, **seconds}
    made = Point(
        op, "forward", 2, (64, 256), 1 << 16, 1 << 17,
        {name: (each, 0.9 * each, 1.1 * each) for name, each in values.items()},
        best, same_sort, values[same_sort] > values[best], {},
    )  # fmt: skip
    return {**asdict(made), **changes}


def test_the_document_lists_slower_rows_with_their_causes(tmp_path: Path) -> None:
    onnxruntime = "onnxruntime, own operator"
    points = [
        point("layer_norm", "torch eager", "normgraph", {"torch eager": 3.2e-6, onnxruntime: 9e-6}),
        # Faster than our ordinary call, and than ours bound.
        point("rms_norm", onnxruntime, "normgraph, bound", {onnxruntime: 1e-6}, threads=1),
        # Faster than our ordinary call alone.
        point("batch_norm", onnxruntime, "normgraph, bound", {onnxruntime: 2.5e-6}),
        point("instance_norm", "torch eager", "normgraph",
              {"torch eager": 8e-6, "torch eager, as group_norm": 6e-6}),
    ]  # fmt: skip
    causes = {
        ("rms_norm", "64×256", "forward", "float32"): "a row is short",
        ("rms_norm", "64×256", "backward", "float32"): "of another kind",
    }
    text = document(points, [], ABOUT, "a command", [], causes)
    lines = text.splitlines()
    start = lines.index("## Slower")
    assert lines[start + 2].startswith("2 of 4 rows. ")
    table = lines[start + 5 : lines.index("## Beside the kernels") - 1]
    assert table[2:] == [
        "| rms_norm | 64×256 | forward | 1 | 2 µs | onnxruntime, own operator | 1 µs | 2.00 | "
        "a row is short |",
        "| layer_norm | 64×256 | forward | 2 | 4 µs | torch eager | 3.2 µs | 1.25 |  |",
    ]
    (row,) = (line for line in lines if line.startswith("| 64 KB | batch_norm"))
    assert row.endswith("| 4 µs | 32.8 | 1 µs | 4.00 |  | onnxruntime, own operator | 2.5 µs "
                        "| 1.25 |")  # fmt: skip
    (row,) = (line for line in lines if line.startswith("| 64 KB | instance_norm"))
    assert row.endswith("| 4.00 | 1.50 | torch eager | 8 µs | 2.00 |")
    calm = document(points[2:], [], ABOUT, "a command", [], causes)
    assert "0 of 2 rows. " in calm
    assert "| why |" not in calm


def test_the_document_says_who_was_not_timed() -> None:
    timed = ("layer_norm", "torch eager", "normgraph", {"torch eager": 9e-6})
    none = {"oneDNN, row-major": "no oneDNN library"}
    points = [
        point(*timed, missing=none),
        point(*timed, missing={**none, "onnxruntime, same graph": "no room"}, size=1 << 30,
              threads=1),
        point(*timed, size=1 << 30, kind="backward"),
    ]  # fmt: skip
    lines = document(points, [], ABOUT, "a command", [], {}).splitlines()
    start = lines.index("## Not timed")
    assert lines[start + 2 : start + 5] == [
        "- oneDNN, row-major: no oneDNN library (layer_norm forward)",
        "- onnxruntime, same graph: no room (layer_norm forward of 1 GB, 1 thread)",
        "",
    ]
    assert "## Not timed" not in document(points[2:], [], ABOUT, "a command", [], {})


def test_the_plots_have_ours_torch_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(bench_growth, "available", lambda: True)
    monkeypatch.setattr(bench_growth, "growth", lambda panels, path: drawn.append(panels))
    seconds = {
        "torch eager": 8e-6, "torch eager, as group_norm": 6e-6,
        "onnxruntime, own operator": 3e-6,
    }  # fmt: skip
    row = point("instance_norm", "onnxruntime, own operator", "normgraph, bound", seconds)
    assert bench_growth.draw([row], tmp_path / "a.md") == ["a-forward.svg"]
    (panels,) = drawn
    lines = panels["instance_norm forward"]
    assert set(lines) == {"ours, 2 threads", "torch eager, 2 threads", "copy, 2 threads"}
    assert lines["torch eager, 2 threads"] == [(1 << 16, pytest.approx((1 << 17) / 6e-6 / 1e9))]
