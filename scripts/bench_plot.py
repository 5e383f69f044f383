"""Pictures of what a bench measured: the roofline, and how cost grows with size."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normgraph.errors import ToolMissing
from normgraph.scripts.bench_report import BenchReport, Row

_COLOURS = {
    "batch_norm": "tab:blue",
    "instance_norm": "tab:orange",
    "group_norm": "tab:green",
    "layer_norm": "tab:red",
    "rms_norm": "tab:purple",
}
_MARKS = {"forward": "o", "inference": "s", "backward": "^"}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def roofline(reports: Sequence[BenchReport], path: Path) -> None:
    """Achieved GB/s against bytes moved: ours and the best peer, under the copy and the add.

    The format is that of the file name's ending. ToolMissing without matplotlib.
    """
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(9, 6), layout="constrained")
    wide = [report for report in reports if report.dtype == "float32"] or reports
    for start, mark in (("copy", "-"), ("add", "--")):
        for stores, colour in (("(torch)", "0.3"), ("(non-temporal", "0.7")):
            points = {
                _moved(row): row.gigabytes_per_second
                for row in _rows(wide)
                if row.limit and row.peer.startswith(start) and stores in row.peer
            }
            label = f"{start} {stores.strip('()')}"
            axes.plot(*_columns(sorted(points.items())), mark, color=colour, label=label)
    for report in reports:
        for kind, mark in _MARKS.items():
            ours, best = report.find(kind, "normgraph", "given"), report.best_peer(kind)
            colour = _COLOURS[report.operator]
            if ours is not None:
                axes.plot(_moved(ours), ours.gigabytes_per_second, mark, color=colour)
            if best is not None:
                axes.plot(
                    _moved(best), best.gigabytes_per_second, mark, color=colour, fillstyle="none"
                )
    for operator in dict.fromkeys(report.operator for report in reports):
        axes.plot([], [], "o", color=_COLOURS[operator], label=operator)
    for kind, mark in _MARKS.items():
        axes.plot([], [], mark, color="0.2", label=kind)
    axes.plot([], [], "o", color="0.2", fillstyle="none", label="best peer")
    axes.set_xscale("log")
    axes.set_xlabel("bytes read and written")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    _save(plot, figure, path)


def growth(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    *,
    heads: tuple[str, str] = ("bytes of x", "GB/s"),
) -> None:
    """One panel a title, one line a name of points (size, value); sizes on a logarithmic axis."""
    plot = pyplot()
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plot.subplots(
        rows, columns, figsize=(5.5 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    flat = [axes for row in grid for axes in row]
    for axes, (title, lines) in zip(flat, panels.items(), strict=False):
        for name, points in lines.items():
            style = "--" if name.startswith(("copy", "add")) else "-"
            axes.plot(*_columns(points), style, marker=".", label=name)
        axes.set_xscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(heads[0])
        axes.set_ylabel(heads[1])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    _save(plot, figure, path)


def _rows(reports: Sequence[BenchReport]) -> Iterable[Row]:
    return (row for report in reports for row in report.rows if row.timing is not None)


def _moved(row: Row) -> float:
    seconds = row.timing.median if row.timing is not None else 0.0
    return round((row.gigabytes_per_second or 0.0) * 1e9 * seconds)


def _columns(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[Any]]:
    listed = list(points)
    return [x for x, _ in listed], [y for _, y in listed]


def pyplot() -> Any:
    """matplotlib's drawing module, without a window; ToolMissing where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ToolMissing(
            "a plot needs matplotlib, and it is not installed: pip install 'normgraph[plot]'"
        )
    import matplotlib

    matplotlib.use("Agg")
    # The same picture is the same file: no date, and names that do not depend on the run.
    matplotlib.rcParams["svg.hashsalt"] = "normgraph"
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(plot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    plot.close(figure)
