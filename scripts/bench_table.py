"""The standard benchmark table: `python -m normgraph.scripts.bench_table [--out FILE]`.

InstanceNorm and BatchNorm at two image batches, the other operators at one shape each, float32,
every artifact built with symbolic extents and timed by `normgraph.scripts.bench`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import normgraph
from normgraph import NormSpec
from normgraph.errors import NormGraphError
from normgraph.scripts.bench import bench
from normgraph.scripts.bench_report import BenchReport, Row, overhead_lines
from normgraph.scripts.console import Progress, log


@dataclass(frozen=True)
class Entry:
    """One artifact of the table, and the shapes it is timed at."""

    spec: NormSpec
    declared: tuple[int | str, ...]
    shapes: tuple[tuple[int, ...], ...]


ENTRIES = (
    Entry(NormSpec("instance_norm"), ("N", 64, "H", "W"), ((8, 64, 56, 56),)),
    Entry(NormSpec("instance_norm"), ("N", 128, "H", "W"), ((32, 128, 56, 56),)),
    Entry(NormSpec("batch_norm"), ("N", 64, "H", "W"), ((8, 64, 56, 56),)),
    Entry(NormSpec("batch_norm"), ("N", 128, "H", "W"), ((32, 128, 56, 56),)),
    Entry(NormSpec("group_norm", groups=32), ("N", 256, "H", "W"), ((8, 256, 32, 32),)),
    Entry(NormSpec("layer_norm"), ("N", 1024), ((4096, 1024),)),
    Entry(NormSpec("rms_norm"), ("N", 1024), ((4096, 1024),)),
)
KINDS = ("forward", "inference", "backward")
_COLUMNS = (
    ("ours", "normgraph", "given"),
    ("ours, fresh, warm", "normgraph", "warm"),
    ("ours, fresh, cold", "normgraph", "cold"),
    ("torch, warm", "torch eager", "warm"),
    ("torch, cold", "torch eager", "cold"),
    ("onnxruntime", "onnxruntime", "given"),
    ("stock TVM", "stock TVM", "warm"),
)
_RATIOS = ("torch / ours", "onnxruntime / ours", "stock / ours", "ours / limit")
_INTRODUCTION = """\
# First CPU benchmark

Written by `python -m normgraph.scripts.bench_table`. Float32, milliseconds. For each kind the
median of many calls, with the 20th and the 80th percentile in brackets, and the fastest call. Every
result was checked against float64 before it was timed. All peers ran in one process, in turns, with
a rest between them so that no pool spins beside another. The machine is shared: trust the ratios,
and where a median is far from its fastest call, trust the ratios of the fastest calls.

- ours: compiled with symbolic N, H and W, outputs given (`out=`). "fresh": outputs allocated by
  each call, from memory the process keeps (warm) or that the system hands out page by page (cold).
- torch: eager `torch.nn.functional` under no_grad, backward through autograd; outputs always fresh.
- onnxruntime: the same .onnx file, outputs bound once.
- stock TVM: the same graph for this one shape through TVM's default pipeline.
- memory limit: a copy of x for forward and inference, an add of dy and x for backward, by torch
  into a given array.
"""


def measure(rounds: int, quiet: float, progress: Progress) -> list[BenchReport]:
    """Build and time every entry; `rounds` and `quiet` as in `bench`."""
    reports = []
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        for place, entry in enumerate(ENTRIES):
            progress(f"{entry.spec.op}: build")
            root = Path(folder, str(place))
            normgraph.graphs.export(
                entry.spec, shape=entry.declared, out=root / "graphs", kinds=KINDS
            )
            path = normgraph.compile.build(root / "graphs", target="cpu", out=root / "cpu")
            for shape in entry.shapes:
                reports.append(
                    bench(
                        path,
                        shape,
                        kinds=KINDS,
                        rounds=rounds,
                        overheads=entry is ENTRIES[0],
                        quiet=quiet,
                        progress=progress,
                    )
                )
    return reports


def markdown(reports: Sequence[BenchReport]) -> str:
    """The document: the machine, a table a kind, the overheads."""
    first = reports[0]
    machine = first.machine
    lines = [
        _INTRODUCTION,
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, load {machine['load']} before the start, "
        f"nice {machine['nice']}.",
        "Versions: " + ", ".join(f"{name} {each}" for name, each in first.versions.items()) + ".",
        f"Threads: {_threads(first)}.",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind.capitalize()}"]
        for title, statistic in (("Median", "median"), ("Fastest call", "best")):
            heads = [title, "shape", *(head for head, _, _ in _COLUMNS), "memory limit", *_RATIOS]
            lines += ["", "| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]
            lines += [_line(report, kind, statistic) for report in reports]
    if first.overheads is not None:
        lines += ["", "## Beside the kernels", "", f"{first.operator}, float32:", ""]
        lines += [f"- {line}" for line in overhead_lines(first.overheads)]
    return "\n".join(lines) + "\n"


def _threads(report: BenchReport) -> str:
    found = {row.peer: row.threads for row in report.rows if row.timing}
    return ", ".join(f"{peer} {count}" for peer, count in found.items())


def _line(report: BenchReport, kind: str, statistic: str) -> str:
    rows = {head: report.find(kind, peer, heap) for head, peer, heap in _COLUMNS}
    limit = report.find(kind, "copy of one array", "given") or report.find(
        kind, "add of two arrays", "given"
    )
    ours = rows["ours"]
    cells = [report.operator, "×".join(map(str, report.shape))]
    cells += [_time(row, statistic) for row in (*rows.values(), limit)]
    for name in ("torch, warm", "onnxruntime", "stock TVM"):
        cells.append(_ratio(rows[name], ours, statistic))
    return "| " + " | ".join([*cells, _ratio(ours, limit, statistic)]) + " |"


def _time(row: Row | None, statistic: str) -> str:
    if row is None or row.timing is None:
        return "not run"
    t = row.timing
    if statistic == "best":
        return f"{t.best * 1e3:.3g}"
    return f"{t.median * 1e3:.3g} ({t.low * 1e3:.3g} to {t.high * 1e3:.3g})"


def _ratio(row: Row | None, base: Row | None, statistic: str) -> str:
    if row is None or base is None or row.timing is None or base.timing is None:
        return ""
    return f"{getattr(row.timing, statistic) / getattr(base.timing, statistic):.2f}"


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="bench_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cpu-first.md"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--quiet", type=float, default=60.0, metavar="SECONDS", help="wait for idle cores"
    )
    options = parser.parse_args()
    try:
        reports = measure(options.rounds, options.quiet, Progress())
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(markdown(reports))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
