"""Times on a GPU: captured calls over rotating arrays, between device events, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The arrays of a rotation take this many times the L2 cache together, so that none is found in it.
_CACHES = 4
_MOST_SETS, _MOST_CALLS = 64, 1000
# Launched one by one: a stream takes in about 1000 kernels before the host has to wait for it.
_MOST_LAUNCHED = 200
# What a round takes at least, beside which an event and the first launch are nothing; no kernel
# is faster than these bytes a second and this launch.
_ROUND_SECONDS = 4e-3
_FASTEST_BYTES, _FASTEST_LAUNCH = 5e12, 1.5e-6
# An idle GPU runs at a fifth of its clock: all contestants run for so long before any is timed.
_WARM_SECONDS = 0.25
_ROUNDS = 25
# Cycles the device waits in front of a round, about 1 ms, so that the host has launched it all by
# then; as often twice as many as it takes, up to about 64 ms.
_AHEAD, _MOST_AHEAD = 2_000_000, 128_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of `rounds`, and what 20 and 80 % of them took at most.

    starved: in most rounds the device waited for the host, whose time is in it.
    """

    median: float
    low: float
    high: float
    rounds: int
    starved: bool = False


@dataclass(frozen=True)
class Prepared:
    """run launches `calls` calls; captured: as one CUDA graph."""

    run: Callable[[], object]
    calls: int
    captured: bool


def sets_for(nbytes: int, cache: int) -> int:
    """How many sets of arrays of so many bytes a rotation needs."""
    return max(2, min(_MOST_SETS, math.ceil(_CACHES * cache / max(nbytes, 1))))


def repeats_for(nbytes: int, sets: int, most: int | None = None) -> int:
    """How often a round of at most so many calls goes through the sets.

    nbytes: what a call moves. Each set is used once at least.
    """
    least = nbytes / _FASTEST_BYTES + _FASTEST_LAUNCH
    calls = min(_ROUND_SECONDS / least, _MOST_CALLS if most is None else most)
    return math.ceil(calls / sets)


def prepare(
    torch: Any, calls: Sequence[Callable[[], object]], nbytes: int, *, graph: bool = True
) -> Prepared:
    """Run the calls twice and capture a round of them; each has arrays of its own.

    A replay leaves out what the host does between launches. Calls that cannot be captured are
    launched from the host. All runs on the current stream, which must not be the default one and
    is the one the calls were made on.
    """
    repeats = repeats_for(nbytes, len(calls))
    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    made = _replay(torch, calls, repeats) if graph else None
    if made is None:
        repeats = repeats_for(nbytes, len(calls), min(_MOST_LAUNCHED, _MOST_CALLS))

    def launch() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    return Prepared(made or launch, repeats * len(calls), made is not None)


def _replay(
    torch: Any, calls: Sequence[Callable[[], object]], repeats: int
) -> Callable[[], object] | None:
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # so that no output takes the memory of one before it
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def contest(
    torch: Any, contestants: Mapping[str, Prepared], *, rounds: int = _ROUNDS
) -> dict[str, Timing]:
    """Time all of them in turns, on a GPU that is warm.

    Each round begins with another, and every other one goes backwards: none always follows the
    same.
    """
    names = list(contestants)
    until = time.monotonic() + _WARM_SECONDS
    while True:
        for name in names:
            contestants[name].run()
        torch.cuda.synchronize()
        if time.monotonic() >= until:
            break
    taken: dict[str, list[_Round]] = {name: [] for name in names}
    ahead = dict.fromkeys(names, _AHEAD)
    for number in range(rounds):
        first = number % len(names)
        order = (*names[first:], *names[:first])
        for name in reversed(order) if number % 2 else order:
            made = _round(torch, contestants[name], ahead[name])
            while made.starved and ahead[name] < _MOST_AHEAD:
                ahead[name] *= 2
                made = _round(torch, contestants[name], ahead[name])
            taken[name].append(made)
    return {name: _timing(values) for name, values in taken.items()}


@dataclass(frozen=True)
class _Round:
    """Seconds a call; starved: the device was done waiting before the host had launched it all."""

    seconds: float
    starved: bool


def _round(torch: Any, contestant: Prepared, ahead: int) -> _Round:
    """One round. The events stand on the device's own line, after a wait of so many cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(ahead)
    start.record(stream)
    contestant.run()
    starved = bool(start.query())
    end.record(stream)
    end.synchronize()
    return _Round(float(start.elapsed_time(end)) * 1e-3 / contestant.calls, starved)


def _timing(rounds: Sequence[_Round]) -> Timing:
    """Of the rounds that were not starved, or of all where those are the fewer."""
    fed = [each.seconds for each in rounds if not each.starved]
    starved = 2 * len(fed) < len(rounds)
    ordered = sorted([each.seconds for each in rounds] if starved else fed)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.2 * last)],
        ordered[round(0.8 * last)],
        len(ordered),
        starved,
    )


def copies(
    torch: Any, nbytes: int, cache: int, device: str, *, eager: bool = False
) -> dict[str, Prepared]:
    """Copies of so many bytes to another array: the driver's and a plain kernel's.

    A graph may give its copies to a copy engine, which the caller's kernels do not have to match:
    the fastest of these counts. eager: the driver's copy outside a graph too.
    """
    pairs = [
        tuple(torch.randn(max(nbytes // 4, 1), device=device) for _ in range(2))
        for _ in range(sets_for(2 * nbytes, cache))
    ]
    by_driver = [_copying(*pair) for pair in pairs]
    by_kernel = [_negating(torch, *pair) for pair in pairs]
    made = {
        "copy": prepare(torch, by_driver, 2 * nbytes),
        "copy by a kernel": prepare(torch, by_kernel, 2 * nbytes),
    }
    if eager:
        made["copy outside a graph"] = prepare(torch, by_driver, 2 * nbytes, graph=False)
    return made


def _copying(target: Any, source: Any) -> Callable[[], object]:
    return lambda: target.copy_(source)


def _negating(torch: Any, target: Any, source: Any) -> Callable[[], object]:
    return lambda: torch.neg(source, out=target)


def launch_seconds(torch: Any, device: str) -> float:
    """Seconds that a kernel of one element takes, one after the other in a graph."""
    one = torch.zeros(1, device=device)
    launches = prepare(torch, [lambda: one.add_(0.0)] * 100, 0)
    return contest(torch, {"launch": launches})["launch"].median
