"""The standard benchmark table: `python -m normgraph.scripts.bench_table [--out FILE]`.

Every operator at the standard shapes, in float32, float16 and bfloat16, every artifact built with
symbolic extents and timed by `normgraph.scripts.bench`. Writes Markdown, JSON beside it on demand,
and a roofline plot where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import normgraph
from normgraph.errors import NormGraphError
from normgraph.scripts.argument_types import names_of, path, seconds, seconds_or_zero, whole
from normgraph.scripts.bench import bench
from normgraph.scripts.bench_cases import KINDS, Case, standard_cases
from normgraph.scripts.bench_document import CAUSES, document, read_causes
from normgraph.scripts.bench_plot import available, roofline
from normgraph.scripts.bench_report import BenchReport
from normgraph.scripts.bench_roster import Extras
from normgraph.scripts.console import Progress, log
from normgraph.scripts.outputs import check_outputs, write

DOCUMENT = Path("docs/benchmarks/cpu.md")


def measure(
    cases: Sequence[Case],
    *,
    kinds: Sequence[str] = KINDS,
    rounds: int = 5,
    seconds: float = 0.02,
    quiet: float = 0.0,
    compiled: bool = True,
    progress: Progress,
) -> list[tuple[Case, BenchReport]]:
    """Build and time every case; `rounds`, `seconds` and `quiet` as in `bench`.

    Stock TVM takes part in the first case of each operator alone: it is far behind, and slow to
    compile.
    """
    found: list[tuple[Case, BenchReport]] = []
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        for place, case in enumerate(cases):
            progress(f"{place + 1}/{len(cases)} {case.spec.op} {case.size} {case.dtype}: build")
            root = Path(folder, str(place))
            normgraph.graphs.export(
                case.spec, shape=case.declared, dtype=case.dtype, out=root / "graphs", kinds=kinds
            )
            path = normgraph.compile.build(root / "graphs", target="cpu", out=root / "cpu")
            report = bench(
                path,
                case.shape,
                kinds=kinds,
                rounds=rounds,
                seconds=seconds,
                extras=Extras(stock=case.spec.op not in seen, compiled=compiled),
                overheads=place == 0,
                quiet=quiet,
                progress=progress,
            )
            seen.add(case.spec.op)
            found.append((case, report))
    return found


def main() -> int:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(prog="bench_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path, default=DOCUMENT, metavar="FILE")
    parser.add_argument("--json", type=path, metavar="FILE", help="every row, for a program")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--seconds", type=seconds, default=0.02, help="a peer and round")
    ops = tuple(dict.fromkeys(case.spec.op for case in standard_cases()))
    dtypes = tuple(dict.fromkeys(case.dtype for case in standard_cases()))
    parser.add_argument(
        "--ops", type=names_of(ops), default=ops, metavar="batch_norm,...", help="these alone"
    )
    parser.add_argument(
        "--dtypes", type=names_of(dtypes), default=dtypes, metavar="float32,...", help="these alone"
    )
    parser.add_argument("--kinds", type=names_of(KINDS), default=KINDS, metavar="forward,...")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--quiet",
        type=seconds_or_zero,
        default=30.0,
        metavar="SECONDS",
        help="wait for idle cores",
    )
    options = parser.parse_args()
    cases = [
        case
        for case in standard_cases()
        if case.spec.op in options.ops and case.dtype in options.dtypes
    ]
    if not cases:
        parser.error("no case is left: see --ops and --dtypes")
    plots = [f"{options.out.stem}-roofline.svg"] if available() else []
    drawn = [options.out.parent / name for name in plots]
    try:
        check_outputs(options.json, options.out, *drawn)
        causes = read_causes(options.out.parent / CAUSES)
        measured = measure(
            cases,
            kinds=options.kinds,
            rounds=options.rounds,
            seconds=options.seconds,
            quiet=options.quiet,
            compiled=not options.no_compile,
            progress=Progress(),
        )
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    code = 0
    if options.json:
        rows = [asdict(report) for _, report in measured]
        code = write(options.json, json.dumps(rows, indent=1))
    command = " ".join(["python -m normgraph.scripts.bench_table", *sys.argv[1:]])
    code = max(code, write(options.out, document(measured, command, causes, plots)))
    for picture in drawn:
        roofline([report for _, report in measured], picture)
    print(options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
