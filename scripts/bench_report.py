"""What a bench measured, as text, as JSON and as rows of a Markdown table."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normgraph.scripts.bench_peers import OURS
from normgraph.scripts.bench_threads import cores
from normgraph.scripts.bench_timing import Timing
from normgraph.scripts.console import table


@dataclass(frozen=True)
class Row:
    """One peer at one kind.

    heap     "given": outputs allocated once; "warm": fresh outputs from memory kept by the process;
             "cold": fresh outputs from memory the system hands out page by page
    timing   None where the peer could not be run or was wrong; `reason` says why
    ratio    its median over that of our call of the same sort, bound or with given outputs: above 1
             is slower than ours
    over_limit  its median over that of the copy or the add by a library
    over_floor  the same with non-temporal stores
    detail   what ran, where the peer says so
    setup    seconds it took to compile, where it compiles
    limit    it is a copy or an add itself
    blocked  its arrays are in a blocked layout, not row by row as ours are
    bound    its arrays were bound beforehand
    """

    kind: str
    peer: str
    heap: str
    threads: int
    timing: Timing | None = None
    ratio: float | None = None
    over_limit: float | None = None
    over_floor: float | None = None
    gigabytes_per_second: float | None = None
    reason: str = ""
    detail: str = ""
    setup: float | None = None
    limit: bool = False
    blocked: bool = False
    bound: bool = False


@dataclass(frozen=True)
class Overheads:
    """Costs beside the kernels. Seconds; None where it was not measured.

    graph_build        one backward graph, with the checker
    compile            one backward graph to a library in this process, imports and self-test apart
    inference_call     a call at `call_shape` with out=, serial kernel, a process without TVM
    backward_call      a call at `call_shape` with fresh outputs, the same process
    forward_call       a call at `call_shape` with out=, the same process
    bound_call         the same forward with its arrays bound
    """

    graph_build: float | None
    compile: float | None
    inference_call: float | None
    backward_call: float | None
    forward_call: float | None
    bound_call: float | None
    call_shape: tuple[int, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class BenchReport:
    """All rows of one artifact at one shape, with the machine they were measured on."""

    artifact: str
    operator: str
    dtype: str
    shape: tuple[int, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: tuple[Row, ...]
    overheads: Overheads | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def find(self, kind: str, peer: str, heap: str) -> Row | None:
        """The measured row of the first peer whose name starts so, or None."""
        for row in self.rows:
            if (row.kind, row.heap) == (kind, heap) and row.peer.startswith(peer) and row.timing:
                return row
        return None

    def best_peer(self, kind: str, *, blocked: bool = False) -> Row | None:
        """The row of the smallest ratio that is neither ours nor a limit, on a warm heap; or None.

        `blocked`: of those in a blocked layout, else of those that take the arrays as ours do.
        """
        rows = [
            row
            for row in self.rows
            if row.kind == kind and row.timing and row.heap != "cold"
            if not row.limit and not row.peer.startswith(OURS) and row.blocked == blocked
        ]
        return min(rows, key=lambda row: row.ratio or math.inf, default=None)

    def head_lines(self) -> list[str]:
        """The artifact, the machine and the versions."""
        machine = self.machine
        return [
            f"{self.artifact}: {self.operator} {self.dtype} ({','.join(map(str, self.shape))})",
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
            f"load {machine['load']} before the start, nice {machine['nice']}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]

    def foot_lines(self) -> list[str]:
        """What the columns mean, whether the machine was busy, and the overheads."""
        lines = []
        if self.machine["load"] > 1.0 and self.machine["nice"] > -20:
            lines += ["The machine was busy: figures and ratios are not to be trusted.", ""]
        lines += [
            "ratio: median over that of normgraph with given outputs, or bound where the peer is; "
            "/ limit and / floor: over the copy or the add, by torch and with "
            "non-temporal stores.",
            "GB/s: x read and y written (with dy read in a backward), over the median.",
        ]
        lines += [
            f"{row.peer}, {row.kind}: compiled in {row.setup:.1f} s"
            for row in self.rows
            if row.setup is not None and row.heap == "warm"
        ]
        return lines + (["", *overhead_lines(self.overheads)] if self.overheads else [])

    def to_text(self) -> str:
        timed = [row for row in self.rows if row.timing is not None]
        missing = [row for row in self.rows if row.timing is None]
        lines = [*self.head_lines(), "", table([_cells(row) for row in timed], HEADS)]
        lines += ["", *(_missing(row) for row in missing)] if missing else []
        return "\n".join([*lines, "", *self.foot_lines()])

    def to_markdown(self) -> str:
        """The same as Markdown."""
        head, *rest = self.head_lines()
        timed = [_cells(row) for row in self.rows if row.timing is not None]
        missing = [f"- {_missing(row)}" for row in self.rows if row.timing is None]
        lines = [f"## {head}", "", *(f"{line}.  " for line in rest), ""]
        lines += markdown_table(timed, HEADS)
        lines += ["", *missing, *([""] if missing else []), *self.foot_lines()]
        return "\n".join(lines)


HEADS = (
    "kind", "peer", "outputs", "threads", "median ms", "20 %", "80 %", "fastest", "GB/s",
    "ratio", "/ limit", "/ floor",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    t = row.timing
    if t is None:
        return (row.kind, row.peer, row.heap, str(row.threads), *("",) * 8)
    name = f"{row.peer} [{row.detail}]" if row.detail else row.peer
    times = (f"{seconds * 1e3:.4g}" for seconds in (t.median, t.low, t.high, t.best))
    speed = f"{row.gigabytes_per_second or 0.0:.1f}"
    ratios = (
        "" if value is None else f"{value:.2f}"
        for value in (row.ratio, row.over_limit, row.over_floor)
    )
    return (row.kind, name, row.heap, str(row.threads), *times, speed, *ratios)


def _missing(row: Row) -> str:
    return f"{row.kind}, {row.peer}: not timed: {row.reason}"


def markdown_table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def overhead_lines(costs: Overheads) -> list[str]:
    """The overheads as text, one a line."""
    lines = []
    if costs.graph_build is not None:
        lines.append(f"building one graph: {costs.graph_build * 1e3:.1f} ms")
    if costs.compile is not None:
        lines.append(f"compiling one graph: {costs.compile:.2f} s")
    if costs.call_shape is not None:
        size = ",".join(map(str, costs.call_shape))
        for name, seconds in (
            ("inference, out= given", costs.inference_call),
            ("backward, fresh outputs", costs.backward_call),
            ("forward, out= given", costs.forward_call),
            ("forward, bound", costs.bound_call),
        ):
            if seconds is not None:
                lines.append(f"a call at ({size}), {name}: {seconds * 1e6:.2f} us")
    return [*lines, *([costs.reason] if costs.reason else [])]


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, the system, the Python and the load.

    `load` is how many processes wanted a core on average over the last minute, `nice` how this one
    stands among them: -20 goes before all others.
    """
    return {
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "nice": os.nice(0),
    }


def machine_line(about: Mapping[str, Any]) -> str:
    """What `machine` found, as a sentence of a document."""
    return (
        f"Machine: {about['processor']}, {about['cores']} cores, {about['system']}, Python "
        f"{about['python']}, load {about['load']} before the start, nice {about['nice']}."
    )


def libraries(peers: Iterable[str]) -> str:
    """Those of the peers that say their version in their name: `, oneDNN 3.9.9`, or nothing."""
    names = {name.split(",")[0] for name in peers if name.startswith("oneDNN ")}
    return "".join(f", {name}" for name in sorted(names))


def not_timed(missing: Iterable[tuple[str, str, str]]) -> list[str]:
    """Each reason once, as a line of a list: of peers, reasons, and where they hold."""
    found: dict[tuple[str, str], list[str]] = {}
    for peer, reason, where in missing:
        found.setdefault((peer, reason), []).append(where)
    return [
        f"- {peer}: {reason} ({', '.join(dict.fromkeys(places))})"
        for (peer, reason), places in found.items()
    ]


def _processor() -> str:
    """The model in /proc/cpuinfo, with family and model number where the name says little."""
    found: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name
