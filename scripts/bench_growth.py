"""docs/benchmarks/growth.md: time and GB/s over size and threads, and the costs beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normgraph.scripts.bench import all_versions
from normgraph.scripts.bench_costs import Costs
from normgraph.scripts.bench_plot import available, growth
from normgraph.scripts.bench_report import machine_line, markdown_table

Points = Sequence[Mapping[str, Any]]

_INTRODUCTION = """\
# How cost grows

Written by `{command}`. Float32, x from 1 KB to 1 GB; instance, batch and group norm (32 groups) at
(N, 64, H, W), H and W growing to 32 and then N, layer and rms norm at (N, 256). Each thread count
ran in a process of its own. Ours writes into given arrays; torch is eager, its fresh outputs from a
warm heap, instance_norm as a group_norm; copy and add are torch's, of x, and of dy and x, into a
given array. Every result was checked before it was timed. Medians.
"""


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
            for label, (median, _, _) in point["seconds"].items():
                name = ("copy" if kind == "forward" else "add") if label == "limit" else label
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
) -> str:
    """The whole document."""
    versions = ", ".join(f"{name} {each}" for name, each in all_versions().items())
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
                lines += _times(chosen, "copy" if kind == "forward" else "add")
    lines += ["", "## Beside the kernels", "", *_costs(costs)]
    return "\n".join(lines) + "\n"


def _times(points: Points, limit: str) -> list[str]:
    """A line a size: our time, GB/s, and the ratios to torch and to the limit."""
    heads = ["x", "operator", "shape", "ours", "GB/s", "torch", f"{limit}", "torch / ours"]
    heads.append(f"ours / {limit}")
    rows = []
    for point in sorted(points, key=lambda point: point["size"]):
        seconds = {label: median for label, (median, _, _) in point["seconds"].items()}
        ours, torch, floor = (seconds.get(name) for name in ("ours", "torch eager", "limit"))
        if ours is None:
            continue
        rows.append(
            (
                _bytes(point["size"]),
                point["op"],
                "×".join(map(str, point["shape"])),
                _time(ours),
                f"{point['moved'] / ours / 1e9:.3g}",
                _time(torch),
                _time(floor),
                f"{torch / ours:.2f}" if torch else "",
                f"{ours / floor:.2f}" if floor else "",
            )
        )
    return markdown_table(rows, heads)


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
