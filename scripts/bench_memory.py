"""Memory a call takes beside its arrays: `bench_memory ARTIFACT SHAPE`.

Prints, as JSON and by kind, by how many bytes the resident memory of a process peaks above what it
was before the call, with every input and output given and already touched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import normgraph
from normgraph.scripts.bench_call import arguments
from normgraph.scripts.bench_threads import cores, prepare

_RESET_PEAK = "5"


def growth(path: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes by kind, for forward and backward as far as the artifact has them."""
    prepare(cores())
    operator = normgraph.load(path)
    return {
        kind: _of_call(operator, kind, shape)
        for kind in ("forward", "backward")
        if kind in operator.kinds
    }


def _of_call(operator: Any, kind: str, shape: tuple[int, ...]) -> int:
    call = getattr(operator, kind)
    small = arguments(operator, kind, tuple(2 if isinstance(d, str) else d for d in operator.shape))
    call(*small)  # the pool's threads and their stacks are there from the first call on
    given = arguments(operator, kind, shape)
    names = [entry["name"] for entry in operator.manifest["kinds"][kind]["outputs"]]
    found = call(*given)
    out = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    call(*given, out=out)
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    sizes = tuple(int(size) for size in sys.argv[2].split(","))
    print(json.dumps(growth(sys.argv[1], sizes)))
