"""Times on a GPU: captured calls over rotating arrays, between device events."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# The arrays of a rotation take this many times the L2 cache together, so that none is found in it.
_CACHES = 4
_LEAST_CALLS, _MOST_SETS = 20, 64


@dataclass(frozen=True)
class Timing:
    """Seconds a call, the median of `rounds`. captured: its calls ran as one CUDA graph."""

    median: float
    low: float
    high: float
    rounds: int
    captured: bool


def sets_for(nbytes: int, cache: int) -> int:
    """How many sets of arrays of so many bytes a rotation needs."""
    return max(2, min(_MOST_SETS, math.ceil(_CACHES * cache / max(nbytes, 1))))


def time_calls(torch: Any, calls: Sequence[Callable[[], object]], *, rounds: int = 25) -> Timing:
    """Time calls that take turns, each on arrays of its own.

    They are captured once and replayed, which leaves out what the host does between launches; a
    call that cannot be captured is launched from the host, and the result says so. All runs on the
    current stream, which must not be the default one and is the one the calls were prepared on.
    """
    repeats = math.ceil(_LEAST_CALLS / len(calls))
    stream = torch.cuda.current_stream()
    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    run, captured = _captured(torch, calls, repeats, stream)
    taken = []
    for number in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        if number >= 3:
            taken.append(start.elapsed_time(end) * 1e-3 / (repeats * len(calls)))
    ordered = sorted(taken)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.2 * last)],
        ordered[round(0.8 * last)],
        rounds,
        captured,
    )


def _captured(
    torch: Any, calls: Sequence[Callable[[], object]], repeats: int, stream: Any
) -> tuple[Callable[[], object], bool]:
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # so that no output takes the memory of one before it
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()

        def launch() -> None:
            for _ in range(repeats):
                for call in calls:
                    call()

        return launch, False

    def replay() -> object:
        graph.replay()
        return kept

    return replay, True


def copy_seconds(torch: Any, nbytes: int, cache: int) -> float:
    """Seconds to copy an array of so many bytes to another one on the device."""
    count = sets_for(2 * nbytes, cache)
    pairs = [
        tuple(torch.empty(max(nbytes // 4, 1), dtype=torch.int32, device="cuda") for _ in range(2))
        for _ in range(count)
    ]
    return time_calls(torch, [_copying(*pair) for pair in pairs]).median


def _copying(target: Any, source: Any) -> Callable[[], object]:
    return lambda: target.copy_(source)


def launch_seconds(torch: Any) -> float:
    """Seconds that a kernel of one element takes, one after the other in a graph."""
    one = torch.zeros(1, device="cuda")
    return time_calls(torch, [lambda: one.add_(0.0)] * 100).median
