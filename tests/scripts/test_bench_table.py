"""The standard table, its goals and its pictures, from reports that were not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from normgraph.errors import ToolMissing
from normgraph.scripts import bench_plot
from normgraph.scripts.bench_cases import (
    IN_CACHE,
    KINDS,
    MEMORY,
    SMALL,
    Case,
    Goal,
    goal_of,
    standard_cases,
    verdict,
)
from normgraph.scripts.bench_costs import Costs
from normgraph.scripts.bench_document import document, read_causes
from normgraph.scripts.bench_growth import document as growth_document
from normgraph.scripts.bench_growth import draw
from normgraph.scripts.bench_report import BenchReport, Row
from normgraph.scripts.bench_timing import Timing
from normgraph.spec import OPERATORS, NormSpec

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "system": "Linux x86_64",
    "python": "3.11",
    "load": 0.1,
    "nice": 0,
}


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.9 * seconds, 1.1 * seconds, 0.8 * seconds, 20)


def row(
    kind: str,
    peer: str,
    heap: str,
    seconds: float,
    moved: float,
    *,
    limit: bool = False,
    blocked: bool = False,
) -> Row:
    """Ours takes 1 ms, the limit 0.8 ms."""
    return Row(
        kind,
        peer,
        heap,
        2,
        timing(seconds),
        ratio=seconds / 1e-3,
        over_limit=seconds / 0.8e-3,
        over_floor=seconds / 0.5e-3,
        gigabytes_per_second=moved / seconds / 1e9,
        limit=limit,
        blocked=blocked,
    )


def report(case: Case) -> BenchReport:
    """What a bench of the case could have found."""
    rows = []
    for kind in KINDS:
        limit = "add of two arrays" if kind == "backward" else "copy of one array"
        rows += [
            row(kind, "normgraph", "given", 1e-3, 4e6),
            row(kind, "normgraph", "warm", 1.1e-3, 4e6),
            row(kind, "normgraph, bound", "given", 0.9e-3, 4e6),
            row(kind, "torch eager", "warm", 2e-3, 4e6),
            row(kind, "torch eager", "cold", 9e-3, 4e6),
            row(kind, "onnxruntime, same graph", "given", 5e-3, 4e6),
            row(kind, "oneDNN 3.9.9, blocked", "given", 1.3e-3, 4e6, blocked=True),
            row(kind, "oneDNN 3.9.9, row-major", "given", 3e-3, 4e6),
            row(kind, f"{limit} (torch)", "given", 0.8e-3, 4e6, limit=True),
            row(kind, f"{limit} (plain stores)", "given", 0.9e-3, 4e6, limit=True),
            row(kind, f"{limit} (non-temporal stores)", "given", 0.5e-3, 4e6, limit=True),
            Row(kind, "torch.compile", "", 2, reason="no C++ compiler"),
        ]
    rows.append(row("backward", "normgraph, dx alone", "given", 0.7e-3, 4e6))
    return BenchReport(
        "an/artifact", case.spec.op, case.dtype, case.shape, dict(MACHINE), {"normgraph": "9"},
        tuple(rows), None,
    )  # fmt: skip


def test_the_standard_cases() -> None:
    cases = standard_cases()
    assert {case.spec.op for case in cases} == set(OPERATORS)
    assert {case.dtype for case in cases} == {"float32", "float16", "bfloat16"}
    assert len({(case.spec.op, case.shape, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        assert len(case.declared) == len(case.shape)
        for dim, size in zip(case.declared, case.shape, strict=True):
            assert isinstance(dim, str) or dim == size
        # Above 32 MB for x and y no last-level cache of the machines in question holds both.
        elements = 1
        for size in case.shape:
            elements *= size
        assert (elements * 8 > 48e6) == (case.place == MEMORY)


def test_every_case_has_a_goal() -> None:
    for case in standard_cases():
        for kind in KINDS:
            goal = goal_of(case, kind)
            assert (goal.limit is None) == (kind == "inference")
            assert goal.peer >= 1.0


def test_goals_of_half_types() -> None:
    wide = Case(NormSpec("batch_norm"), (8, 64, 56, 56), "float32", IN_CACHE)
    assert goal_of(wide, "backward") == Goal(1.4, 1.3)
    assert goal_of(replace(wide, dtype="float16"), "backward") == Goal(2.24, 1.0)
    far = replace(wide, dtype="bfloat16", place=MEMORY)
    assert goal_of(far, "backward") == Goal(1.1, 1.0)


@pytest.mark.parametrize(
    ("over_limit", "peer", "said"),
    [
        (1.2, 1.5, "met"),
        (1.32, 1.5, "limit +10%"),
        (1.2, 1.2, "peer -20%"),
        (2.4, 0.75, "limit +100%, peer -50%"),
        (None, None, "met"),
    ],
)
def test_a_verdict_says_by_how_much(
    over_limit: float | None, peer: float | None, said: str
) -> None:
    assert verdict(Goal(1.2, 1.5), over_limit, peer) == said


def test_the_document(tmp_path: Path) -> None:
    near = Case(NormSpec("instance_norm"), (8, 64, 56, 56), "float32", IN_CACHE)
    small = Case(NormSpec("batch_norm"), (64, 512, 7, 7), "float32", SMALL)
    half = replace(near, dtype="float16")
    causes = tmp_path / "causes.json"
    assert read_causes(causes) == {}
    why = {"operator": "instance_norm", "shape": near.size, "kind": "forward", "dtype": "float32"}
    causes.write_text(json.dumps([{**why, "why": "the moon was full"}]))
    measured = [(case, report(case)) for case in (near, small, half)]
    text = document(measured, "a command", read_causes(causes), ["a-roofline.svg"])
    for part in ("`a command`", "a processor", "oneDNN 3.9.9", "![a-roofline](a-roofline.svg)"):
        assert part in text
    assert text.count("the moon was full") == 1
    lines = text.splitlines()
    forward = next(line for line in lines if line.startswith("| instance_norm | 8×64×56×56 | f"))
    assert "torch eager | 2 (1.8 to 2.2) | 2.00 | 1.30 | 2.20 | 1.25 | 1.10 | 2.00" in forward
    assert "| 1 (0.9 to 1.1) | 0.9 (0.81 to 0.99) | torch eager |" in forward
    assert "limit +14%, peer -9%" in forward
    # At 7x7 the blocked layout counts; elsewhere it has its column only.
    goal = next(line for line in lines if line.startswith("| batch_norm | 64×512×7×7 | backward"))
    assert "| 0.70 | met |" in goal
    slower = replace(
        measured[1][1],
        rows=tuple(
            replace(each, ratio=1.1) if each.blocked else each for each in measured[1][1].rows
        ),
    )
    text = document([(small, slower)], "a command", {})
    assert text.count("peer -8%") == 2
    assert "- torch.compile: no C++ compiler (batch_norm forward float32, batch_norm inf" in text
    for line in text.splitlines():
        assert not line.startswith("| batch_norm") or line.count("|") > 10


def test_tables_have_as_many_cells_as_heads() -> None:
    case = standard_cases()[0]
    width = 0
    for line in document([(case, report(case))], "a command", {}).splitlines():
        if line.startswith("|") and not width:
            width = line.count("|")
        elif line.startswith("|"):
            assert line.count("|") == width
        else:
            width = 0


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = standard_cases()
    for name in ("one.svg", "two.svg", "a.png"):
        bench_plot.roofline([report(case) for case in cases], tmp_path / "deep" / name)
    assert (tmp_path / "deep/one.svg").read_bytes() == (tmp_path / "deep/two.svg").read_bytes()
    text = (tmp_path / "deep/one.svg").read_text()
    for label in ("instance_norm", "best peer", "copy non-temporal"):
        assert label in text
    assert (tmp_path / "deep/a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ToolMissing, match=r"normgraph\[plot\]"):
        bench_plot.roofline([], tmp_path / "a.svg")
    assert draw([], tmp_path / "a.md") == []


def test_the_document_of_growth(tmp_path: Path) -> None:
    points = [
        {
            "op": op, "kind": kind, "threads": threads, "shape": [1, size // 4], "size": size,
            "moved": 2 * size, "seconds": {
                "normgraph": [1e-6, 1e-6, 2e-6], "normgraph, bound": [6e-7, 6e-7, 6e-7],
                "torch eager": [3e-6, 3e-6, 3e-6], "limit": [5e-7, 5e-7, 5e-7],
                "oneDNN 3.9.9, row-major": [2e-6, 2e-6, 2e-6],
            }, "best": "oneDNN 3.9.9, row-major", "same_sort": "normgraph", "slower": False,
            "missing": {},
        }
        for op in ("layer_norm", "rms_norm")
        for kind in ("forward", "backward")
        for threads in (1, 2)
        for size in (1024, 1 << 30)
    ]  # fmt: skip
    costs = Costs("rms_norm", 0.5, 2e-3, 3000, 2000, {"inference": 3e-6}, (4, 8), {}, (9, 8))
    plots = draw(points, tmp_path / "growth.md")
    text = growth_document(points, [costs], MACHINE, "a command", plots, {})
    for part in ("1 KB", "1 GB", "## Backward, 2 threads", "## Forward, 1 thread", "2.0 ms",
                 ", oneDNN 3.9.9.", "0 of 16 rows. "):  # fmt: skip
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("| 1 KB | layer_norm"))
    best = "oneDNN 3.9.9, row-major | 2 µs | 2.00 |"
    assert f"| 1 µs | 2.05 | 0.5 µs | 2.00 | 3.00 | {best}" in line
    for name in plots:
        assert "2 threads" in (tmp_path / name).read_text()
        assert f"({name})" in text
