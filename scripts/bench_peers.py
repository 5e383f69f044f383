"""What a peer is; our own kernels, and stock TVM on the same graph.

Each peer is made once for one kind and one set of inputs, and is a call without arguments that
returns the outputs it computed by name, so that they can be checked before they are timed. A peer
that cannot be made here raises `PeerMissing` with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph
from normgraph import NormSpec

Array = NDArray[Any]
Outputs = Mapping[str, Any]


class PeerMissing(Exception):
    """The peer is not installed or cannot run this graph; the message says which."""


@dataclass(frozen=True)
class Peer:
    """A contender: what it is called, what it runs, how many threads it may use.

    fresh    its outputs are allocated by each call
    bound    its arrays were bound beforehand: a call passes none
    coarse   it may round what it keeps between its steps to x's dtype
    blocked  it has x and dy, and leaves its result, in a blocked layout
    limit    no contender but a copy or an add: there is nothing to hold against float64
    detail   what ran, where the peer says so
    setup    seconds it took to compile, where it compiles
    """

    name: str
    call: Callable[[], Outputs]
    threads: int
    fresh: bool
    bound: bool = False
    coarse: bool = False
    blocked: bool = False
    limit: bool = False
    detail: str = ""
    setup: float | None = None


OURS, OURS_BOUND, DX_ALONE = "normgraph", "normgraph, bound", "normgraph, dx alone"


def ours(
    operator: Any,
    kind: str,
    inputs: Mapping[str, Array],
    threads: int,
    *,
    fresh: bool,
    out: dict[str, Array] | None = None,
) -> Peer:
    """Our kernel, into given arrays or with outputs allocated by each call.

    out: the arrays to give; where it is empty, it is filled with new ones.
    """
    names = [entry["name"] for entry in operator.manifest["kinds"][kind]["outputs"]]
    arguments = tuple(inputs.values())
    method = getattr(operator, kind)

    def named(found: Any) -> Outputs:
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    if fresh:
        return Peer(OURS, lambda: named(method(*arguments)), threads, fresh=True)
    places = {} if out is None else out
    if not places:
        places.update(named(method(*arguments)))
    return Peer(OURS, lambda: named(method(*arguments, out=places)), threads, fresh=False)


def ours_bound(
    operator: Any, kind: str, inputs: Mapping[str, Array], threads: int, out: dict[str, Array]
) -> Peer:
    """Our kernel with all arrays bound; `out` are those of `ours`."""
    call = operator.bind(kind, *inputs.values(), out=out)

    def run() -> Outputs:
        call()
        return out

    return Peer(OURS_BOUND, run, threads, fresh=False, bound=True)


def dx_alone(
    operator: Any,
    kind: str,
    inputs: Mapping[str, Array],
    threads: int,
    out: Mapping[str, Array] | None = None,
) -> Peer:
    """Our kernel asked for dx and nothing else, into a given array.

    out: the arrays of `ours`. The same dx makes the two comparable: where it lies beside x and dy
    costs up to a seventh of the time of a call in cache.
    """
    if not kind.startswith("backward"):
        raise PeerMissing("only a backward has a dx")
    arguments, method = tuple(inputs.values()), getattr(operator, kind)
    dx = out["dx"] if out else method(*arguments, want=("dx",))
    dx.fill(np.nan)  # the check of this peer sees its own result

    def call() -> Outputs:
        return {"dx": method(*arguments, want=("dx",), out={"dx": dx})}

    return Peer(DX_ALONE, call, threads, fresh=False)


def stock_tvm(
    spec: NormSpec,
    kind: str,
    shape: tuple[int, ...],
    dtype: str,
    inputs: Mapping[str, Array],
    target: Mapping[str, Any],
    threads: int,
) -> Peer:
    """TVM's own default pipeline on the same graph, for this one shape, in its virtual machine."""
    if importlib.util.find_spec("tvm") is None:
        raise PeerMissing("TVM is not installed")
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    model = normgraph.graphs.build(spec, kind, shape, dtype)
    names = [output.name for output in model.graph.output]
    described = {"kind": "llvm", "mcpu": target["mcpu"], "num-cores": threads}
    try:
        module = from_onnx(model)
        executable = tvm.compile(module, target=tvm.target.Target(described))
        machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
        arguments = [tvm.runtime.tensor(array) for array in inputs.values()]
        main = machine["main"]
        main(*arguments)
    except Exception as error:
        raise PeerMissing(f"stock TVM cannot run {kind}: {first_line(error)}") from None

    def call() -> Outputs:
        found = main(*arguments)
        return dict(zip(names, [found] if len(names) == 1 else list(found), strict=True))

    return Peer("stock TVM", call, threads, fresh=True)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
