"""How cost grows: `python -m normgraph.scripts.bench_sweep [--out FILE]`.

Every operator, forward and backward, at arrays from 1 KB to 1 GB, on one thread and on all cores,
against every peer that takes the arrays row by row (`bench_contest` says how) and the copy or the
add. Each thread count runs in a process of its own. Writes Markdown, a plot for each kind, and JSON
on demand. Above 16 MB the batch is a smaller one repeated (`bench_batch`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import normgraph
import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.errors import NormGraphError
from normgraph.scripts.argument_types import names_of, path, seconds, whole, wholes
from normgraph.scripts.bench_batch import Batch
from normgraph.scripts.bench_contest import contest
from normgraph.scripts.bench_costs import Costs, costs_of
from normgraph.scripts.bench_document import CAUSES, read_causes
from normgraph.scripts.bench_growth import document, draw
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_report import machine
from normgraph.scripts.bench_room import no_more_than_there_is, room
from normgraph.scripts.bench_roster import (
    Extras,
    Scene,
    bytes_moved,
    limit_makers,
    one_by_one,
    own_makers,
    row_major_makers,
)
from normgraph.scripts.bench_threads import bound, cores, prepare
from normgraph.scripts.console import Progress, log
from normgraph.scripts.outputs import check_outputs, write
from normgraph.scripts.verify_inputs import forward_names

KINDS = ("forward", "backward")
SMALLEST, LARGEST, STEP = 1 << 10, 1 << 30, 4
# Arrays of x's size that there has to be room for: inputs, our outputs, the limit's, and what the
# smallest peers keep. One that wants more than there is is missing.
_ALIVE = 8


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
    """One kind at one size.

    seconds    by contender: the median, the 20th and the 80th percentile
    best       the peer with the worst ratio for us; "" where there is none
    same_sort  our call that it is held against
    slower     our median lies above its 80th percentile
    missing    why a peer was not timed
    """

    op: str
    kind: str
    threads: int
    shape: tuple[int, ...]
    size: int
    moved: int
    seconds: dict[str, tuple[float, float, float]]
    best: str
    same_sort: str
    slower: bool
    missing: dict[str, str]


def sizes(largest: int) -> list[int]:
    """1 KB, 4 KB and so on, up to `largest` and what memory holds."""
    size, found = SMALLEST, []
    most = min(largest, room() // _ALIVE)
    while size <= most:
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
                    scene = _scene(path, operator, kind, batch, threads, own_threads)
                    found.append(_point(scene, batch, rounds, seconds))
    return found


def _scene(
    path: Path, operator: Any, kind: str, batch: Batch, threads: int, own_threads: int
) -> Scene:
    """As `scene_of` makes it, with the batch's repeated arrays."""
    given = batch.take([each["name"] for each in operator.manifest["kinds"][kind]["inputs"]])
    full = batch.take([*forward_names(operator.spec), *(["dy"] if kind == "backward" else [])])
    return Scene(path, operator, kind, batch.inputs, given, full, threads, own_threads)


def _point(scene: Scene, batch: Batch, rounds: int, seconds: float) -> Point:
    spec, kind = batch.inputs.spec, scene.kind
    want = reference.run(spec, kind, batch.inputs.take(list(scene.given)))
    missing: dict[str, str] = {}

    def right(peer: Peer) -> None:
        if not peer.limit:
            batch.check(peer, kind, want)

    named = [
        *own_makers(scene, fresh=False),
        *row_major_makers(scene, Extras(compiled=False)),
        limit_makers(scene)[0],
    ]
    with bound(scene.threads):
        found = contest(one_by_one(named, right, missing), rounds, seconds)
    return Point(
        op=spec.op,
        kind=kind,
        threads=scene.threads,
        shape=batch.shape,
        size=4 * prod(batch.shape),
        moved=bytes_moved(kind, scene.given),
        seconds={label: (t.median, t.low, t.high) for label, t in found.timings.items()},
        best=found.best or "",
        same_sort=found.same_sort,
        slower=found.slower,
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
    parser.add_argument("--seconds", type=seconds, default=0.01, help="a contender and round")
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
            with no_more_than_there_is():
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
        causes = read_causes(options.out.parent / CAUSES)
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
    code = max(code, write(options.out, document(listed, costs, before, command, plots, causes)))
    print(options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
