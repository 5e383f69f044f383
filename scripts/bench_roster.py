"""Who takes part: every peer that could compute one kind of one artifact at one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import normgraph.graphs.reference as reference
from normgraph.scripts import bench_floor, bench_onednn, bench_ort, bench_peers, bench_torch
from normgraph.scripts.bench_check import check, reason
from normgraph.scripts.bench_peers import DX_ALONE, OURS, OURS_BOUND, Peer
from normgraph.scripts.bench_report import Row
from normgraph.scripts.verify_inputs import Inputs, forward_names

Array = NDArray[Any]
Maker = tuple[str, Callable[[], Peer]]


@dataclass(frozen=True)
class Scene:
    """One kind of one artifact at one shape, with the arrays every peer is given.

    given    the inputs of our kernel; full: those of the forward, and dy, for a peer that computes
             its own statistics
    threads  what every peer may use; own_threads: what our kernels can use in this process
    outputs  the arrays that our kernel writes to, from the time it is made
    """

    path: Path
    operator: Any
    kind: str
    inputs: Inputs
    given: Mapping[str, Array]
    full: Mapping[str, Array]
    threads: int
    own_threads: int
    outputs: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Extras:
    """Peers that need more than they are installed: each may be left out.

    stock     TVM's default pipeline on the same graph: seconds to compile
    compiled  torch.compile: seconds to compile; not for an inference that computes the statistics,
              which is its forward
    onednn    oneDNN's own operators, in its own layout too
    """

    stock: bool = True
    compiled: bool = True
    onednn: bool = True


BRIEF = Extras(stock=False, compiled=False, onednn=False)


def scene_of(
    path: Path, operator: Any, kind: str, inputs: Inputs, threads: int, own_threads: int
) -> Scene:
    """The scene of one kind, with what of `inputs` it takes."""
    spec = operator.spec
    entry = operator.manifest["kinds"][kind]
    given = inputs.take([each["name"] for each in entry["inputs"]])
    full = inputs.take(forward_names(spec))
    if kind.startswith("backward"):
        full["dy"] = inputs.values["dy"]
    if kind in ("inference", "backward_frozen") and spec.track_running_stats:
        full |= inputs.take(("running_mean", "running_var"))
    return Scene(path, operator, kind, inputs, given, full, threads, own_threads)


def makers(scene: Scene, extras: Extras) -> list[Maker]:
    """What makes each peer, under the name it has where it cannot be made."""
    operator, kind, own = scene.operator, scene.kind, scene.own_threads
    found = own_makers(scene)
    if kind.startswith("backward"):
        found.append(
            (
                DX_ALONE,
                lambda: bench_peers.dx_alone(operator, kind, scene.given, own, scene.outputs),
            )
        )
    found += row_major_makers(scene, extras)
    if extras.onednn and operator.spec.op == "batch_norm":
        found += _blocked_makers(scene)
    if extras.stock:
        found.append(("stock TVM", lambda: _stock(scene)))
    return [*found, *limit_makers(scene)]


def row_major_makers(scene: Scene, extras: Extras) -> list[Maker]:
    """The peers that take the arrays row by row as ours do, but for stock TVM."""
    operator, kind, threads = scene.operator, scene.kind, scene.threads
    spec, given, full = operator.spec, scene.given, scene.full
    graph = scene.path / operator.manifest["kinds"][kind]["graph"]["file"]
    found: list[Maker] = [
        ("torch eager", lambda: bench_torch.torch_eager(spec, kind, full, threads)),
    ]
    if spec.op == "instance_norm":
        found.append(
            (
                "torch eager, as group_norm",
                lambda: bench_torch.torch_as_group_norm(spec, kind, full, threads),
            )
        )
    found += [
        ("onnxruntime, same graph", lambda: bench_ort.same_graph(graph, kind, given, threads)),
        ("onnxruntime, own operator", lambda: bench_ort.own_operator(spec, kind, full, threads)),
    ]
    if extras.onednn:
        arrays = {**full, **given}
        found.append(
            (
                "oneDNN, row-major",
                lambda: bench_onednn.onednn(spec, kind, arrays, threads, blocked=False),
            )
        )
    if extras.compiled and (spec.op == "batch_norm" or kind != "inference"):
        found.append(
            ("torch.compile", lambda: bench_torch.torch_compiled(spec, kind, full, threads))
        )
    return found


def _blocked_makers(scene: Scene) -> list[Maker]:
    spec, kind, threads = scene.operator.spec, scene.kind, scene.threads
    arrays = {**scene.full, **scene.given}
    return [
        (
            "oneDNN, blocked",
            lambda: bench_onednn.onednn(spec, kind, arrays, threads, blocked=True),
        ),
        (
            "oneDNN in torch, blocked",
            lambda: bench_onednn.torch_blocked(spec, kind, arrays, threads),
        ),
    ]


def own_makers(scene: Scene, *, fresh: bool = True) -> list[Maker]:
    """Our kernels, into given arrays, with fresh outputs (or not), and with all arrays bound."""
    operator, kind, given, own = scene.operator, scene.kind, scene.given, scene.own_threads
    out = scene.outputs
    found: list[Maker] = [
        (OURS, lambda: bench_peers.ours(operator, kind, given, own, fresh=False, out=out)),
    ]
    if fresh:
        found.append((OURS, lambda: bench_peers.ours(operator, kind, given, own, fresh=True)))
    return [
        *found,
        (OURS_BOUND, lambda: bench_peers.ours_bound(operator, kind, given, own, out)),
    ]


def limit_makers(scene: Scene) -> list[Maker]:
    """The copy or the add, by a library and in C."""
    kind, given, threads = scene.kind, scene.given, scene.threads
    return [
        ("memory limit", lambda: bench_floor.memory_limit(kind, given, threads)),
        (
            "memory limit, plain stores",
            lambda: bench_floor.stream_limit(kind, given, threads, streamed=False),
        ),
        (
            "memory limit, non-temporal stores",
            lambda: bench_floor.stream_limit(kind, given, threads, streamed=True),
        ),
    ]


def gather(named: Sequence[Maker], scene: Scene) -> tuple[list[Peer], list[Row]]:
    """The peers that run and are right, and a row with the reason for every other.

    Raises what our own kernels raise, and AccuracyError where they are wrong.
    """
    want = reference.run(scene.operator.spec, scene.kind, scene.given)
    conditions = scene.inputs.conditions(scene.kind)
    reasons: dict[str, str] = {}

    def right(peer: Peer) -> None:
        check(peer, scene.kind, want, scene.operator.dtype, conditions)

    peers = list(one_by_one(named, right, reasons))
    missing = [
        Row(scene.kind, name, "", scene.threads, reason=why) for name, why in reasons.items()
    ]
    return peers, missing


def one_by_one(
    named: Sequence[Maker], right: Callable[[Peer], None], missing: dict[str, str]
) -> Iterator[Peer]:
    """Each peer that can be made and is `right`, made when it is asked for.

    `missing` is given the reason of every other. Raises as `gather` does. No peer is held here
    while the next is made: one that nobody kept has given its memory back by then.
    """
    for name, make in named:
        try:
            peer = _made(make, right)
        except Exception as error:
            # Ours must be right to be held against anybody; what another cannot do is its own.
            if name in (OURS, OURS_BOUND, DX_ALONE):
                raise
            missing[name] = reason(error)
            continue
        yield peer
        del peer


def _made(make: Callable[[], Peer], right: Callable[[Peer], None]) -> Peer:
    peer = make()
    right(peer)
    return peer


def bytes_moved(kind: str, given: Mapping[str, Array]) -> int:
    """The bytes that must move: x (or y) and dy read, y or dx written."""
    x = given["x"] if "x" in given else given["y"]
    return int(x.nbytes) * (3 if kind.startswith("backward") else 2)


def _stock(scene: Scene) -> Peer:
    operator = scene.operator
    targets = [library["target"] for library in operator.manifest["libraries"]]
    return bench_peers.stock_tvm(
        operator.spec,
        scene.kind,
        scene.inputs.case.shape,
        operator.dtype,
        scene.given,
        next(each for each in targets if each["name"] == operator.target),
        scene.threads,
    )
