"""Time small calls of an artifact in a process without TVM: `bench_call ARTIFACT SHAPE`.

Prints seconds a call as JSON: inference and forward with out= given, backward with fresh outputs,
and forward with its arrays bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import normgraph
from normgraph.errors import ArgumentError, NormGraphError
from normgraph.scripts.argument_types import numeric_shape, path
from normgraph.scripts.bench_timing import time_small
from normgraph.scripts.console import log


def costs(artifact: Path, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds a call by kind, for the kinds among these the artifact has."""
    operator = normgraph.load(artifact)
    found = {}
    if "inference" in operator.kinds:
        taken = arguments(operator, "inference", shape)
        out = {"y": np.empty_like(taken[0])}
        found["inference"] = time_small(lambda: operator.inference(*taken, out=out))
    if "backward" in operator.kinds:
        given = arguments(operator, "backward", shape)
        found["backward"] = time_small(lambda: operator.backward(*given))
    if "forward" in operator.kinds:
        taken = arguments(operator, "forward", shape)
        names = operator.signature("forward").output_names
        into = dict(zip(names, operator.forward(*taken), strict=True))
        found["forward"] = time_small(lambda: operator.forward(*taken, out=into))
        found["forward, bound"] = time_small(operator.bind("forward", *taken, out=into))
    return found


def arguments(operator: Any, kind: str, shape: tuple[int, ...]) -> list[Any]:
    """Arrays of ones of the right shapes; bfloat16 is not timed here.

    Raises ArgumentError where the artifact does not take the shape.
    """
    if len(shape) != len(operator.shape) or any(
        isinstance(dim, int) and dim != size
        for dim, size in zip(operator.shape, shape, strict=True)
    ):
        wanted, came = (",".join(map(str, each)) for each in (operator.shape, shape))
        raise ArgumentError(f"expected a shape that fits {wanted}, got {came}. Give another one")
    bound = {
        dim: size for dim, size in zip(operator.shape, shape, strict=True) if isinstance(dim, str)
    }
    return [
        np.ones([bound.get(dim, dim) for dim in entry["shape"]], entry["dtype"])
        for entry in operator.manifest["kinds"][kind]["inputs"]
    ]


def main() -> int:
    """Time, and print the JSON."""
    parser = argparse.ArgumentParser(prog="bench_call", description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=path, metavar="ARTIFACT")
    parser.add_argument("shape", type=numeric_shape, metavar="SHAPE", help="of x: 1,2,2,2")
    options = parser.parse_args()
    try:
        found = costs(options.artifact, options.shape)
    except NormGraphError as error:
        log(f"error: {error}")
        return error.exit_code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
