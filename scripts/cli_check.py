"""`normgraph verify` and `normgraph bench`."""

from __future__ import annotations

import argparse

from normgraph.errors import AccuracyError
from normgraph.scripts.console import Progress


def verify(options: argparse.Namespace) -> int:
    """Print the accuracy report; 1 where an output is out of tolerance."""
    from normgraph.scripts.verify import verify as check

    report = check(options.artifact, options.shape, options.seed, progress=Progress())
    print(report.to_json() if options.json else report.to_text())
    return 0 if report.ok else AccuracyError.exit_code


def bench(options: argparse.Namespace) -> int:
    """Print the table of times."""
    from normgraph.scripts.bench import bench as measure

    report = measure(options.artifact, options.shape, kinds=options.kinds, progress=Progress())
    print(report.to_json() if options.json else report.to_text())
    return 0
