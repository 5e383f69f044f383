"""Who is timed: our kernels, torch eager, onnxruntime and stock TVM on the same graph, a copy.

Each peer is made once for one kind and one set of inputs, and is a call without arguments that
returns the outputs it computed by name, so that they can be checked before they are timed. A peer
that cannot be made here raises `PeerMissing` with the reason.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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

    `coarse`: it may round what it keeps between its steps to x's dtype.
    """

    name: str
    call: Callable[[], Outputs]
    threads: int
    fresh: bool
    coarse: bool = False


def ours(
    operator: Any, kind: str, inputs: Mapping[str, Array], threads: int, *, fresh: bool
) -> Peer:
    """Our kernel, into given arrays or with outputs allocated by each call."""
    names = [entry["name"] for entry in operator.manifest["kinds"][kind]["outputs"]]
    arguments = tuple(inputs.values())
    method = getattr(operator, kind)

    def named(found: Any) -> Outputs:
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    if fresh:
        return Peer("normgraph", lambda: named(method(*arguments)), threads, fresh=True)
    out = named(method(*arguments))
    return Peer("normgraph", lambda: named(method(*arguments, out=out)), threads, fresh=False)


def onnx_runtime(graph: Path, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """onnxruntime on the same file, inputs and outputs bound to memory allocated once."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise PeerMissing("onnxruntime is not installed")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if threads > 1:
        # The calling thread is the first; the others are bound to the cores after it.
        affinities = ";".join(str(core + 1) for core in range(1, threads))
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    if any(array.dtype.name == "bfloat16" for array in inputs.values()):
        raise PeerMissing("onnxruntime binds no bfloat16 arrays")
    try:
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        arrays = dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise PeerMissing(f"onnxruntime cannot run {kind}: {first_line(error)}") from None
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    for name, array in arrays.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call() -> Outputs:
        session.run_with_iobinding(binding)
        return arrays

    return Peer("onnxruntime", call, threads, fresh=False)


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


def memory_limit(kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """The least traffic a kernel of this kind can have: a copy (x to y) or an add (dy, x to dx)."""
    x = inputs["x"] if "x" in inputs else inputs["y"]
    backward = "dy" in inputs
    name = "add of two arrays" if backward else "copy of one array"
    if importlib.util.find_spec("torch") is not None and x.dtype.name != "bfloat16":
        import torch

        torch.set_num_threads(threads)
        source = torch.from_numpy(x)
        target = torch.empty_like(source)
        other = torch.from_numpy(inputs["dy"]) if backward else source
        call: Callable[[], object] = (
            (lambda: torch.add(other, source, out=target))
            if backward
            else (lambda: target.copy_(source))
        )
        return Peer(f"{name} (torch)", lambda: {"": call()}, threads, fresh=False)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    parts = [part.ravel() for part in np.array_split(x.ravel(), threads)]
    goals = np.array_split(np.empty_like(x).ravel(), threads)
    others = np.array_split(inputs["dy"].ravel(), threads) if backward else parts

    def share(place: int) -> None:
        if backward:
            np.add(others[place], parts[place], out=goals[place])
        else:
            np.copyto(goals[place], parts[place])

    def spread() -> Outputs:
        list(pool.map(share, range(threads)))
        return {}

    return Peer(f"{name} (NumPy)", spread, threads, fresh=False)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
