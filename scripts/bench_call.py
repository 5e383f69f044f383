"""Time small calls of an artifact in a process without TVM: `bench_call ARTIFACT SHAPE`.

Prints seconds a call as JSON: inference and forward with out= given, backward with fresh outputs,
and forward with its arrays bound.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

import normgraph
from normgraph.scripts.bench_timing import time_small


def costs(path: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds a call by kind, for the kinds among these the artifact has."""
    operator = normgraph.load(path)
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
    """Arrays of ones of the right shapes; bfloat16 is not timed here."""
    bound = {
        dim: size for dim, size in zip(operator.shape, shape, strict=True) if isinstance(dim, str)
    }
    return [
        np.ones([bound.get(dim, dim) for dim in entry["shape"]], entry["dtype"])
        for entry in operator.manifest["kinds"][kind]["inputs"]
    ]


if __name__ == "__main__":
    sizes = tuple(int(size) for size in sys.argv[2].split(","))
    print(json.dumps(costs(sys.argv[1], sizes)))
