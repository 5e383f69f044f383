"""What `bench_random` measured, as text, as JSON and as a document."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from normgraph.scripts.bench import all_versions
from normgraph.scripts.bench_document import Causes
from normgraph.scripts.bench_report import (
    libraries,
    machine_line,
    markdown_table,
    not_timed,
)
from normgraph.scripts.bench_timing import Timing
from normgraph.scripts.console import table as text_table

_INTRODUCTION = """\
# Random shapes

Written by `{command}`. Seeded shapes of all operators, odd sizes included, each kind a row, against
the peers that take the arrays row by row, from a warm heap: {peers}.
Left out: {left_out}. Every artifact has one channel count or row length and leaves the other
extents open. Every result was checked against float64 before it was timed; what was not timed is
listed at the end, with the reasons.

Each peer is held against our call of the same sort: onnxruntime and oneDNN, whose arrays are bound
beforehand, against ours bound (`Operator.bind`), torch against ours with outputs given.
Ratio: our median over the peer's; the best peer is the one with the largest. A row is slower when
our median lies above the best peer's 80th percentile, in a first contest and in a longer second
one."""
_PEERS = (
    "torch eager, instance_norm also as a group_norm",
    "onnxruntime, on the same graph and by its own operator",
    "oneDNN's own operators",
)
_LEFT_OUT = ("oneDNN's blocked layouts", "stock TVM")
_COMPILED = "torch.compile"

# Bytes moved: within the first two caches of a core, within the last, and beyond.
_CLASSES = (("up to 1 MB", 0.0, 1e6), ("1 to 32 MB", 1e6, 32e6), ("above", 32e6, float("inf")))


@dataclass(frozen=True)
class Result:
    """One kind at one shape.

    number   of the shape in the draw: `--only` takes it
    ours     with outputs given; bound: with all arrays bound
    best_peer  the one with the worst ratio for us, each against our call of the same sort
    bound_peers  those whose arrays were bound
    ratio    our median over that of the best peer: above 1 is slower
    slower   our median lies above the best peer's 80th percentile
    limit    median of the copy or the add
    fresh    ours with outputs allocated by each call
    """

    number: int
    op: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: int | None
    bytes: int
    ours: Timing
    bound: Timing
    fresh: Timing
    limit: Timing | None
    best_peer: str
    ratio: float
    slower: bool
    gigabytes_per_second: float
    peers: dict[str, Timing]
    bound_peers: tuple[str, ...]
    missing: dict[str, str]

    @property
    def same_sort(self) -> Timing:
        """Our call of the sort of the best peer's."""
        return self.bound if self.best_peer in self.bound_peers else self.ours


def as_text(results: Sequence[Result], all_rows: bool = False) -> str:
    """How many rows are slower, and those, worst first."""
    slower = [result for result in results if result.slower]
    shown = sorted(results if all_rows else slower, key=lambda result: -result.ratio)
    lines = [
        f"{len(results)} rows: in {len(slower)} the best peer is faster than ours, outside its "
        "spread. Worst first; milliseconds; ratio: ours over the best peer.",
    ]
    if results:
        ratios = sorted(result.ratio for result in results)
        lines.append(
            f"ratio: best {ratios[0]:.3f}, median {ratios[len(ratios) // 2]:.3f}, "
            f"worst {ratios[-1]:.3f}"
        )
    rows = [
        (
            each.number,
            each.op,
            each.kind,
            "x".join(map(str, each.shape)),
            each.groups or "",
            f"{each.bytes / 1e6:.3g}",
            f"{each.same_sort.median * 1e3:.4f}",
            f"{each.peers[each.best_peer].median * 1e3:.4f}" if each.best_peer else "",
            f"{each.peers[each.best_peer].high * 1e3:.4f}" if each.best_peer else "",
            f"{each.ratio:.2f}",
            "" if each.limit is None else f"{each.ours.median / each.limit.median:.2f}",
            f"{each.gigabytes_per_second:.1f}",
            each.best_peer,
        )
        for each in shown
    ]
    heads = (
        "number", "operator", "kind", "shape", "groups", "MB moved", "ours", "peer", "peer 80 %",
        "ratio", "/ limit", "GB/s", "best peer",
    )  # fmt: skip
    if rows:
        lines += ["", text_table(rows, heads)]
    return "\n".join(lines)


def as_json(results: Sequence[Result], settings: dict[str, Any], before: dict[str, Any]) -> str:
    """Everything, for a program to read."""
    return json.dumps(
        {
            "machine": before,
            "versions": all_versions(),
            "settings": settings,
            "rows": [asdict(result) for result in results],
        },
        indent=1,
    )


def document(
    results: Sequence[Result], command: str, about: Mapping[str, Any], causes: Causes
) -> str:
    """The whole document."""
    slower = sorted((each for each in results if each.slower), key=lambda each: -each.ratio)
    compiled = any(_COMPILED in (*each.peers, *each.missing) for each in results)
    left_out = _LEFT_OUT if compiled else (*_LEFT_OUT, f"{_COMPILED} (`--compiled` takes it in)")
    peers = (*_PEERS, _COMPILED) if compiled else _PEERS
    lines = [
        _INTRODUCTION.format(
            command=command,
            peers="; ".join(peers),
            left_out=", ".join(left_out),
        ),
        "",
        machine_line(about),
        "Versions: "
        + ", ".join(f"{name} {each}" for name, each in all_versions().items())
        + libraries(name for each in results for name in each.peers)
        + ".",
        "",
        f"{len(results)} rows, {len(slower)} of them slower.",
        "",
        *_standing(results),
    ]
    if slower:
        lines += ["", "## Slower", "", *_slower(slower, causes)]
    missing = not_timed(
        (peer, reason, f"{each.op} {each.kind}")
        for each in results
        for peer, reason in each.missing.items()
    )
    if missing:
        lines += ["", "## Not timed", "", *missing]
    return "\n".join(lines) + "\n"


def _standing(results: Sequence[Result]) -> list[str]:
    groups = {
        op: [each for each in results if each.op == op]
        for op in dict.fromkeys(each.op for each in results)
    }
    for name, least, most in _CLASSES:
        groups[f"{name} moved"] = [each for each in results if least <= each.bytes < most]
    rows = []
    for name, members in groups.items():
        if members:
            ratios = [each.ratio for each in members]
            cells = (min(ratios), statistics.median(ratios), max(ratios))
            count = sum(each.slower for each in members)
            rows.append((name, str(len(members)), *(f"{each:.2f}" for each in cells), str(count)))
    return markdown_table(rows, ("", "rows", "best ratio", "median", "worst", "slower"))


def _slower(rows: Sequence[Result], causes: Causes) -> list[str]:
    cells = []
    for each in rows:
        shape = "×".join(map(str, each.shape)) + (f" in {each.groups}" if each.groups else "")
        peer = each.peers[each.best_peer]
        why = causes.get((each.op, "×".join(map(str, each.shape)), each.kind, each.dtype), "")
        times = (f"{1e3 * each.same_sort.median:.4f}", f"{1e3 * peer.median:.4f}")
        cells.append(
            (each.op, shape, each.kind, f"{each.bytes / 1e6:.3g}", *times, each.best_peer,
             f"{each.ratio:.2f}", why)
        )  # fmt: skip
    heads = (
        "operator", "shape", "kind", "MB moved", "ours, ms", "best peer, ms", "best peer", "ratio",
        "why",
    )  # fmt: skip
    return markdown_table(cells, heads)
