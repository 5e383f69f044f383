"""The bench of thread pools: the same bits on both, and a document that says if the bound holds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tvm_ffi

from normgraph import NormSpec
from normgraph.errors import AccuracyError
from normgraph.scripts import bench_pools
from normgraph.scripts.bench_pools import BOUND, DRAM, LOOPS, PAUSES, Point, document

ABOUT = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}
FAR = Point("rms_norm", "inference", (DRAM // 256, 64), single=2e-3, ours=1e-3, theirs=1e-3)


def test_kernels_on_both_pools() -> None:
    case = (NormSpec("layer_norm"), ("N", 64), [(1024, 64), (2048, 64)])
    points = bench_pools.measure([case], 2, 1, 0.001, lambda message: None)
    assert [(point.kind, point.shape) for point in points] == [
        (kind, shape) for shape in case[2] for kind in bench_pools.KINDS
    ]
    assert all(min(point.single, point.ours, point.theirs) > 1e-6 for point in points)
    text = document(points, {}, 2, ABOUT)
    assert "bound" not in text  # none of them is large
    assert f"| layer_norm | inference | 2048×64 | 0.5 MB | {1e6 * points[2].single:.3g} |" in text


def test_results_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(real: Any) -> Any:
        def load(path: str) -> Any:
            kernels = real(path)
            if not path.endswith("theirs.so"):
                return kernels
            return {kind: lambda *arguments: None for kind in bench_pools.KINDS}

        return load

    monkeypatch.setattr(tvm_ffi, "load_module", other(tvm_ffi.load_module))
    case = (NormSpec("layer_norm"), ("N", 64), [(1024, 64)])
    with pytest.raises(AccuracyError, match=r"layer_norm, inference, .* gave different results"):
        bench_pools.measure([case], 2, 1, 0.001, lambda message: None)


def test_a_launch_on_each_pool() -> None:
    taken = bench_pools.launch_times(2, rounds=1, pauses=dict.fromkeys(PAUSES, 5))
    names = ("on the calling thread", "ours", "OpenMP", "TVM's")
    assert set(taken) == {(name, pause) for name in names for pause in PAUSES}
    for key, seconds in taken.items():
        assert len(seconds) == len(LOOPS)
        assert min(seconds) > 0.0, key
    serial = taken["on the calling thread", 5]
    assert serial[0] < serial[-1]
    assert re.search(r"\n\| ours \| 300 \| \d.* \|\n", document([], taken, 2, ABOUT))


@pytest.mark.parametrize(("ours", "verdict"), [(BOUND * 1e-3, "held"), (1.06e-3, "missed")])
def test_the_bound_at_the_size_of_main_memory(ours: float, verdict: str) -> None:
    near = replace(FAR, shape=(1, 64), ours=5e-3)  # in cache, where it is not asked for
    text = document([near, FAR, replace(FAR, ours=ours)], {}, 2, ABOUT)
    assert f"ours / TVM's is 1.000 to {1e3 * ours:.3f}; the bound of 1.05 is {verdict}." in text
