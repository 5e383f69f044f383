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
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph
import normgraph.graphs.reference as reference
from normgraph.errors import AccuracyError
from normgraph.scripts import bench_peers, bench_torch
from normgraph.scripts.bench_overheads import overheads_of
from normgraph.scripts.bench_peers import Peer, PeerMissing
from normgraph.scripts.bench_report import BenchReport, Row, machine
from normgraph.scripts.bench_timing import (
    Timing,
    cores,
    pin_threads,
    set_heap,
    time_apart,
    wait_for_quiet,
)
from normgraph.scripts.verify import versions
from normgraph.scripts.verify_inputs import Case, Inputs, check_shape, forward_names
from normgraph.scripts.verify_tolerance import ROUNDOFF, relative, scale_of, ulp

Array = NDArray[Any]

_DEFAULT_KINDS = ("forward", "inference", "backward")
# What symbolic dimensions are set to without --shape: the standard small image batch.
_DEFAULT_SIZES = (8, 56, 56)


def bench(
    path: str | Path,
    shape: Sequence[int] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    rounds: int = 7,
    seconds: float = 0.04,
    stock: bool = True,
    overheads: bool = True,
    quiet: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time the kinds of an artifact at `shape` (its own, or 8 and 56s, where not given).

    rounds and seconds: how often peers take turns, and how long each is timed in a turn. `stock`
    adds TVM's own pipeline on the same graph, which takes seconds to compile. `overheads` adds the
    cost of building and compiling a graph and of a small call. `quiet` is how many seconds to wait
    at most, before each kind, for other processes to leave the cores. Raises AccuracyError where
    our own kernel's result is wrong, and the errors of `normgraph.load`.
    """
    threads, measured_on = cores(), machine()
    pin_threads(threads)
    # Before the library is loaded: it binds TVM's pool if that is there, a serial loop if not.
    pool = _import_tvm()
    operator = normgraph.load(path)
    tell = progress or (lambda _: None)
    size = _shape(operator.shape, shape)
    inputs = Inputs(operator.spec, operator.dtype, Case(size, 0.0), seed=0)
    chosen = [kind for kind in kinds or _DEFAULT_KINDS if kind in operator.kinds]
    rows: list[Row] = []
    for kind in chosen:
        tell(f"{operator.spec.op} {kind}: {','.join(map(str, size))}")
        rows += _bench_kind(
            Path(path), operator, kind, inputs, threads, pool, stock, rounds, seconds, quiet
        )
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
        versions={**versions(), **_torch_version()},
        rows=tuple(rows),
        overheads=costs,
    )


def _import_tvm() -> bool:
    if importlib.util.find_spec("tvm") is None:
        return False
    import tvm  # noqa: F401

    return True


def _torch_version() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    return {"torch": str(torch.__version__)}


def _shape(declared: Sequence[int | str], shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        check_shape(declared, shape)
        return tuple(shape)
    names = list(dict.fromkeys(dim for dim in declared if isinstance(dim, str)))
    sizes = {name: _DEFAULT_SIZES[min(place, 2)] for place, name in enumerate(names)}
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in declared)


def _bench_kind(
    path: Path,
    operator: Any,
    kind: str,
    inputs: Inputs,
    threads: int,
    pool: bool,
    stock: bool,
    rounds: int,
    seconds: float,
    quiet: float,
) -> list[Row]:
    entry = operator.manifest["kinds"][kind]
    given = inputs.take([each["name"] for each in entry["inputs"]])
    full = inputs.take(forward_names(operator.spec)) | {"dy": inputs.values["dy"]}
    if kind in ("inference", "backward_frozen") and operator.spec.track_running_stats:
        full |= inputs.take(("running_mean", "running_var"))
    own_threads = threads if pool else 1
    targets = [library["target"] for library in operator.manifest["libraries"]]
    target = next(each for each in targets if each["name"] == operator.target)
    makers: list[tuple[str, Callable[[], Peer]]] = [
        ("normgraph", lambda: bench_peers.ours(operator, kind, given, own_threads, fresh=False)),
        ("normgraph", lambda: bench_peers.ours(operator, kind, given, own_threads, fresh=True)),
        (
            "onnxruntime",
            lambda: bench_peers.onnx_runtime(path / entry["graph"]["file"], kind, given, threads),
        ),
        ("torch eager", lambda: bench_torch.torch_eager(operator.spec, kind, full, threads)),
        ("memory limit", lambda: bench_peers.memory_limit(kind, given, threads)),
    ]
    if stock:
        makers.insert(
            3,
            (
                "stock TVM",
                lambda: bench_peers.stock_tvm(
                    operator.spec,
                    kind,
                    inputs.case.shape,
                    operator.dtype,
                    given,
                    target,
                    threads,
                ),
            ),
        )
    peers: list[Peer] = []
    missing: list[Row] = []
    want = reference.run(operator.spec, kind, given)
    for name, make in makers:
        try:
            peer = make()
            _check(peer, kind, want, operator.dtype, inputs)
        except Exception as error:
            # Ours must be right to be held against anybody; what another cannot do is its own.
            if name == "normgraph":
                raise
            missing.append(Row(kind, name, "", threads, reason=_reason(error)))
            continue
        peers.append(peer)
    if quiet > 0.0:
        wait_for_quiet(quiet)
    timings = _time(peers, rounds, seconds)
    mine = timings["normgraph", "given"].median
    moved = _bytes(kind, given)
    rows = [
        Row(
            kind,
            peer.name,
            heap,
            peer.threads,
            timing,
            ratio=timing.median / mine,
            gigabytes_per_second=moved / timing.median / 1e9,
        )
        for peer in peers
        for heap in ("given", "warm", "cold")
        if (timing := timings.get((peer.name, heap))) is not None
        and peer.fresh == (heap != "given")
    ]
    return rows + missing


def _time(peers: Sequence[Peer], rounds: int, seconds: float) -> dict[tuple[str, str], Timing]:
    """Fresh outputs on a cold heap first, then everything on a warm one."""
    fresh = {peer.name: peer.call for peer in peers if peer.fresh}
    found: dict[tuple[str, str], Timing] = {}
    try:
        if set_heap(warm=False):
            cold = time_apart(fresh, rounds=max(2, rounds // 2), seconds=seconds)
            found |= {(name, "cold"): timing for name, timing in cold.items()}
        set_heap(warm=True)
        calls: Mapping[str, Callable[[], object]] = {
            f"{'warm' if peer.fresh else 'given'} {peer.name}": peer.call for peer in peers
        }
        warm = time_apart(calls, rounds=rounds, seconds=seconds)
    finally:
        # A warm heap never shrinks: not for the rest of the process.
        set_heap(warm=False)
    for label, timing in warm.items():
        heap, _, name = label.partition(" ")
        found[name, heap] = timing
    return found


def _check(peer: Peer, kind: str, want: Mapping[str, Array], dtype: str, inputs: Inputs) -> None:
    """Raise AccuracyError where a result of the peer is far from float64.

    Ten times the tolerance of our own kernels: enough to catch a peer that computes another thing.
    One that keeps its steps in x's dtype has the same tolerance in units of that dtype.
    """
    slack = 0.5 * float(ulp(np.ones(()), dtype)) / ROUNDOFF[dtype] if peer.coarse else 1.0
    conditions = inputs.conditions(kind)
    for name, value in peer.call().items():
        if name not in want:
            continue
        found = _numpy(value).astype(np.float64).reshape(want[name].shape)
        share = max(10.0, slack) * relative(name, dtype, conditions)
        bound = share * scale_of(name, want[name], conditions)
        room = bound + 2.0 * ulp(want[name], dtype)
        error = np.abs(found - want[name])
        if not bool(np.all(error <= room)):
            raise AccuracyError(
                f"{peer.name}, {kind}, {name}: expected float64's answer within {bound:.1e}, "
                f"got one off by {float(np.max(error)):.1e}"
            )


def _reason(error: Exception) -> str:
    known = isinstance(error, (PeerMissing, AccuracyError))
    return str(error) if known else f"{type(error).__name__}: {bench_peers.first_line(error)}"


def _numpy(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().float() if value.dtype.itemsize < 4 else value.detach()
    found: Array = value.numpy()
    return found


def _bytes(kind: str, given: Mapping[str, Array]) -> int:
    """The bytes that must move: x (or y) and dy read, y or dx written."""
    x = given["x"] if "x" in given else given["y"]
    return int(x.nbytes) * (3 if kind.startswith("backward") else 2)
