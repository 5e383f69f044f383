"""Measure an artifact against its peers and the memory limit, all in one process.

Every peer computes the same thing on the same inputs; its results are checked against float64
before it is timed, and a peer that fails or is wrong is a row with the reason. Peers take turns
with a rest between them (thread pools that spin would share the cores otherwise), each is timed
many times, and the median is reported with the 20th and the 80th percentile. Trust the ratios, not
the milliseconds: the machine may be shared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import normgraph
from normgraph.scripts.bench_overheads import overheads_of
from normgraph.scripts.bench_peers import OURS, OURS_BOUND, Peer
from normgraph.scripts.bench_report import BenchReport, Row, machine
from normgraph.scripts.bench_roster import (
    Extras,
    Scene,
    bytes_moved,
    gather,
    makers,
    scene_of,
)
from normgraph.scripts.bench_threads import bound, cores, prepare
from normgraph.scripts.bench_timing import Timing, set_heap, time_apart, wait_for_quiet
from normgraph.scripts.verify import versions
from normgraph.scripts.verify_inputs import Case, Inputs, check_shape

_DEFAULT_KINDS = ("forward", "inference", "backward")
# What symbolic dimensions are set to without --shape: the standard small image batch.
_DEFAULT_SIZES = (8, 56, 56)
# A peer this many times slower in a first look is not timed further.
_HOPELESS = 5.0


def bench(
    path: str | Path,
    shape: Sequence[int] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    rounds: int = 7,
    seconds: float = 0.04,
    extras: Extras | None = None,
    overheads: bool = True,
    quiet: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time the kinds of an artifact at `shape` (its own, or 8 and 56s, where not given).

    rounds and seconds: how often peers take turns, and how long each is timed in a turn; one five
    times slower than ours has one turn only. `extras`: which peers that take seconds to set up take
    part (all). `overheads` adds the cost of building and compiling a graph and of a small call.
    `quiet` is how many seconds to wait at most, before each kind, for other processes to leave the
    cores. Raises AccuracyError where our own kernel's result is wrong, and the errors of
    `normgraph.load`.
    """
    threads, measured_on = cores(), machine()
    own_threads = prepare(threads)
    operator = normgraph.load(path)
    tell = progress or (lambda _: None)
    size = _shape(operator.shape, shape)
    inputs = Inputs(operator.spec, operator.dtype, Case(size, 0.0), seed=0)
    chosen = [kind for kind in kinds or _DEFAULT_KINDS if kind in operator.kinds]
    rows: list[Row] = []
    for kind in chosen:
        tell(f"{operator.spec.op} {kind}: {','.join(map(str, size))} {operator.dtype}")
        scene = scene_of(Path(path), operator, kind, inputs, threads, own_threads)
        rows += _bench_kind(scene, extras or Extras(), rounds, seconds, quiet)
    costs = None
    if overheads:
        tell(f"{operator.spec.op}: cost of a build, a compile and a call")
        costs = overheads_of(Path(path), operator)
    return BenchReport(
        artifact=str(path),
        operator=operator.spec.op,
        dtype=operator.dtype,
        shape=size,
        machine=measured_on,
        versions=all_versions(),
        rows=tuple(rows),
        overheads=costs,
    )


def all_versions() -> dict[str, str]:
    """The versions of everything that takes part."""
    if importlib.util.find_spec("torch") is None:
        return versions()
    import torch

    return {**versions(), "torch": str(torch.__version__)}


def _shape(declared: Sequence[int | str], shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        check_shape(declared, shape)
        return tuple(shape)
    names = list(dict.fromkeys(dim for dim in declared if isinstance(dim, str)))
    sizes = {name: _DEFAULT_SIZES[min(place, 2)] for place, name in enumerate(names)}
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in declared)


def _bench_kind(
    scene: Scene, extras: Extras, rounds: int, seconds: float, quiet: float
) -> list[Row]:
    kind = scene.kind
    peers, missing = gather(makers(scene, extras), scene)
    with bound(scene.threads):
        if quiet > 0.0:
            wait_for_quiet(quiet)
        timings = _time(peers, rounds, seconds)
    mine, mine_bound = (timings[name, "given"].median for name in (OURS, OURS_BOUND))
    limits = {peer.name: timings[peer.name, "given"].median for peer in peers if peer.limit}
    floor = next((limits[name] for name in limits if "non-temporal" in name), None)
    limit = next(iter(limits.values()), None)
    moved = bytes_moved(kind, scene.given)
    rows = [
        Row(
            kind,
            peer.name,
            heap,
            peer.threads,
            timing,
            ratio=timing.median / (mine_bound if peer.bound else mine),
            over_limit=timing.median / limit if limit else None,
            over_floor=timing.median / floor if floor else None,
            gigabytes_per_second=moved / timing.median / 1e9,
            detail=peer.detail,
            setup=peer.setup,
            limit=peer.limit,
            blocked=peer.blocked,
            bound=peer.bound,
        )
        for peer in peers
        for heap in ("given", "warm", "cold")
        if (timing := timings.get((peer.name, heap))) is not None
        and peer.fresh == (heap != "given")
    ]
    return rows + missing


def _time(peers: Sequence[Peer], rounds: int, seconds: float) -> dict[tuple[str, str], Timing]:
    """Fresh outputs on a cold heap first, then everything on a warm one.

    On the warm one after a first look, in which who is far behind has had its turn.
    """
    fresh = {peer.name: peer.call for peer in peers if peer.fresh}
    found: dict[tuple[str, str], Timing] = {}
    try:
        if set_heap(warm=False):
            cold = time_apart(fresh, rounds=max(2, rounds // 3), seconds=seconds / 2)
            found |= {(name, "cold"): timing for name, timing in cold.items()}
        set_heap(warm=True)
        calls: Mapping[str, Callable[[], object]] = {
            f"{'warm' if peer.fresh else 'given'} {peer.name}": peer.call for peer in peers
        }
        warm = time_apart(calls, rounds=2, seconds=seconds / 2)
        enough = _HOPELESS * warm[f"given {OURS}"].median
        near = {label: call for label, call in calls.items() if warm[label].best <= enough}
        warm |= time_apart(near, rounds=rounds, seconds=seconds)
    finally:
        # A warm heap never shrinks: not for the rest of the process.
        set_heap(warm=False)
    for label, timing in warm.items():
        heap, _, name = label.partition(" ")
        found[name, heap] = timing
    return found
