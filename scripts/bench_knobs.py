"""What each knob of the CPU rule is worth: `python -m normgraph.scripts.bench_knobs`.

For each knob and shape, kernels are built with the value the rule has and with others around it.
They take turns in one process on the same arrays, after each result was checked against float64.
Writes a table of their times by the rule's own, and the times themselves as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import normgraph
import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.compile.knobs import knobs, tried
from normgraph.errors import NormGraphError
from normgraph.scripts import bench_peers
from normgraph.scripts.argument_types import names_of, path, seconds, whole
from normgraph.scripts.bench_batch import Batch
from normgraph.scripts.bench_report import machine, machine_line, markdown_table
from normgraph.scripts.bench_threads import bound, cores, prepare
from normgraph.scripts.bench_timing import Timing, set_heap, time_apart
from normgraph.scripts.console import Progress, log
from normgraph.scripts.outputs import check_outputs, write
from normgraph.scripts.verify import versions

KINDS = ("forward", "backward")
# Kernels that are the same came out a tenth apart.
_BETTER = 0.88
DOCUMENT = Path("docs/benchmarks/knobs.md")


@dataclass(frozen=True)
class Trial:
    """One knob: the values beside the rule's own, and where it decides, as operator and shape."""

    knob: str
    values: tuple[int, ...]
    at: tuple[tuple[str, tuple[int, ...]], ...]
    kinds: tuple[str, ...] = KINDS


def _at(op: str, *shapes: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((f"{op}_norm", tuple(map(int, shape.split("x")))) for shape in shapes)


# Each value beside the chosen one is half or a quarter of it, or twice or four times as much: where
# that changes little, finer steps would change less.
TRIALS = (
    Trial("run_bytes", (6 << 10, 24 << 10), _at("instance", "16x256x14x14", "64x512x7x7")),
    Trial("far_run_bytes", (2 << 10, 12 << 10), _at("instance", "64x256x14x14")),
    Trial("far_run_bytes", (2 << 10, 12 << 10), _at("layer", "65536x200"), ("forward",)),
    Trial("long_row", (2048, 8192), _at("instance", "64x64x28x28", "32x64x40x40")),
    Trial("far_long_row", (512, 4096), _at("instance", "128x256x18x18", "64x512x28x28")),
    Trial("streamed_run", (4 << 10, 16 << 10), _at("instance", "256x256x14x14"), ("forward",)),
    Trial("streamed_run", (4 << 10, 16 << 10), _at("layer", "262144x45"), ("forward",)),
    Trial(
        "streamed_run_of_two", (2 << 10, 8 << 10), _at("instance", "256x256x14x14"), ("backward",)
    ),
    Trial("streamed_long_row", (1 << 10, 4 << 10), _at("layer", "65536x301"), ("forward",)),
    Trial("slices", (16, 64), _at("instance", "256x512x3x3"), ("forward",)),
    Trial("slices_of_two", (16, 64), _at("instance", "256x512x3x3"), ("backward",)),
    Trial("channels", (32, 128), _at("batch", "4x2048x6x6")),
    Trial("short_row_vector", (16, 64), _at("instance", "64x512x7x7", "16x256x14x14")),
    Trial("exact_row", (0, 64, 256), _at("instance", "64x512x7x7", "256x256x9x9", "64x256x14x14")),
    Trial("short_row", (256, 512), _at("batch", "2048x8x18x18", "8192x4x28x28", "12288x2x36x36")),
    Trial("short_row_share", (40, 640), _at("batch", "16x256x7x7", "64x128x14x14")),
    Trial("short_streamed_share", (160, 40960), _at("batch", "128x256x18x18", "64x512x28x28")),
    Trial("columns", (1024, 4096), _at("batch", "64x512x7x7", "128x1024x4x4")),
    Trial("column_channels", (64, 256), _at("batch", "128x4096", "128x2048x2x2")),
    Trial("column_bytes", (256 << 10, 1 << 20), _at("batch", "256x256x7x7", "64x512x7x7")),
    Trial("whole_rows", (256, 4096), _at("batch", "512x1024", "2048x1024", "1500x256x2x2")),
    Trial("whole_columns", (2048, 32768), _at("batch", "1024x256x4x4", "2048x1024x4x4")),
    Trial("streamed_eighths", (6, 8, 12), _at("layer", "3072x1024", "6144x1024")),
    Trial("streamed_eighths", (6, 8, 12), _at("instance", "16x64x64x64", "32x64x56x56")),
    Trial("streamed_eighths", (6, 8, 12), _at("batch", "16x64x64x64", "32x64x56x56")),
    Trial("streamed_row", (256, 1024), _at("instance", "256x256x18x18", "64x512x28x28")),
    Trial("streamed_ragged", (128, 512), _at("instance", "256x256x18x18", "128x128x22x22")),
    Trial("streamed_columns", (128, 512), _at("batch", "128x256x18x18")),
    Trial("staged_columns", (0, 2048), _at("layer", "131072x105", "65536x301"), ("backward",)),
    Trial("streamed_apart", (32, 256), _at("layer", "131072x128", "65536x192"), ("forward",)),
    Trial("ahead_short", (0, 8192), _at("instance", "128x64x40x40", "64x64x80x80"), ("backward",)),
    Trial("ahead_long", (8192, 65536), _at("instance", "32x32x160x160"), ("backward",)),
    Trial("ahead_bytes", (128 << 10, 4 << 20), _at("batch", "32x128x56x56", "24x32x128x128")),
    Trial("ahead_bytes", (128 << 10, 4 << 20), _at("instance", "96x1x512x512"), ("forward",)),
    Trial(
        "ahead_bytes_of_two",
        (64 << 10, 4 << 20),
        _at("instance", "32x32x160x160", "96x1x512x512"),
        ("backward",),
    ),
    Trial("turned", (512 << 10, 1 << 30), _at("instance", "96x1x512x512", "24x1x1024x1024")),
    Trial("serial", (8192, 131072), _at("layer", "16x1024", "64x1024")),
)


@dataclass(frozen=True)
class Result:
    """One kind at one shape: seconds by the knob's value, the rule's own first."""

    knob: str
    op: str
    kind: str
    shape: tuple[int, ...]
    timings: dict[int, Timing]

    @property
    def ratios(self) -> dict[int, float]:
        """Time with each other value over the time with the rule's."""
        own, *others = self.timings
        return {value: self.timings[value].low / self.timings[own].low for value in others}


def measure(
    trials: Sequence[Trial],
    *,
    rounds: int = 24,
    seconds: float = 0.01,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Build and time every trial. Raises AccuracyError where a result is wrong."""
    threads = cores()
    own = prepare(threads)
    found: list[Result] = []
    for place, trial in enumerate(trials):
        for op, shape in trial.at:
            progress(f"{place + 1}/{len(trials)} {trial.knob}: {op} {_size(shape)}")
            batch = Batch(NormSpec(op), shape)
            with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
                operators = _built(trial, batch, Path(folder))
                for kind in trial.kinds:
                    calls = _calls(operators, batch, kind, own)
                    set_heap(warm=True)
                    try:
                        with bound(threads):
                            timings = time_apart(calls, rounds=rounds, seconds=seconds)
                    finally:
                        set_heap(warm=False)
                    by_value = {int(value): timing for value, timing in timings.items()}
                    found.append(Result(trial.knob, op, kind, shape, by_value))
    return found


def _built(trial: Trial, batch: Batch, folder: Path) -> dict[int, Any]:
    """The operator by the knob's value, the rule's own first."""
    shape = batch.shape
    declared = ("N", *shape[1:2], *("H", "W")[: len(shape) - 2])
    graphs = folder / "graphs"
    spec = batch.inputs.spec
    normgraph.graphs.export(spec, shape=declared, out=graphs, kinds=trial.kinds)
    found: dict[int, Any] = {}
    for value in (getattr(knobs(), trial.knob), *trial.values):
        with tried(**{trial.knob: value}):
            path = normgraph.compile.build(graphs, target="cpu", out=folder / str(value))
        found[value] = normgraph.load(path)
    return found


def _calls(
    operators: dict[int, Any], batch: Batch, kind: str, threads: int
) -> dict[str, Callable[[], object]]:
    """What is timed, each checked against float64; all write into the same arrays.

    Where these lie beside the inputs costs up to a seventh of a call in cache.
    """
    found: dict[str, Callable[[], object]] = {}
    out: dict[str, Any] = {}
    for value, operator in operators.items():
        names = [each["name"] for each in operator.manifest["kinds"][kind]["inputs"]]
        want = reference.run(operator.spec, kind, batch.inputs.take(names))
        for array in out.values():
            array.fill(np.nan)
        peer = bench_peers.ours(operator, kind, batch.take(names), threads, fresh=False, out=out)
        batch.check(peer, kind, want)
        found[str(value)] = peer.call
    return found


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def document(results: Sequence[Result], command: str, about: dict[str, Any]) -> str:
    """Markdown: the times, and what the other values take beside the rule's own."""
    rows = []
    for each in results:
        own = next(iter(each.timings))
        others = ", ".join(f"{value}: {ratio:.2f}" for value, ratio in each.ratios.items())
        size = _size(each.shape)
        bytes_of_x = f"{4 * prod(each.shape) / 1e6:.1f} MB"
        time = f"{1e3 * each.timings[own].low:.3g}"
        rows.append([each.knob, each.op, size, bytes_of_x, each.kind, str(own), time, others])
    better = [
        f"{each.knob} {value} at {each.op} {_size(each.shape)}, {each.kind}: {ratio:.2f}"
        for each in results
        for value, ratio in each.ratios.items()
        if ratio < _BETTER
    ]
    what = "; ".join(better) if better else "none"
    heads = ("knob", "operator", "shape", "x", "kind", "value", "ms", "others")
    table = "\n".join(markdown_table(rows, heads))
    return f"""# The CPU rule's knobs

Written by `{command}`. What each knob is stands in `compile/knobs.py`. "others": the time with
another value over the time with the rule's own ("ms"), in one process by turns; the 20th percentile
of the calls, float32, all extents but the channels' or the row's open. Every result was checked
against float64 first.

{machine_line(about)}
Versions: {", ".join(f"{name} {each}" for name, each in versions().items())}.

Values that took less than {_BETTER} of the time of the rule's own: {what}.

{table}
"""


def main() -> int:
    """Measure and write the document and its data."""
    parser = argparse.ArgumentParser(prog="bench_knobs", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path, default=DOCUMENT, metavar="FILE")
    parser.add_argument("--rounds", type=whole(1), default=24)
    parser.add_argument("--seconds", type=seconds, default=0.01, help="a value and round")
    known = tuple(dict.fromkeys(each.knob for each in TRIALS))
    parser.add_argument(
        "--knobs", type=names_of(known), default=known, metavar="run_bytes,...", help="these alone"
    )
    options = parser.parse_args()
    trials = [each for each in TRIALS if each.knob in options.knobs]
    numbers = options.out.with_suffix(".json")
    about = machine()
    try:
        check_outputs(options.out, numbers)
        results = measure(
            trials, rounds=options.rounds, seconds=options.seconds, progress=Progress()
        )
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    command = " ".join(["python -m normgraph.scripts.bench_knobs", *sys.argv[1:]])
    data = {"machine": about, "results": [asdict(each) for each in results]}
    code = write(numbers, json.dumps(data, indent=1))
    code = max(code, write(options.out, document(results, command, about)))
    print(options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
