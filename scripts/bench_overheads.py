"""The costs beside the kernels: building a graph, compiling it, and one small call."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import normgraph
from normgraph.scripts.bench_report import Overheads

# Small enough that a call is all overhead.
_SMALL, _LONE = (1, 2, 2), 4


def overheads_of(path: Path, operator: Any) -> Overheads:
    """Measure all of them for the artifact's spec; see `Overheads`."""
    spec, dtype = operator.spec, operator.dtype
    shape = small_shape(operator.shape)
    reason = ""
    if shape is None:
        reason = "a call was not timed: the artifact takes one shape, which is not small"
    calls = {} if shape is None else call_costs(path, shape)
    kind = "backward" if "backward" in operator.kinds else operator.kinds[0]
    return Overheads(
        graph_build=graph_build(spec, kind, operator.shape, dtype),
        compile=compile_one(spec, kind, operator.shape, dtype),
        inference_call=calls.get("inference"),
        backward_call=calls.get("backward"),
        forward_call=calls.get("forward"),
        bound_call=calls.get("forward, bound"),
        call_shape=shape,
        reason=reason,
    )


def small_shape(declared: tuple[int | str, ...]) -> tuple[int, ...] | None:
    """The declared shape with small sizes for its names; None if it has none."""
    names = list(dict.fromkeys(dim for dim in declared if isinstance(dim, str)))
    if not names:
        return None
    sizes = {name: _SMALL[min(place, 2)] for place, name in enumerate(names)}
    if len(names) == 1:
        sizes[names[0]] = _LONE
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in declared)


def graph_build(
    spec: normgraph.NormSpec, kind: str, shape: tuple[int | str, ...], dtype: str
) -> float:
    """Seconds to build one graph: the best of twenty."""
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        normgraph.graphs.build(spec, kind, shape, dtype)
        taken.append(time.perf_counter() - start)
    return min(taken)


def compile_one(
    spec: normgraph.NormSpec, kind: str, shape: tuple[int | str, ...], dtype: str
) -> float | None:
    """Seconds to compile one graph in this process; None without TVM."""
    if importlib.util.find_spec("tvm") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        source = Path(folder, "graphs")
        normgraph.graphs.export(spec, shape=shape, dtype=dtype, out=source, kinds=(kind,))
        start = time.perf_counter()
        normgraph.compile.build(source, "cpu", out=Path(folder, "artifact"), cache=False)
        return time.perf_counter() - start


def call_costs(path: Path, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds a call, from a process of its own; so small a call stays on the calling thread."""
    size = ",".join(map(str, shape))
    command = [sys.executable, "-m", "normgraph.scripts.bench_call", os.path.abspath(path), size]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    costs: dict[str, float] = json.loads(done.stdout)
    return costs
