"""The results of a GPU check as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normgraph.scripts.gpu_cases import Case, Goal

_COLUMNS = ("operator", "x", "dtype", "kind", "ours µs", "TB/s", "of copy", "goal", "met",
            "eager µs", "compiled µs", "published µs", "ahead")  # fmt: skip


def row(
    case: Case,
    kind: str,
    goal: Goal,
    seconds: Mapping[str, float],
    copy_bandwidth: float,
    launch: float,
) -> dict[str, Any]:
    """One timed kind. seconds: ours, and of eager, compiled and copy those that were measured."""
    bandwidth = case.moved(kind) / seconds["ours"]
    floor = case.moved(kind) / copy_bandwidth
    met = None
    if goal.share is not None:
        met = bandwidth / copy_bandwidth >= goal.share
    elif goal.floor:
        met = seconds["ours"] <= floor + launch
    published = dict(case.published).get(kind)
    peers = [seconds[name] for name in ("eager", "compiled") if name in seconds]
    if published is not None:
        peers.append(published * 1e-6)
    return {
        "operator": case.spec.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "kind": kind,
        "us": {name: round(value * 1e6, 3) for name, value in seconds.items()},
        "published_us": None if published is None else round(published, 3),
        "bandwidth": bandwidth,
        "share_of_copy": bandwidth / copy_bandwidth,
        "floor_us": round(floor * 1e6, 3),
        "goal": str(goal),
        "met": met,
        "ahead": all(seconds["ours"] <= each for each in peers) if peers else None,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report for a reader."""
    device = report["device"]
    numeric = report["numeric"]
    wrong = [each for each in numeric if not each["passed"]]
    lines = [
        f"# GPU check: {device['name']}",
        "",
        f"{device['arch']}, {device['processors']} multiprocessors, "
        f"{device['l2_bytes'] / 2**20:.0f} MiB of L2; driver for CUDA {device['driver']}; "
        + ", ".join(f"{name} {value}" for name, value in report["versions"].items())
        + ".",
        "",
        f"Measured in this run: a copy on the device moves {report['copy_bandwidth'] / 1e12:.2f} "
        f"TB/s (bytes read and written), a kernel of one element takes "
        f"{report['launch_us']:.2f} µs in a graph.",
        "",
        "Times are medians between device events, of calls captured in a CUDA graph that take "
        "turns on arrays of more than the L2 cache together. TB/s counts each array once: x and "
        "y, or x, dy and dx. Outputs of ours are given; PyTorch's are fresh, from its pool.",
        "",
        f"Accuracy: {len(numeric) - len(wrong)} of {len(numeric)} checks against float64 passed.",
    ]
    for each in wrong:
        lines.append(f"- WRONG: {each['what']}: {each['detail']}")
    if report["rows"]:
        lines += ["", *_table(report["rows"]), "", _summary(report["rows"])]
    lines += [f"- not measured: {text}" for text in report["failures"]]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "-|" * len(_COLUMNS)]
    for each in rows:
        cells = (
            each["operator"],
            "×".join(map(str, each["shape"])),
            each["dtype"],
            each["kind"],
            _number(each["us"]["ours"]),
            f"{each['bandwidth'] / 1e12:.2f}",
            f"{each['share_of_copy']:.0%}",
            each["goal"],
            _word(each["met"]),
            _number(each["us"].get("eager")),
            _number(each["us"].get("compiled")),
            _number(each["published_us"]),
            _word(each["ahead"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    held = [each["met"] for each in rows if each["met"] is not None]
    raced = [each["ahead"] for each in rows if each["ahead"] is not None]
    return (
        f"Goals met: {sum(held)} of {len(held)}. Ahead of every peer: {sum(raced)} of {len(raced)}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _word(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
