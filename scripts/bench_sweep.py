"""How cost grows: `python -m normgraph.scripts.bench_sweep [--out FILE]`.

Every operator, forward and backward, at arrays from 1 KB to 1 GB, on one thread and on all cores,
against torch eager and the copy or the add. Each thread count runs in a process of its own. Writes
Markdown, a plot for each kind, and JSON on demand.

Above 16 MB the batch is a smaller one repeated, so that what is right is known without computing
it in float64: y and dx repeat too, and the parameter gradients are so many times the smaller one's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph
import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.errors import AccuracyError, NormGraphError
from normgraph.scripts import bench_floor, bench_peers, bench_torch
from normgraph.scripts.argument_types import names_of, path, seconds, whole, wholes
from normgraph.scripts.bench_check import as_numpy, reason, worst_outside
from normgraph.scripts.bench_costs import Costs, costs_of
from normgraph.scripts.bench_growth import document, draw
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_report import machine
from normgraph.scripts.bench_threads import bound, cores, prepare
from normgraph.scripts.bench_timing import set_heap, time_apart
from normgraph.scripts.console import Progress, log
from normgraph.scripts.outputs import check_outputs, write
from normgraph.scripts.verify_inputs import Case, Inputs, forward_names
from normgraph.scripts.verify_tolerance import relative, scale_of

Array = NDArray[Any]

KINDS = ("forward", "backward")
SMALLEST, LARGEST, STEP = 1 << 10, 1 << 30, 4
REPEATED = 16 << 20
# Arrays of x's size that are alive at once: inputs, our outputs, what torch keeps, the limit's.
_ALIVE = 8
OURS, TORCH, LIMIT = "ours", "torch eager", "limit"


@dataclass(frozen=True)
class Family:
    """An operator, and its shapes: the extents grow to `tile`, then the batch alone does."""

    spec: NormSpec
    declared: tuple[int | str, ...]
    tile: tuple[int, ...]

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of `size` bytes of float32."""
        elements = size // 4
        if len(self.tile) == 1:
            return (max(1, elements // self.tile[0]), *self.tile)
        channels, side = self.tile[0], self.tile[1]
        space = min(elements // channels, side * side)
        root = int(space**0.5)
        return (max(1, elements // (channels * root * root)), channels, root, root)


FAMILIES = (
    Family(NormSpec("instance_norm"), ("N", 64, "H", "W"), (64, 32, 32)),
    Family(NormSpec("batch_norm"), ("N", 64, "H", "W"), (64, 32, 32)),
    Family(NormSpec("group_norm", groups=32), ("N", 64, "H", "W"), (64, 32, 32)),
    Family(NormSpec("layer_norm"), ("N", 256), (256,)),
    Family(NormSpec("rms_norm"), ("N", 256), (256,)),
)


@dataclass(frozen=True)
class Point:
    """Median, 20th and 80th percentile in seconds of each contender at one size."""

    op: str
    kind: str
    threads: int
    shape: tuple[int, ...]
    size: int
    moved: int
    seconds: dict[str, tuple[float, float, float]]
    missing: dict[str, str]


def sizes(largest: int) -> list[int]:
    """1 KB, 4 KB and so on, up to `largest` and what memory holds."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size, found = SMALLEST, []
    while size <= min(largest, free // _ALIVE):
        found.append(size)
        size *= STEP
    return found


def measure(
    families: Sequence[Family],
    threads: int,
    largest: int,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[Point]:
    """Time every size of every family in this process."""
    own_threads = prepare(threads)
    found = []
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        for place, family in enumerate(families):
            root = Path(folder, str(place))
            normgraph.graphs.export(
                family.spec, shape=family.declared, out=root / "graphs", kinds=KINDS
            )
            path = normgraph.compile.build(root / "graphs", target="cpu", out=root / "cpu")
            operator = normgraph.load(path)
            for size in sizes(largest):
                shape = family.shape(size)
                progress(f"{threads} threads, {family.spec.op} {','.join(map(str, shape))}")
                batch = Batch(family.spec, shape)
                for kind in KINDS:
                    found.append(
                        _point(operator, batch, kind, (threads, own_threads), rounds, seconds)
                    )
    return found


class Batch:
    """Inputs of one shape, made of a smaller batch repeated `times`."""

    def __init__(self, spec: NormSpec, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.times = max(1, 4 * prod(shape) // REPEATED)
        self.base = (shape[0] // self.times, *shape[1:])
        self.inputs = Inputs(spec, "float32", Case(self.base, 0.0), seed=0)
        self._tiled: dict[str, Array] = {}

    def take(self, names: Sequence[str]) -> dict[str, Array]:
        """Inputs by name: those with a batch are repeated."""
        for name in names:
            if name not in self._tiled:
                value = self.inputs.values[name]
                along = name in ("x", "dy") or (
                    name in ("mean", "inv_std") and self.inputs.spec.op != "batch_norm"
                )
                if along and self.times > 1:
                    value = np.tile(value, (self.times, *(1,) * (value.ndim - 1)))
                self._tiled[name] = value
        return {name: self._tiled[name] for name in names}

    def check(self, peer: Peer, kind: str, want: Mapping[str, Array]) -> None:
        """Raise AccuracyError where a result is far from the smaller batch's."""
        conditions = self.inputs.conditions(kind)
        for name, value in peer.call().items():
            if name not in want or name.startswith("new_running"):
                continue
            found, right = as_numpy(value), want[name]
            summed = name in ("dgamma", "dbeta")
            parts = 1 if summed or found.size == right.size else self.times
            factor = self.times if summed else 1
            bound = 10.0 * factor * relative(name, "float32", conditions)
            bound *= scale_of(name, right, conditions)
            for part in found.reshape(parts, -1):
                error = worst_outside(part, factor * right, bound, "float32")
                if error is not None:
                    raise AccuracyError(f"{peer.name}, {kind}, {name}: off by {error:.1e}")


def _point(
    operator: Any,
    batch: Batch,
    kind: str,
    threads: tuple[int, int],
    rounds: int,
    seconds: float,
) -> Point:
    spec, (count, own) = operator.spec, threads
    names = [each["name"] for each in operator.manifest["kinds"][kind]["inputs"]]
    given = batch.take(names)
    backward = kind == "backward"
    full = batch.take([*forward_names(spec), *(["dy"] if backward else [])])
    want = reference.run(spec, kind, batch.inputs.take(names))
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    torch_peer = bench_torch.torch_eager
    if spec.op == "instance_norm":
        torch_peer = bench_torch.torch_as_group_norm
    makers: list[tuple[str, Callable[[], Peer]]] = [
        (OURS, lambda: bench_peers.ours(operator, kind, given, own, fresh=False)),
        (TORCH, lambda: torch_peer(spec, kind, full, count)),
        (LIMIT, lambda: bench_floor.memory_limit(kind, given, count)),
    ]
    for label, make in makers:
        try:
            peer = make()
            if not peer.limit:
                batch.check(peer, kind, want)
            peers[label] = peer
        except Exception as error:
            if label == OURS:
                raise
            missing[label] = reason(error)
    set_heap(warm=True)
    try:
        with bound(count):
            calls = {label: peer.call for label, peer in peers.items()}
            timings = time_apart(calls, rounds=rounds, seconds=seconds)
    finally:
        set_heap(warm=False)
    size = 4 * prod(batch.shape)
    return Point(
        op=spec.op,
        kind=kind,
        threads=count,
        shape=batch.shape,
        size=size,
        moved=size * (3 if backward else 2),
        seconds={label: (t.median, t.low, t.high) for label, t in timings.items()},
        missing=missing,
    )


def _in_process(threads: int, options: argparse.Namespace, progress: Progress) -> list[Point]:
    """The same in a process with so many threads: pools are sized once."""
    progress(f"{threads} threads")
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        out = Path(folder, "points.json")
        command = [sys.executable, "-m", "normgraph.scripts.bench_sweep", "--points", str(out)]
        command += ["--threads", str(threads), "--largest", str(options.largest)]
        command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        command += ["--ops", ",".join(options.ops)]
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "TVM_NUM_THREADS": count}
        subprocess.run(command, check=True, env=environment)
        return [
            Point(**{**each, "shape": tuple(each["shape"])}) for each in json.loads(out.read_text())
        ]


def main() -> int:
    """Measure and write the document, the plots and the JSON."""
    parser = argparse.ArgumentParser(prog="bench_sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path, default=Path("docs/benchmarks/growth.md"))
    parser.add_argument("--json", type=path, metavar="FILE", help="every point, for a program")
    parser.add_argument(
        "--threads", type=wholes(1, cores()), metavar="1,2", help="default: 1 and all cores"
    )
    parser.add_argument("--largest", type=whole(SMALLEST), default=LARGEST, metavar="BYTES")
    parser.add_argument("--rounds", type=whole(1), default=3)
    parser.add_argument("--seconds", type=seconds, default=0.02, help="a contender and round")
    known = [family.spec.op for family in FAMILIES]
    parser.add_argument(
        "--ops", type=names_of(known), default=known, metavar="batch_norm,...", help="these alone"
    )
    parser.add_argument("--points", type=path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    families = [family for family in FAMILIES if family.spec.op in options.ops]
    threads = options.threads or sorted({1, cores()})
    progress = Progress()
    try:
        if options.points is not None:
            points = measure(
                families,
                threads[0],
                options.largest,
                options.rounds,
                options.seconds,
                progress,
            )
            options.points.write_text(json.dumps([asdict(point) for point in points]))
            return 0
        check_outputs(options.json, options.out)
        before = machine()
        points = [point for count in threads for point in _in_process(count, options, progress)]
        costs: list[Costs] = []
        for family in families:
            progress(f"{family.spec.op}: compile, load, call, memory")
            costs.append(costs_of(family.spec, family.declared, family.shape(64 << 20)))
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    code = 0
    listed = [asdict(point) for point in points]
    if options.json:
        rows = {"points": listed, "costs": [asdict(each) for each in costs]}
        code = write(options.json, json.dumps({"machine": before, **rows}, indent=1))
    plots: list[str] = []
    try:
        plots = draw(listed, options.out)
    except OSError as error:
        log(f"error: {error}")
        code = 2
    command = " ".join(["python -m normgraph.scripts.bench_sweep", *sys.argv[1:]])
    code = max(code, write(options.out, document(listed, costs, before, command, plots)))
    print(options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
