"""Random shapes: what is drawn, what is timed, and what the document says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from normgraph import NormSpec
from normgraph.scripts import bench_contest, bench_random
from normgraph.scripts.bench_costs import costs_of
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_random import measure
from normgraph.scripts.bench_random_report import Result, as_json, as_text, document
from normgraph.scripts.bench_shapes import LEAST, MOST, Draw, draw
from normgraph.scripts.bench_timing import Timing
from normgraph.spec import OPERATORS


@pytest.fixture(scope="session")
def results() -> list[Result]:
    """A shape of two operators, timed for a moment."""
    some = [
        Draw(3, NormSpec("instance_norm"), ("N", 3, "W"), (5, 3, 7)),
        Draw(8, NormSpec("rms_norm"), ("N", 9), (11, 9)),
    ]
    return measure(some, rounds=1, seconds=0.0005)


def test_the_draw_is_the_same_for_the_same_seed() -> None:
    assert draw(50, 3) == draw(50, 3)
    assert draw(50, 3) != draw(50, 4)
    assert draw(50, 3) == draw(90, 3)[:50]


@pytest.mark.parametrize("seed", range(5))
def test_the_draw_covers_sizes_and_operators(seed: int) -> None:
    drawn = draw(200, seed)
    assert {each.spec.op for each in drawn} == set(OPERATORS)
    sizes = sorted(4 * prod(each.shape) for each in drawn)
    assert sizes[0] >= LEAST / 4
    assert sizes[-1] <= 1.5 * MOST
    assert sizes[len(sizes) // 4] < 1 << 20 < sizes[3 * len(sizes) // 4]
    assert any(size % 2 for each in drawn for size in each.shape)
    for each in drawn:
        assert all(size >= 1 for size in each.shape)
        for dim, size in zip(each.declared, each.shape, strict=True):
            assert isinstance(dim, str) or dim == size
        if each.spec.groups:
            assert each.shape[1] % each.spec.groups == 0
        if each.spec.op == "batch_norm":
            assert prod(each.shape) > each.shape[1]


def test_rows_have_ours_a_peer_and_the_limit(results: list[Result]) -> None:
    assert [(each.number, each.op, each.kind) for each in results] == [
        (3, "instance_norm", "forward"),
        (3, "instance_norm", "backward"),
        (8, "rms_norm", "forward"),
        (8, "rms_norm", "backward"),
    ]
    for each in results:
        assert each.best_peer in each.peers
        best = each.peers[each.best_peer]
        ratios = {
            name: (each.bound if name.startswith("onnxruntime") else each.ours).median / peer.median
            for name, peer in each.peers.items()
        }
        assert each.ratio == pytest.approx(max(ratios.values()))
        assert each.ratio == pytest.approx(each.same_sort.median / best.median)
        assert each.slower == (each.same_sort.median > best.high)
        # The same where it is not installed, with the reason; its name has its version where it is.
        (onednn,) = (n for n in (*each.peers, *each.missing) if n.startswith("oneDNN"))
        assert onednn.endswith("row-major")
        assert not {"torch.compile", "stock TVM"} & {*each.peers, *each.missing}
        assert each.limit is not None
        assert each.fresh.calls > 0


def test_slower_rows_are_listed_worst_first(results: list[Result]) -> None:
    made = [
        replace(each, number=place, ratio=1.0 + place, slower=place > 0)
        for place, each in enumerate(results[:3])
    ]
    text = as_text(made)
    assert "3 rows: in 2 the best peer is faster" in text
    table = [line.split()[0] for line in text.splitlines()[-2:]]
    assert table == ["2", "1"]
    assert "0 rows" in as_text([])
    assert len(as_text(made, all_rows=True).splitlines()) == len(text.splitlines()) + 1


def test_the_document_says_why(results: list[Result]) -> None:
    about = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}
    first, second, third = (
        replace(each, ratio=1.5 * place, slower=place > 0) for place, each in enumerate(results[:3])
    )
    causes = {("rms_norm", "11×9", "forward", "float32"): "as few as that"}
    text = document([first, second, third], "a command", about, causes)
    assert "3 rows, 2 of them slower." in text
    assert "Left out: oneDNN's blocked layouts, stock TVM, torch.compile (`--compiled`" in text
    assert "| instance_norm | 2 | 0.00 | 0.75 | 1.50 | 1 |" in text
    assert "| up to 1 MB moved | 3 | 0.00 | 1.50 | 3.00 | 2 |" in text
    lines = text.splitlines()
    end = lines.index("## Not timed") - 1
    rms, instance = lines[end - 2 : end]
    assert rms.startswith("| rms_norm | 11×9 | forward |")
    assert rms.endswith("| 3.00 | as few as that |")
    assert instance.endswith("| 1.50 |  |")
    assert "Slower" not in document([first], "a command", about, causes)


def test_the_document_says_who_took_part(results: list[Result]) -> None:
    about = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}
    each = replace(
        results[0],
        peers={**results[0].peers, "torch.compile": results[0].ours, "oneDNN 3.9.9, row-major":
               results[0].ours},
        missing={"onnxruntime, own operator": "it fell asleep"},
    )  # fmt: skip
    text = document([each, replace(each, kind="backward")], "a command", about, {})
    assert "oneDNN's own operators; torch.compile." in text
    assert "Left out: oneDNN's blocked layouts, stock TVM. " in text
    assert ", oneDNN 3.9.9." in text
    assert text.splitlines()[-1] == (
        "- onnxruntime, own operator: it fell asleep "
        "(instance_norm forward, instance_norm backward)"
    )


def test_json(results: list[Result]) -> None:
    read = json.loads(as_json(results, {"seed": 0}, {"cores": 2}))
    assert set(read) == {"machine", "versions", "settings", "rows"}
    assert len(read["rows"]) == len(results)
    assert set(read["rows"][0]["ours"]) == {"median", "low", "high", "best", "calls"}


@pytest.mark.parametrize(("bound", "best"), [(0.5, "torch"), (0.9, "onnxruntime")])
def test_each_peer_is_held_against_our_call_of_its_sort(
    bound: float, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime is faster than our ordinary call, which is not what it is held against."""
    seconds_of = {
        "normgraph": 1.0, "normgraph, fresh outputs": 1.0, "normgraph, bound": bound,
        "torch": 1.2, "onnxruntime": 0.8,
    }  # fmt: skip

    def fake(calls: Any, **_: Any) -> Any:
        return {name: Timing(each, each, 1.05 * each, each, 2)
                for name in calls for each in [seconds_of[name]]}  # fmt: skip

    monkeypatch.setattr(bench_contest, "time_apart", fake)
    ours = [
        Peer("normgraph", dict, 2, fresh=False),
        Peer("normgraph", dict, 2, fresh=True),
        Peer("normgraph, bound", dict, 2, fresh=False, bound=True),
    ]
    rivals = [
        Peer("torch", dict, 2, fresh=True),
        Peer("onnxruntime", dict, 2, fresh=False, bound=True),
    ]
    monkeypatch.setattr(bench_random, "gather", lambda *_: ([*ours, *rivals], []))
    (found,) = measure(
        [Draw(1, NormSpec("rms_norm"), ("N", 9), (11, 9))], kinds=("forward",), rounds=1
    )
    assert found.best_peer == best
    assert found.bound_peers == ("onnxruntime",)
    assert found.slower == (best == "onnxruntime")
    assert found.ratio == pytest.approx({"torch": 1 / 1.2, "onnxruntime": 0.9 / 0.8}[best])
    assert found.same_sort.median == {"torch": 1.0, "onnxruntime": 0.9}[best]
    assert (found.ours.median, found.bound.median) == (1.0, bound)
    line = as_text([found], all_rows=True).splitlines()[-1]
    assert f"{1e3 * found.same_sort.median:.4f}" in line


def test_costs_beside_the_kernels() -> None:
    costs = costs_of(NormSpec("rms_norm"), ("N", 8), (64, 8))
    assert set(costs.calls) == {"inference", "backward", "forward", "forward, bound"}
    assert costs.calls["forward, bound"] < costs.calls["forward"]
    assert set(costs.memory) == {"forward", "backward"}
    assert 0 < costs.library < costs.size
    assert costs.compile > 0.0
    assert costs.load > 0.0
