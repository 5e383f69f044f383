"""What a GPU check does, what its results are held to, and how they are told."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import normgraph as ng
from normgraph.scripts import gpu_report
from normgraph.scripts.gpu_cases import BEHAVED, LARGE, Case, Goal, cases, goal_of, is_telling
from normgraph.scripts.gpu_jobs import ACCURACY, BEHAVIOUR, COMPILED, TIME, Job, jobs

COPY = 4.3e12
LIMITS: Any = {"copy_bandwidth": COPY, "launch_us": 2.0, "copies": {"copy": COPY}}
SPECS = [
    ng.NormSpec("batch_norm"),
    ng.NormSpec("instance_norm"),
    ng.NormSpec("group_norm", groups=2),
    ng.NormSpec("layer_norm"),
    ng.NormSpec("rms_norm"),
]


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "kind", "goal"),
    [
        ("instance_norm", (64, 256, 56, 56), "float32", "forward", Goal(0.92, False)),
        ("instance_norm", (64, 256, 56, 56), "float32", "backward", Goal(0.90, False)),
        ("batch_norm", (64, 256, 56, 56), "float32", "forward", Goal(0.85, False)),
        ("batch_norm", (64, 256, 56, 56), "float32", "backward", Goal(0.80, False)),
        ("instance_norm", (2, 32, 512, 512), "float32", "backward", Goal(0.80, False)),
        ("layer_norm", (512, 131072), "float32", "forward", Goal(0.80, False)),
        ("layer_norm", (8192, 4096), "float32", "backward", Goal(0.90, False)),
        ("layer_norm", (4096, 1024), "float32", "backward", Goal(None, False)),
        ("instance_norm", (16, 256, 14, 14), "float32", "forward", Goal(None, True)),
    ],
)
def test_goals(op: str, shape: tuple[int, ...], dtype: str, kind: str, goal: Goal) -> None:
    assert goal_of(Case(ng.NormSpec(op), shape, dtype), kind, COPY) == goal


def test_every_operator_and_dtype_is_among_the_cases() -> None:
    listed = cases()
    assert {case.spec.op for case in listed} == {spec.op for spec in SPECS}
    dtypes = ("float32", "float16", "bfloat16")
    assert {(case.spec.op, case.dtype) for case in listed} == {
        (spec.op, dtype) for spec in SPECS for dtype in dtypes
    }
    assert len({(case.spec, case.shape, case.dtype) for case in listed}) == len(listed)
    assert sum(case.nbytes >= LARGE for case in listed) > 10
    shared: dict[str, tuple[Any, ...]] = {}
    for case in listed:
        assert shared.setdefault(case.name, (case.spec, case.declared)) == (
            case.spec,
            case.declared,
        )


def test_the_most_telling_cases_come_first() -> None:
    listed = cases()
    telling = [case for case in listed if is_telling(case)]
    assert listed[: len(telling)] == telling
    assert {case.spec.op for case in telling} == {spec.op for spec in SPECS}
    goals = {goal_of(c, kind, COPY).what for c in telling for kind in ("forward", "backward")}
    every = {goal_of(c, kind, COPY).what for c in listed for kind in ("forward", "backward")}
    assert goals == every - {""}


def test_half_types_have_rows_longer_than_a_block() -> None:
    long = {(c.spec.op, c.dtype) for c in cases() if len(c.shape) == 2 and c.shape[1] >= 2**17}
    assert long >= {(o, t) for o in ("layer_norm", "rms_norm") for t in ("float16", "bfloat16")}


def test_awkward_shapes_reach_teams_on_single_elements() -> None:
    """Odd planes of more elements than a block holds, of a tensor that no L2 holds."""
    for case in cases():
        shapes = case.awkward
        assert all(shape[1] == case.shape[1] for shape in shapes)
        if len(case.shape) == 4:
            plane = shapes[-1][2] * shapes[-1][3]
            assert plane % 2
            assert plane > 32 * 1024
            size = {"float32": 4}.get(case.dtype, 2) * math.prod(shapes[-1])
            assert 300e6 <= size < 900e6


def test_jobs_are_done_once_and_the_telling_ones_first() -> None:
    listed = jobs()
    keys = [job.key for job in listed]
    assert len(set(keys)) == len(keys)
    tasks = {
        task: [job for job in listed if job.task == task]
        for task in (ACCURACY, BEHAVIOUR, TIME, COMPILED)
    }
    count = len(cases())
    assert len(tasks[TIME]) == len(tasks[COMPILED]) == 3 * count
    assert {(j.case.spec.op, j.shape, j.case.dtype) for j in tasks[BEHAVIOUR]} == set(BEHAVED)
    assert [job.task for job in listed[:6]] == [ACCURACY] * 3 + [TIME] * 3
    last_telling = max(n for n, j in enumerate(listed) if j.task == TIME and is_telling(j.case))
    first_other = min(n for n, j in enumerate(listed) if j.task == TIME and not is_telling(j.case))
    compiled = [n for n, j in enumerate(listed) if j.task == COMPILED and j.about == "backward"]
    assert last_telling < compiled[0] < first_other
    assert max(n for n, j in enumerate(listed) if j.task == BEHAVIOUR) < first_other


def test_the_jobs_of_some_cases_are_among_all() -> None:
    """A worker knows them by their keys."""
    every = {job.key for job in jobs()}
    for case in cases():
        listed = jobs([case])
        assert {job.key for job in listed} <= every
        assert {job.task for job in listed} >= {ACCURACY, TIME, COMPILED}


def test_a_lost_job_spoils_its_own_kernel_alone() -> None:
    one, other = cases()[:2]
    lost = Job(ACCURACY, one, one.shape, "forward")
    assert lost.spoils(Job(TIME, one, one.shape, "forward"))
    assert lost.spoils(Job(COMPILED, one, one.shape, "backward"))
    assert not lost.spoils(Job(TIME, one, one.shape, "inference"))
    assert not lost.spoils(Job(TIME, other, other.shape, "forward"))
    assert not lost.spoils(Job(ACCURACY, one, one.awkward[0], "forward"))
    assert not Job(COMPILED, one, one.shape, "forward").spoils(lost)
    assert not Job(ACCURACY, one, one.shape, "backward").spoils(lost)


def timed(ours: float, **others: float) -> dict[str, Any]:
    us = {"ours": ours, **others}
    return {"us": us, "captured": list(us), "starved": []}


def test_the_report_says_what_was_met_and_by_how_much_not() -> None:
    case = Case(ng.NormSpec("instance_norm"), (64, 256, 56, 56), "float32", (("forward", 99.0),))
    small = Case(ng.NormSpec("instance_norm"), (16, 256, 14, 14), "float32")
    least = case.moved("forward") / COPY * 1e6
    fast = least / 0.95
    floor = small.moved("forward") / COPY * 1e6
    rows = [
        gpu_report.row(case, "forward", timed(fast, eager=2 * fast, copy=fast), {}, LIMITS),
        gpu_report.row(case, "backward", timed(2 * least, eager=3 * least),
                       timed(2 * least, compiled=1.6 * least), LIMITS),
        gpu_report.row(small, "forward", timed(floor + 2.0), {}, LIMITS),
        gpu_report.row(small, "inference", timed(floor + 3.25), {}, LIMITS),
    ]  # fmt: skip
    assert [each["met"] for each in rows] == [True, False, True, False]
    assert rows[0]["share_of_copy"] == pytest.approx(0.95)
    assert rows[1]["short"] == pytest.approx(0.15)
    assert rows[3]["short"] == pytest.approx(1.25)
    assert rows[1]["ahead"] == pytest.approx({"eager": 1.5, "compiled": 0.8})
    assert rows[0]["ahead"] == pytest.approx({"eager": 2.0, "published": 99.0 / fast})
    report = {
        "device": {"name": "H", "arch": "sm_90", "processors": 1, "l2_bytes": 2**20, "driver": "1"},
        "versions": {"torch": "2"},
        "limits": [LIMITS],
        "left": 7,
        "numeric": [{"what": "a", "passed": True, "detail": ""},
                    {"what": "b", "passed": False, "detail": "dx 3"}],
        "rows": rows,
        "goals": gpu_report.goals(rows),
        "failures": ["compiled: no"],
    }  # fmt: skip
    text = gpu_report.markdown(report)
    assert "1 of 2 checks against float64 passed" in text
    assert "WRONG: b: dx 3" in text
    assert "Not finished: 7 jobs are left" in text
    assert "| slices of one block, forward and inference: 92% of copy | 1 | 1 |  |" in text
    missed = "instance_norm 64×256×56×56 float32 backward by 15.0 points"
    assert f"| slices of one block, backward: 90% of copy | 1 | 0 | {missed} |" in text
    assert f"Missed, slices of one block, backward: 90% of copy:\n- {missed}\n" in text
    assert "| floors under 5 µs: floor + launch | 2 | 1 |" in text
    assert "16×256×14×14 float32 inference by 1.25 µs" in text
    assert "| ahead of PyTorch eager | 2 | 2 |  |" in text
    assert "float32 backward by 25.0%" in text
    assert "| 95.0% | 92% of copy | yes |" in text
    assert "| no, by 15.0 points |" in text
    assert "| no: compiled 0.80× |" in text
    assert "## Not measured, or not counted\n\n- compiled: no" in text
    assert all(each["uncounted"] == [] for each in rows)
    json.dumps(report)


def test_times_with_the_host_in_them_count_for_no_goal() -> None:
    case = Case(ng.NormSpec("instance_norm"), (64, 256, 56, 56), "float32", (("forward", 99.0),))

    def row(timed: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
        return gpu_report.row(case, "forward", timed, beside, LIMITS)

    both, beside = timed(10.0, eager=20.0), timed(11.0, compiled=22.0)
    assert set(row(both, beside)["ahead"]) == {"eager", "compiled", "published"}
    peers = row({**both, "captured": ["ours"]}, {**beside, "starved": ["compiled"]})
    assert peers["met"]
    assert set(peers["ahead"]) == {"published"}
    assert peers["uncounted"] == ["eager", "compiled"]
    assert gpu_report._table([peers])[-1].count("| 20.00* | 22.00* |") == 1
    ours = row({**both, "starved": ["ours"]}, {**beside, "captured": ["compiled"]})
    assert ours["met"] is None
    assert ours["ahead"] == {}
    assert ours["uncounted"] == ["ours", "compiled"]
    assert "| 10.00* |" in gpu_report._table([ours])[-1]
    assert gpu_report.goals([ours]) == []
