"""Random shapes against the best peer: `python -m normgraph.scripts.bench_random --count 200`.

Seeded shapes of all five operators, odd sizes included, x from 4 KB to 64 MB. One artifact is built
for each operator and channel count (or row length) drawn, every other extent left open, and serves
all shapes that have it. Who is held against what, and when a row is slower, is said in
`bench_contest`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import normgraph
from normgraph.errors import NormGraphError
from normgraph.scripts.argument_types import names_of, path, seconds, whole, wholes
from normgraph.scripts.bench_contest import FRESH, LIMIT, Contest, contest
from normgraph.scripts.bench_document import CAUSES, read_causes
from normgraph.scripts.bench_peers import OURS, OURS_BOUND
from normgraph.scripts.bench_random_report import Result, as_json, as_text, document
from normgraph.scripts.bench_report import Row, machine
from normgraph.scripts.bench_roster import (
    Extras,
    bytes_moved,
    gather,
    limit_makers,
    own_makers,
    row_major_makers,
    scene_of,
)
from normgraph.scripts.bench_shapes import Draw, draw
from normgraph.scripts.bench_threads import bound, cores, prepare
from normgraph.scripts.console import Progress, log
from normgraph.scripts.outputs import check_outputs, write
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.spec import DTYPES, OPERATORS

KINDS = ("forward", "inference", "backward")


def measure(
    draws: Sequence[Draw],
    *,
    kinds: Sequence[str] = ("forward", "backward"),
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int = 3,
    seconds: float = 0.008,
    compiled: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Time every kind of every draw; see the module for how.

    Raises AccuracyError where our own result is wrong.
    """
    count = threads or cores()
    own_threads = prepare(count)
    results = []
    families = list(dict.fromkeys(each.family for each in draws))
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        for place, family in enumerate(families):
            members = [each for each in draws if each.family == family]
            spec, declared = family
            progress(
                f"{place + 1}/{len(families)} {spec.op} ({','.join(map(str, declared))}): "
                f"{len(members)} shapes"
            )
            root = Path(folder, str(place))
            normgraph.graphs.export(
                spec, shape=declared, dtype=dtype, out=root / "graphs", kinds=tuple(kinds)
            )
            path = normgraph.compile.build(root / "graphs", target="cpu", out=root / "cpu")
            operator = normgraph.load(path)
            for each in members:
                inputs = Inputs(spec, dtype, Case(each.shape, 0.0), seed=each.number)
                for kind in kinds:
                    scene = scene_of(path, operator, kind, inputs, count, own_threads)
                    named = [
                        *own_makers(scene),
                        *row_major_makers(scene, Extras(compiled=compiled)),
                        limit_makers(scene)[0],
                    ]
                    peers, missing = gather(named, scene)
                    moved = bytes_moved(kind, scene.given)
                    with bound(count):
                        found = contest(peers, rounds, seconds)
                    results.append(_result(each, kind, dtype, found, missing, moved))
    return sorted(results, key=lambda result: result.number)


def _result(
    each: Draw, kind: str, dtype: str, found: Contest, missing: Sequence[Row], moved: int
) -> Result:
    timings = found.timings
    return Result(
        number=each.number,
        op=each.spec.op,
        kind=kind,
        dtype=dtype,
        shape=each.shape,
        groups=each.spec.groups,
        bytes=moved,
        ours=timings[OURS],
        bound=timings[OURS_BOUND],
        fresh=timings[FRESH],
        limit=timings.get(LIMIT),
        best_peer=found.best or "",
        ratio=found.ratio,
        slower=found.slower,
        gigabytes_per_second=moved / timings[OURS].median / 1e9,
        peers={name: timings[name] for name in found.ours},
        bound_peers=tuple(name for name, ours in found.ours.items() if ours == OURS_BOUND),
        missing={row.peer: row.reason for row in missing},
    )


def main() -> int:
    """Measure, print the rows that are slower, and write all as JSON."""
    parser = argparse.ArgumentParser(prog="bench_random", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--count", type=whole(1), default=200, help="how many shapes are drawn (200)"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--json", type=path, metavar="FILE", help="write all rows there")
    parser.add_argument("--out", type=path, metavar="FILE", help="write the document there")
    parser.add_argument(
        "--only", type=wholes(0), metavar="3,17", help="of the draw, these numbers alone"
    )
    parser.add_argument(
        "--ops", type=names_of(OPERATORS), default=OPERATORS, metavar="batch_norm,..."
    )
    parser.add_argument(
        "--kinds",
        type=names_of(KINDS),
        default=("forward", "backward"),
        metavar="forward,...",
        help=f"out of {', '.join(KINDS)}",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=whole(1, cores()), help="default: all cores")
    parser.add_argument("--rounds", type=whole(1), default=3)
    parser.add_argument("--seconds", type=seconds, default=0.008, help="a peer and round")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: slow")
    parser.add_argument("--all", action="store_true", help="print every row")
    options = parser.parse_args()
    only = options.only or range(options.count)
    if max(only) >= options.count:
        parser.error(
            f"argument --only: expected numbers below --count, {options.count}; got {max(only)}"
        )
    draws = [
        each
        for each in draw(options.count, options.seed)
        if each.spec.op in options.ops and each.number in only
    ]
    if not draws:
        parser.error("no shape is left: see --count, --only and --ops")
    before = machine()
    try:
        check_outputs(options.json, options.out)
        causes = read_causes(options.out.parent / CAUSES) if options.out else {}
        results = measure(
            draws,
            kinds=options.kinds,
            dtype=options.dtype,
            threads=options.threads,
            rounds=options.rounds,
            seconds=options.seconds,
            compiled=options.compiled,
            progress=Progress(),
        )
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "out")}
    settings["artifacts"] = "one for each operator and channel count, other extents symbolic"
    code = 0
    if options.json:
        code = write(options.json, as_json(results, settings, before))
    if options.out:
        command = " ".join(["python -m normgraph.scripts.bench_random", *sys.argv[1:]])
        code = max(code, write(options.out, document(results, command, before, causes)))
    print(as_text(results, options.all))
    return code


if __name__ == "__main__":
    sys.exit(main())
