"""Ours against its peers: who is timed for how long, which is the best, and whether it is faster.

A peer that gives fresh outputs has them from a warm heap; one whose arrays were bound beforehand is
held against ours bound, every other against ours with outputs given. The best peer is the one with
the worst ratio for us. Ours is slower when its median lies above that peer's 80th percentile; then
all are timed once more, for longer, before it counts.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from normgraph.scripts.bench_peers import OURS, OURS_BOUND, Peer
from normgraph.scripts.bench_timing import Timing, set_heap, time_apart

FRESH, LIMIT = "normgraph, fresh outputs", "limit"
# A peer this many times slower in a first look is not timed further.
_HOPELESS = 2.0
# Seconds that the rounds of a contest take at most, where that is more than one round.
_LONGEST = 5.0
# A heap is warm for a call that faults in fewer pages than this; after so many calls it is taken as
# it is.
_FEW_PAGES, _MOST_CALLS = 64, 6


@dataclass(frozen=True)
class Contest:
    """What was timed, and for each peer which call of ours it is held against.

    timings  by the peer's name; FRESH is ours with fresh outputs, LIMIT the memory limit
    ours     the peers alone: OURS_BOUND for those whose arrays are bound, OURS for the others
    """

    timings: Mapping[str, Timing]
    ours: Mapping[str, str]

    @property
    def best(self) -> str | None:
        """The peer that is the fastest beside our call of its sort; None without peers."""
        return min(
            self.ours,
            key=lambda name: self.timings[name].median / self.timings[self.ours[name]].median,
            default=None,
        )

    @property
    def same_sort(self) -> str:
        """Our call that the best peer is held against: OURS without peers."""
        return OURS if self.best is None else self.ours[self.best]

    @property
    def ratio(self) -> float:
        """Our median over the best peer's: above 1 is slower; 1 without peers."""
        best = self.best
        rival = self.timings[self.same_sort if best is None else best]
        return self.timings[self.same_sort].median / rival.median

    @property
    def slower(self) -> bool:
        """Our median lies above the best peer's 80th percentile."""
        best = self.best
        return best is not None and (self.timings[self.same_sort].median > self.timings[best].high)


def contest(peers: Iterable[Peer], rounds: int, seconds: float) -> Contest:
    """A first look at everybody, then ours and those not far behind; more where ours loses.

    Ours come first. The others are asked for one at a time, and who is far behind is let go before
    the next: of peers that are made when they are asked for, only those near ours are in memory
    together.
    """
    found: dict[str, Timing] = {}
    ours: dict[str, str] = {}
    near: dict[str, Callable[[], object]] = {}
    fresh: set[str] = set()
    for peer in peers:
        name = _label(peer)
        if peer.fresh:
            fresh.add(name)
        if name not in (OURS, OURS_BOUND, FRESH, LIMIT):
            ours[name] = OURS_BOUND if peer.bound else OURS
        found |= _warm({name: peer.call}, fresh, 1, seconds / 2)
        if found[name].best < _HOPELESS * found[ours.get(name, OURS)].median:
            near[name] = peer.call
        # What makes the peers makes the next one before this name is given anew.
        del peer
    # A round calls each four times, two of them to warm up.
    most = int(_LONGEST / (4.0 * sum(found[name].median for name in near)))
    found |= _warm(near, fresh, max(1, min(rounds, most)), seconds)
    if Contest(found, ours).slower:
        found |= _warm(near, fresh, max(1, min(3 * rounds, 3 * most)), 2 * seconds)
    return Contest(found, ours)


def _warm(
    calls: Mapping[str, Callable[[], object]], fresh: Set[str], rounds: int, seconds: float
) -> dict[str, Timing]:
    """The times on a warm heap. It is cold again afterwards: a warm one gives nothing back."""
    set_heap(warm=True)
    try:
        for name, call in calls.items():
            if name in fresh:
                _settle(call)
        return time_apart(calls, rounds=rounds, seconds=seconds)
    finally:
        set_heap(warm=False)


def _settle(call: Callable[[], object]) -> None:
    """Call until the heap has what the call allocates.

    With outputs of 1 GB it takes several calls until each is given the memory of the one before.
    """
    for _ in range(_MOST_CALLS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < _FEW_PAGES:
            return


def _label(peer: Peer) -> str:
    if peer.limit:
        return LIMIT
    return FRESH if peer.name == OURS and peer.fresh else peer.name
