"""The results of a GPU check as rows, goals and a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normgraph.scripts.gpu_cases import Case, goal_of

_COLUMNS = ("operator", "x", "dtype", "kind", "ours µs", "TB/s", "of copy", "goal", "met",
            "eager µs", "compiled µs", "published µs", "ahead")  # fmt: skip
# Who is to be slower, in the order of the report.
_PEERS = {
    "eager": "ahead of PyTorch eager",
    "compiled": "ahead of torch.compile",
    "published": "ahead of what others published",
}


def row(
    case: Case,
    kind: str,
    timed: Mapping[str, Any],
    beside: Mapping[str, Any],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """One timed kind.

    timed: what `Bench.time` gave of ours, eager and copies. beside: of ours and torch.compile, or
    nothing. limits: copy_bandwidth and launch_us of the same run.

    short: what is missing to the goal, as a share of the copy bandwidth or in microseconds, up to 0
    where it is met. ahead: by peer how many times as long it took. uncounted: whose times the host
    may be in; neither holds one of these.
    """
    us, copy_bandwidth = dict(timed["us"]), limits["copy_bandwidth"]
    compiled = beside.get("us", {})
    fair, fair_beside = _fair(timed), _fair(beside)
    goal = goal_of(case, kind, copy_bandwidth)
    bandwidth = case.moved(kind) / us["ours"] * 1e6
    floor = case.moved(kind) / copy_bandwidth * 1e6
    share = bandwidth / copy_bandwidth
    short = None
    if "ours" in fair and goal.share is not None:
        short = goal.share - share
    elif "ours" in fair and goal.floor:
        short = us["ours"] - floor - limits["launch_us"]
    ahead = {}
    if {"eager", "ours"} <= fair:
        ahead["eager"] = us["eager"] / us["ours"]
    if {"compiled", "ours"} <= fair_beside:
        ahead["compiled"] = compiled["compiled"] / compiled["ours"]
    uncounted = sorted((us.keys() & {"ours", "eager"}) - fair)
    if {"compiled", "ours"} <= compiled.keys():
        if "compiled" not in ahead:
            uncounted.append("compiled")
        us |= {"compiled": compiled["compiled"], "ours beside compiled": compiled["ours"]}
    published = dict(case.published).get(kind)
    if published is not None and "ours" in fair:
        ahead["published"] = published / us["ours"]
    return {
        "operator": case.spec.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "kind": kind,
        "us": us,
        "spread_us": timed.get("spread_us"),
        "published_us": None if published is None else round(published, 3),
        "bandwidth": bandwidth,
        "share_of_copy": share,
        "floor_us": round(floor, 3),
        "goal": str(goal),
        "goal_of": goal.what,
        "met": None if short is None else short <= 0,
        "short": short,
        "ahead": ahead,
        "uncounted": uncounted,
    }


def _fair(timed: Mapping[str, Any]) -> set[str]:
    """Who was timed in a CUDA graph that the device did not wait for."""
    return set(timed.get("us", ())) & set(timed.get("captured", ())) - set(timed.get("starved", ()))


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By goal how many rows there are, how many meet it, and the rows that miss it, worst first."""
    found: dict[str, list[tuple[float, bool, str]]] = {}
    for each in rows:
        if each["met"] is not None:
            found.setdefault(f"{each['goal_of']}: {each['goal']}", []).append(
                (each["short"], each["met"], f"{_title(each)} by {_short(each)}")
            )
    for peer, text in _PEERS.items():
        for each in rows:
            times = each["ahead"].get(peer)
            if times is not None:
                by = f"{_title(each)} by {1 / times - 1:.1%}"
                found.setdefault(text, []).append((-times, times >= 1, by))
    return [
        {
            "goal": name,
            "rows": len(held),
            "met": sum(met for _, met, _ in held),
            "missed": [text for _, met, text in sorted(held, reverse=True) if not met],
        }
        for name, held in sorted(found.items(), key=lambda each: each[0].startswith("ahead"))
    ]


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
    ]
    if report["left"]:
        lines += ["", f"Not finished: {report['left']} jobs are left. Running it again goes on."]
    lines += [
        "",
        f"Accuracy: {len(numeric) - len(wrong)} of {len(numeric)} checks against float64 passed.",
        *(f"- WRONG: {each['what']}: {each['detail']}" for each in wrong),
    ]
    if report["rows"]:
        lines += ["", "## Goals", "", *_goals(report["goals"])]
        lines += ["", "## Times", "", *_measure(report["limits"]), "", *_table(report["rows"])]
    if report["failures"]:
        lines += [
            "",
            "## Not measured, or not counted",
            "",
            *(f"- {text}" for text in report["failures"]),
        ]
    return "\n".join(lines) + "\n"


def _goals(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| goal | rows | met | missed most |", "|-|-|-|-|"]
    for each in found:
        worst = each["missed"][0] if each["missed"] else ""
        lines.append(f"| {each['goal']} | {each['rows']} | {each['met']} | {worst} |")
    for each in found:
        if each["missed"]:
            lines += ["", f"Missed, {each['goal']}:", *(f"- {text}" for text in each["missed"])]
    return lines


def _measure(limits: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"Run {number}: the fastest copy on the device moves {each['copy_bandwidth'] / 1e12:.3f}"
        f" TB/s (bytes read and written;"
        f" {', '.join(f'{name} {speed / 1e12:.3f}' for name, speed in each['copies'].items())}),"
        f" a kernel of one element takes {each['launch_us']:.2f} µs in a graph."
        for number, each in enumerate(limits, 1)
    ]
    return [
        *lines,
        "",
        "Times are medians between device events, of calls captured in a CUDA graph that take "
        "turns on arrays of more than the L2 cache together; ours, a peer and copies are timed in "
        "turns too. TB/s counts each array once: x and y, or x, dy and dx. Outputs of ours are "
        "given; PyTorch's are fresh, from its pool. A time with a * was launched call by call, or "
        "the device waited for its launches: the host's time may be in it, and no goal counts it.",
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "-|" * len(_COLUMNS)]
    for each in rows:
        cells = (
            each["operator"],
            "×".join(map(str, each["shape"])),
            each["dtype"],
            each["kind"],
            _time(each, "ours"),
            f"{each['bandwidth'] / 1e12:.2f}",
            f"{each['share_of_copy']:.1%}",
            each["goal"],
            _met(each),
            _time(each, "eager"),
            _time(each, "compiled"),
            _number(each["published_us"]),
            _ahead(each["ahead"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _title(each: Mapping[str, Any]) -> str:
    size = "×".join(map(str, each["shape"]))
    return f"{each['operator']} {size} {each['dtype']} {each['kind']}"


def _short(each: Mapping[str, Any]) -> str:
    if each["goal"].endswith("of copy"):
        return f"{100 * each['short']:.1f} points"
    return f"{each['short']:.2f} µs"


def _met(each: Mapping[str, Any]) -> str:
    if each["met"] is None:
        return ""
    return "yes" if each["met"] else f"no, by {_short(each)}"


def _ahead(ahead: Mapping[str, float]) -> str:
    behind = [f"{peer} {times:.2f}×" for peer, times in ahead.items() if times < 1]
    if not ahead:
        return ""
    return f"no: {', '.join(behind)}" if behind else f"yes, {min(ahead.values()):.2f}×"


def _time(each: Mapping[str, Any], name: str) -> str:
    mark = "*" if name in each["uncounted"] else ""
    return _number(each["us"].get(name)) + mark


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
