"""What a bench measured, as text, as JSON and as rows of a Markdown table."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normgraph.scripts.bench_threads import cores
from normgraph.scripts.bench_timing import Timing


@dataclass(frozen=True)
class Row:
    """One peer at one kind.

    heap     "given": outputs allocated once; "warm": fresh outputs from memory kept by the process;
             "cold": fresh outputs from memory the system hands out page by page
    timing   None where the peer could not be run or was wrong; `reason` says why
    ratio    its median over that of our kernel with given outputs: above 1 is slower than ours
    detail   what ran, where the peer says so
    setup    seconds it took to compile, where it compiles
    """

    kind: str
    peer: str
    heap: str
    threads: int
    timing: Timing | None = None
    ratio: float | None = None
    gigabytes_per_second: float | None = None
    reason: str = ""
    detail: str = ""
    setup: float | None = None


@dataclass(frozen=True)
class Overheads:
    """Costs beside the kernels. Seconds; None where it was not measured.

    graph_build        one backward graph, with the checker
    compile            one backward graph to a library in this process, imports and self-test apart
    inference_call     a call at `call_shape` with out=, serial kernel, a process without TVM
    backward_call      a call at `call_shape` with fresh outputs, the same process
    """

    graph_build: float | None
    compile: float | None
    inference_call: float | None
    backward_call: float | None
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
        """The measured row of that peer, or None."""
        for row in self.rows:
            if (row.kind, row.heap) == (kind, heap) and row.peer.startswith(peer) and row.timing:
                return row
        return None

    def to_text(self) -> str:
        machine = self.machine
        size = ",".join(map(str, self.shape))
        lines = [
            f"{self.artifact}: {self.operator} {self.dtype} ({size})",
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
            f"load {machine['load']} before the start, nice {machine['nice']}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "",
            _HEADER,
        ]
        for row in self.rows:
            start = f"{row.kind:21}{row.peer:28}{row.heap:9}"
            if row.timing is None:
                lines.append(f"{start}not timed: {row.reason}")
                continue
            t = row.timing
            lines.append(
                f"{start}{row.threads:<8}{t.median * 1e3:10.3f}{t.low * 1e3:9.3f}"
                f"{t.high * 1e3:9.3f}{t.best * 1e3:9.3f}"
                f"{row.gigabytes_per_second or 0.0:7.1f}{row.ratio or 0.0:7.2f}"
            )
        if machine["load"] > 1.0 and machine["nice"] > -20:
            lines += ["", "The machine was busy: figures and ratios are not to be trusted."]
        lines += ["", "ratio: median over that of normgraph with given outputs."]
        lines += ["GB/s: x read and y written (with dy read in a backward), over the median."]
        if self.overheads is not None:
            lines += ["", *overhead_lines(self.overheads)]
        return "\n".join(lines)


_HEADER = (
    f"{'kind':21}{'peer':28}{'outputs':9}{'threads':8}"
    f"{'median ms':>10}{'20 %':>9}{'80 %':>9}{'fastest':>9}{'GB/s':>7}{'ratio':>7}"
)


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
