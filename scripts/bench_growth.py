"""docs/benchmarks/growth.md: time and GB/s over size and threads, and the costs beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normgraph.scripts.bench import all_versions
from normgraph.scripts.bench_contest import LIMIT
from normgraph.scripts.bench_costs import Costs
from normgraph.scripts.bench_document import Causes
from normgraph.scripts.bench_peers import OURS
from normgraph.scripts.bench_plot import available, growth
from normgraph.scripts.bench_report import libraries, machine_line, markdown_table, not_timed

Points = Sequence[Mapping[str, Any]]

_INTRODUCTION = """\
# How cost grows

Written by `{command}`. Float32, x from 1 KB to 1 GB; instance, batch and group norm (32 groups) at
(N, 64, H, W), H and W growing to 32 and then N, layer and rms norm at (N, 256). Each thread count
ran in a process of its own. Ours writes into given arrays; torch is eager, its fresh outputs from a
warm heap, instance_norm as a group_norm; copy and add are torch's, of x, and of dy and x, into a
given array. Every result was checked before it was timed. Medians.

The best peer is the one with the smallest peer / ours of those that take the arrays row by row:
torch eager, instance_norm also as it is; onnxruntime, on the same graph and by its own operator;
oneDNN's own operators. Each is held against our call of the same sort: onnxruntime and oneDNN,
whose arrays are bound beforehand, against ours bound (`Operator.bind`), torch against ours with
outputs given. A peer that took more than twice ours in a first look has the time of that look.
Left out: torch.compile, stock TVM, and oneDNN's blocked layouts.
"""

_SLOWER = """\
Where our median lies above the best peer's 80th percentile, in a first contest and in a longer
second one; worst first. ours: the call of the best peer's sort; ratio: ours over the peer's."""
# What the lines of the plots are called, and whose times they are: the first that was timed.
_LINES = {
    "ours": (OURS,),
    "torch eager": ("torch eager, as group_norm", "torch eager"),
    "limit": (LIMIT,),
}


def draw(points: Points, out: Path) -> list[str]:
    """A plot a kind beside the document; the names of the files. None without matplotlib."""
    if not available():
        return []
    names = []
    for kind in dict.fromkeys(point["kind"] for point in points):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for point in points:
            if point["kind"] != kind:
                continue
            lines = panels.setdefault(f"{point['op']} {kind}", {})
            for label in _LINES:
                median = _median(point, label)
                if median is not None:
                    name = _limit(kind) if label == "limit" else label
                    line = lines.setdefault(f"{name}, {_threads(point)}", [])
                    line.append((point["size"], point["moved"] / median / 1e9))
        names.append(f"{out.stem}-{kind}.svg")
        growth(panels, out.parent / names[-1])
    return names


def document(
    points: Points,
    costs: Sequence[Costs],
    machine: Mapping[str, Any],
    command: str,
    plots: Sequence[str],
    causes: Causes,
) -> str:
    """The whole document."""
    versions = ", ".join(f"{name} {each}" for name, each in all_versions().items())
    versions += libraries(name for point in points for name in point["seconds"])
    slower = [point for point in points if point["slower"]]
    lines = [
        _INTRODUCTION.format(command=command),
        machine_line(machine),
        f"Versions: {versions}.",
        *(f"\n![{Path(name).stem}]({name})" for name in plots),
    ]
    for kind in dict.fromkeys(point["kind"] for point in points):
        for threads in dict.fromkeys(point["threads"] for point in points):
            chosen = [p for p in points if (p["kind"], p["threads"]) == (kind, threads)]
            if chosen:
                lines += ["", f"## {kind.capitalize()}, {_threads(chosen[0])}", ""]
                lines += _times(chosen, _limit(kind))
    lines += ["", "## Slower", "", f"{len(slower)} of {len(points)} rows. {_SLOWER}"]
    if slower:
        lines += ["", *_slower(slower, causes)]
    missing = not_timed(
        (peer, reason, _where(points, point, peer))
        for point in points
        for peer, reason in point["missing"].items()
    )
    if missing:
        lines += ["", "## Not timed", "", *missing]
    lines += ["", "## Beside the kernels", "", *_costs(costs)]
    return "\n".join(lines) + "\n"


def _times(points: Points, limit: str) -> list[str]:
    """A line a size: our time, GB/s, and the ratios to the limit, to torch and to the best peer."""
    heads = ("x", "operator", "shape", "ours", "GB/s", limit, f"ours / {limit}", "torch / ours",
             "best peer", "its time", "best peer / ours")  # fmt: skip
    rows = []
    for point in sorted(points, key=lambda point: point["size"]):
        ours, torch, floor = (_median(point, label) for label in ("ours", "torch eager", "limit"))
        if ours is None:
            continue
        best = point["best"]
        rows.append(
            (
                _bytes(point["size"]),
                point["op"],
                _shape(point),
                _time(ours),
                f"{point['moved'] / ours / 1e9:.3g}",
                _time(floor),
                f"{ours / floor:.2f}" if floor else "",
                f"{torch / ours:.2f}" if torch else "",
                best,
                _time(point["seconds"][best][0]) if best else "",
                f"{1.0 / _ratio(point):.2f}" if best else "",
            )
        )
    return markdown_table(rows, heads)


def _slower(points: Points, causes: Causes) -> list[str]:
    heads = ("operator", "shape", "kind", "threads", "ours", "best peer", "its time", "ratio",
             "why")  # fmt: skip
    rows = [
        (
            point["op"],
            _shape(point),
            point["kind"],
            str(point["threads"]),
            _time(point["seconds"][point["same_sort"]][0]),
            point["best"],
            _time(point["seconds"][point["best"]][0]),
            f"{_ratio(point):.2f}",
            causes.get((point["op"], _shape(point), point["kind"], "float32"), ""),
        )
        for point in sorted(points, key=lambda point: -_ratio(point))
    ]
    return markdown_table(rows, heads)


def _ratio(point: Mapping[str, Any]) -> float:
    """Our call of the best peer's sort over that peer."""
    ours, best = (point["seconds"][point[each]][0] for each in ("same_sort", "best"))
    return float(ours / best)


def _where(points: Points, point: Mapping[str, Any], peer: str) -> str:
    """The operator and the kind where a peer is missing, and the size where it is not at all."""
    same = [p for p in points if (p["op"], p["kind"]) == (point["op"], point["kind"])]
    everywhere = all(peer in each["missing"] for each in same)
    size = "" if everywhere else f" of {_bytes(point['size'])}, {_threads(point)}"
    return f"{point['op']} {point['kind']}{size}"


_CALLS = ("inference", "backward", "forward", "forward, bound")


def _costs(costs: Sequence[Costs]) -> list[str]:
    heads = ("operator", "compile a graph", "load", "artifact", "its library",
             "inference call", "backward call", "forward call", "forward, bound",
             "memory, forward", "memory, backward")  # fmt: skip
    rows = [
        (
            each.op,
            f"{each.compile:.2f} s",
            f"{each.load * 1e3:.1f} ms",
            _bytes(each.size),
            _bytes(each.library),
            *(_time(each.calls.get(kind)) for kind in _CALLS),
            *(_bytes(each.memory.get(kind)) for kind in ("forward", "backward")),
        )
        for each in costs
    ]
    notes = [
        "Artifacts with forward, inference and backward. compile: one graph, the self-test "
        "included, in a process that has compiled before. load: every file checked, the library "
        "opened before. Calls: "
        + ", ".join(f"{each.op} at {'×'.join(map(str, each.call_shape))}" for each in costs)
        + ", serial; inference and forward into given arrays, backward with fresh ones, forward "
        "also with its arrays bound. memory: by how much "
        "the process grows in a call with every array given, x of 64 MB.",
    ]
    return [*markdown_table(rows, heads), "", *notes]


def _median(point: Mapping[str, Any], line: str) -> float | None:
    """The median of what a line of the plots shows."""
    found = (point["seconds"].get(name) for name in _LINES[line])
    return next((float(each[0]) for each in found if each), None)


def _limit(kind: str) -> str:
    return "copy" if kind == "forward" else "add"


def _shape(point: Mapping[str, Any]) -> str:
    return "×".join(map(str, point["shape"]))


def _threads(point: Mapping[str, Any]) -> str:
    return "1 thread" if point["threads"] == 1 else f"{point['threads']} threads"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}"
    return f"{count} B"
