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
from normgraph.scripts.bench import bench
from normgraph.scripts.bench_cases import KINDS, Case, standard_cases
from normgraph.scripts.bench_document import CAUSES, document, read_causes
from normgraph.scripts.bench_plot import available, roofline
from normgraph.scripts.bench_report import BenchReport
from normgraph.scripts.bench_roster import Extras
from normgraph.scripts.console import Progress, log

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
    parser.add_argument("--out", type=Path, default=DOCUMENT, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every row, for a program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="a peer and round")
    parser.add_argument("--ops", metavar="batch_norm,...", help="these operators alone")
    parser.add_argument("--dtypes", metavar="float32,...", help="these types alone")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="forward,...")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--quiet", type=float, default=30.0, metavar="SECONDS", help="wait for idle cores"
    )
    options = parser.parse_args()
    cases = [
        case
        for case in standard_cases()
        if case.spec.op in (options.ops or case.spec.op).split(",")
        and case.dtype in (options.dtypes or case.dtype).split(",")
    ]
    kinds = options.kinds.split(",")
    if not cases or not set(kinds) <= set(KINDS):
        parser.error("no case is left: see --ops, --dtypes and --kinds")
    try:
        measured = measure(
            cases,
            kinds=kinds,
            rounds=options.rounds,
            seconds=options.seconds,
            quiet=options.quiet,
            compiled=not options.no_compile,
            progress=Progress(),
        )
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots = []
    if available():
        plots.append(f"{options.out.stem}-roofline.svg")
        roofline([report for _, report in measured], options.out.parent / plots[0])
    command = " ".join(["python -m normgraph.scripts.bench_table", *sys.argv[1:]])
    causes = read_causes(options.out.parent / CAUSES)
    options.out.write_text(document(measured, command, causes, plots))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for _, report in measured], indent=1))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
