"""The bench of the rule's knobs: right kernels of each value, and what the document says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normgraph.compile.knobs import Knobs
from normgraph.errors import AccuracyError
from normgraph.scripts import bench_peers
from normgraph.scripts.bench_knobs import Result, Trial, document, measure
from normgraph.scripts.bench_timing import Timing

TRIAL = Trial("serial", (8,), (("rms_norm", (6, 5)),), ("forward",))
ABOUT = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}


def test_each_value_is_timed() -> None:
    (found,) = measure([TRIAL], rounds=1, seconds=0.001)
    assert (found.knob, found.op, found.kind, found.shape) == (
        "serial", "rms_norm", "forward", (6, 5),
    )  # fmt: skip
    assert list(found.timings) == [Knobs().serial, 8]
    assert all(timing.median > 0 for timing in found.timings.values())


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = bench_peers.ours

    def wrong(*arguments: Any, **options: Any) -> Any:
        peer = real(*arguments, **options)
        return replace(
            peer, call=lambda: {name: np.full_like(a, 3.0) for name, a in peer.call().items()}
        )

    monkeypatch.setattr(bench_peers, "ours", wrong)
    with pytest.raises(AccuracyError, match="normgraph, forward"):
        measure([TRIAL], rounds=1, seconds=0.001)


@pytest.mark.parametrize(("seconds", "said"), [(0.8e-3, "serial 8 at rms"), (0.9e-3, "none")])
def test_what_the_document_says(seconds: float, said: str) -> None:
    def timing(low: float) -> Timing:
        return Timing(2 * low, low, 3 * low, low, 9)

    result = Result(
        "serial", "rms_norm", "forward", (60, 500), {32: timing(1e-3), 8: timing(seconds)}
    )
    text = document([result], "a command", ABOUT)
    row = f"| serial | rms_norm | 60×500 | 0.1 MB | forward | 32 | 1 | 8: {seconds * 1e3:.2f} |"
    assert row in text
    assert f"of the rule's own: {said}" in text
