"""docs/benchmarks/cpu.md: the goals, every peer, and why a goal is missed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from normgraph.scripts.bench_cases import KINDS, Case, goal_of, verdict
from normgraph.scripts.bench_peers import DX_ALONE, OURS, OURS_BOUND
from normgraph.scripts.bench_report import (
    BenchReport,
    Row,
    libraries,
    machine_line,
    markdown_table,
    not_timed,
    overhead_lines,
)

Measured = Sequence[tuple[Case, BenchReport]]
CAUSES = "causes.json"
Causes = Mapping[tuple[str, str, str, str], str]

_INTRODUCTION = """\
# CPU benchmark

Written by `{command}`. Every result was checked against float64 before it was timed. Times are
milliseconds: the median of many calls, the 20th and the 80th percentile in brackets. Ratios are of
medians in one run; trust them further than the times. All peers of a row ran in one process, on the
same inputs, taking turns, with a rest between them so that no pool of threads spins beside another,
and each thread on a core of its own.

- ours: one artifact for each operator, channel count and dtype, all other extents symbolic; outputs
  given (`out=`). "fresh": outputs allocated by each call, from memory the process keeps (warm) or
  that the system hands out page by page (cold). "bound": all arrays checked beforehand
  (`Operator.bind`), so that a call passes none. "dx alone": `want=("dx",)`, dx given.
- copy, add: torch's `copy_` of x for forward and inference, its `add` of dy and x for backward,
  into a given array: the memory limit. "plain" and "non-temporal" are the same in C; the last
  writes past the cache, and is the least time there is once arrays exceed it.
- torch: eager `torch.nn.functional`, backward by autograd on a forward recorded once. Its operators
  take no `out=`: outputs are fresh, warm or cold. instance_norm also as `group_norm` of one channel
  a group, which is faster there. "compiled": `torch.compile`, for this shape alone.
- onnxruntime: "graph" is the same .onnx file, "operator" its own operator; all arrays bound
  beforehand (`io_binding`).
- oneDNN: its own operators through the C interface, outputs given; "blocked" is nChw16c, into
  which x and dy were put beforehand. "in torch": the newer one that torch holds, outputs fresh.
- stock TVM: the same graph for this one shape through TVM's default pipeline.
- peer / ours: each peer against our call of the same sort: onnxruntime and oneDNN's C interface,
  whose arrays are bound, against ours bound, every other against ours with outputs given.
- best peer: the one with the smallest peer / ours on a warm heap, given or fresh outputs, of those
  that take the arrays row by row as ours does. What oneDNN does in its blocked layout has a column
  of its own; it counts for the goal at 14×14 and 7×7.
"""
_PEERS = (
    ("ours", OURS, "given"),
    ("ours, bound", OURS_BOUND, "given"),
    ("ours, fresh, warm", OURS, "warm"),
    ("ours, fresh, cold", OURS, "cold"),
    ("torch, warm", "torch eager", "warm"),
    ("torch, cold", "torch eager", "cold"),
    ("as group_norm", "torch eager, as group_norm", "warm"),
    ("compiled, warm", "torch.compile", "warm"),
    ("compiled, cold", "torch.compile", "cold"),
    ("onnxruntime, graph", "onnxruntime, same graph", "given"),
    ("onnxruntime, operator", "onnxruntime, own operator", "given"),
    ("oneDNN", "oneDNN *row-major", "given"),
    ("oneDNN, blocked", "oneDNN *blocked", "given"),
    ("oneDNN in torch, blocked", "oneDNN *in torch", "warm"),
    ("stock TVM", "stock TVM", "warm"),
    ("copy, add", "limit *torch", "given"),
    ("plain", "limit *plain", "given"),
    ("non-temporal", "limit *non-temporal", "given"),
)


def document(measured: Measured, command: str, causes: Causes, plots: Sequence[str] = ()) -> str:
    """The whole document; `plots` are names of files beside it."""
    first = measured[0][1]
    machine = first.machine
    lines = [
        _INTRODUCTION.format(command=command),
        machine_line(machine),
        "Versions: "
        + ", ".join(f"{name} {each}" for name, each in first.versions.items())
        + libraries(row.peer for _, report in measured for row in report.rows if row.timing)
        + ".",
        f"Threads: {_threads(measured)}.",
    ]
    if machine["load"] > 1.0 and machine["nice"] > -20:
        lines += ["", "The machine was busy before the start."]
    for dtype in dict.fromkeys(case.dtype for case, _ in measured):
        lines += ["", f"## Goals, {dtype}", ""]
        lines += _goals([each for each in measured if each[0].dtype == dtype], causes)
    lines += [f"\n![{Path(name).stem}]({name})" for name in plots]
    for kind in KINDS:
        lines += ["", f"## Every peer: {kind}", ""]
        lines += _peers(measured, kind)
    lines += ["", "## Not timed", "", *_missing(measured)]
    lines += ["", "## Beside the kernels", "", *_beside(measured)]
    return "\n".join(lines) + "\n"


def read_causes(path: Path) -> Causes:
    """Why a goal is missed: a JSON list of operator, shape, kind, dtype and why; {} if no file."""
    if not path.exists():
        return {}
    return {
        (each["operator"], each["shape"], each["kind"], each["dtype"]): each["why"]
        for each in json.loads(path.read_text())
    }


def _goals(measured: Measured, causes: Causes) -> list[str]:
    heads = (
        "operator", "shape", "kind", "ours", "ours, bound", "best peer", "its time", "peer / ours",
        "blocked / ours", "goal", "ours / copy, add", "goal", "ours / non-temporal",
        "dx alone / all", "verdict", "why",
    )  # fmt: skip
    rows = []
    for case, report in measured:
        for kind in KINDS:
            ours, best = report.find(kind, OURS, "given"), report.best_peer(kind)
            if ours is None:
                continue
            goal = goal_of(case, kind)
            other = report.best_peer(kind, blocked=True)
            peer = best.ratio if best is not None else None
            blocked = other.ratio if other is not None else None
            rivals = [each for each in (peer, blocked if goal.blocked else None) if each]
            alone = report.find(kind, DX_ALONE, "given")
            said = verdict(goal, ours.over_limit, min(rivals, default=None))
            rows.append(
                (
                    case.spec.op,
                    case.size,
                    kind,
                    _time(ours),
                    _time(report.find(kind, OURS_BOUND, "given")),
                    "" if best is None else best.peer,
                    _time(best),
                    _number(peer),
                    _number(blocked),
                    _number(goal.peer),
                    _number(ours.over_limit),
                    _number(goal.limit),
                    _number(ours.over_floor),
                    _number(None if alone is None else alone.ratio),
                    said,
                    causes.get((case.spec.op, case.size, kind, case.dtype), ""),
                )
            )
    met = sum(row[-2] == "met" for row in rows)
    return [f"{met} of {len(rows)} goals met.", "", *markdown_table(rows, heads)]


def _peers(measured: Measured, kind: str) -> list[str]:
    heads = ("operator", "shape", "dtype", *(head for head, _, _ in _PEERS))
    rows = [
        (
            case.spec.op,
            case.size,
            case.dtype,
            *(_time(_row(report, kind, peer, heap)) for _, peer, heap in _PEERS),
        )
        for case, report in measured
    ]
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return markdown_table(
        [[row[place] for place in kept] for row in rows], [heads[place] for place in kept]
    )


def _row(report: BenchReport, kind: str, peer: str, heap: str) -> Row | None:
    """The row of a peer by its name, or by its start and a part of it with a star between."""
    start, star, part = peer.partition(" *")
    for row in report.rows:
        if row.kind != kind or row.heap != heap or row.timing is None:
            continue
        if not star and row.peer == peer:
            return row
        if star and part in row.peer and (row.limit if start == "limit" else start in row.peer):
            return row
    return None


def _missing(measured: Measured) -> list[str]:
    """Each reason once, with whom it kept from what."""
    return not_timed(
        (row.peer, row.reason, f"{case.spec.op} {row.kind} {case.dtype}")
        for case, report in measured
        for row in report.rows
        if row.timing is None
    )


def _beside(measured: Measured) -> list[str]:
    lines = []
    for case, report in measured:
        if report.overheads is not None:
            lines += [f"{case.spec.op}, {case.dtype}:", ""]
            lines += [f"- {line}" for line in overhead_lines(report.overheads)]
    taken = sorted(
        row.setup
        for _, report in measured
        for row in report.rows
        if row.setup is not None and row.heap == "warm"
    )
    if taken:
        lines.append(
            f"- torch.compile of one kind at one shape: {taken[len(taken) // 2]:.1f} s "
            f"({taken[0]:.1f} to {taken[-1]:.1f})"
        )
    return lines


def _threads(measured: Measured) -> str:
    counts = {row.threads for _, report in measured for row in report.rows if row.timing}
    ours = {row.threads for _, r in measured for row in r.rows if row.peer == OURS and row.timing}
    return f"{', '.join(map(str, sorted(counts)))}; ours {', '.join(map(str, sorted(ours)))}"


def _time(row: Row | None) -> str:
    if row is None or row.timing is None:
        return ""
    t = row.timing
    return f"{t.median * 1e3:.3g} ({t.low * 1e3:.3g} to {t.high * 1e3:.3g})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
