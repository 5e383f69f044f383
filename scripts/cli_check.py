"""`normgraph verify` and `normgraph bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from normgraph.errors import AccuracyError, ArgumentError
from normgraph.scripts.console import Progress
from normgraph.scripts.outputs import check_outputs


def verify(options: argparse.Namespace) -> int:
    """Print the accuracy report; 1 where an output is out of tolerance."""
    from normgraph.scripts.verify import verify as check

    _refuse_packed("verify", options.artifact)
    report = check(options.artifact, options.shape, options.seed, progress=Progress())
    print(report.to_json() if options.json else report.to_text())
    return 0 if report.ok else AccuracyError.exit_code


def _refuse_packed(command: str, path: Path) -> None:
    """Both hand the graphs to onnxruntime as files."""
    if path.is_file():
        raise ArgumentError(
            f"{path}: {command} needs the directory of an artifact, and this is a file. Run"
            f" 'normgraph unpack {path} -o DIR' first."
        )


def bench(options: argparse.Namespace) -> int:
    """Print the table of times; draw it where --plot says."""
    from normgraph.runtime.artifact import open_artifact
    from normgraph.scripts.bench import bench as measure
    from normgraph.scripts.bench_plot import pyplot, roofline
    from normgraph.scripts.bench_roster import BRIEF, Extras

    _refuse_packed("bench", options.artifact)
    known = open_artifact(options.artifact).signatures
    for kind in options.kinds or ():
        if kind not in known:
            raise ArgumentError(f"--kinds: this artifact has {', '.join(known)}; got {kind!r}")
    check_outputs(options.plot)
    if options.plot is not None:
        pyplot()  # what is missing is said before anything is measured
    report = measure(
        options.artifact,
        options.shape,
        kinds=options.kinds,
        extras=BRIEF if options.brief else Extras(),
        progress=Progress(),
    )
    if options.json:
        print(report.to_json())
    else:
        print(report.to_markdown() if options.markdown else report.to_text())
    if options.plot is not None:
        roofline([report], options.plot)
    return 0
