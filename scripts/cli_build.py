"""`normgraph export` and `normgraph compile`."""

from __future__ import annotations

import argparse

from normgraph.scripts.console import Progress
from normgraph.spec import NormSpec

_SPEC_OPTIONS = (
    "eps",
    "groups",
    "normalized_ndim",
    "weight",
    "bias",
    "correction",
    "track_running_stats",
    "momentum",
    "convention",
    "param_dtype",
)


def export(options: argparse.Namespace) -> int:
    """Write one graph a kind and print their paths."""
    from normgraph import graphs

    given = {name: getattr(options, name) for name in _SPEC_OPTIONS if name in options}
    paths = graphs.export(
        NormSpec(options.op, **given),
        shape=options.shape,
        dtype=options.dtype,
        out=options.out,
        kinds=options.kinds,
    )
    for path in paths.values():
        print(path)
    return 0


def compile_(options: argparse.Namespace) -> int:
    """Compile the graphs of a directory and print the artifact's path."""
    from normgraph import compile as compiler

    print(
        compiler.build(
            options.src,
            target=options.target or "cpu",
            out=options.out,
            debug_dump=options.debug_dump,
            progress=Progress(),
        )
    )
    return 0
