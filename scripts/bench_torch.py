"""torch eager as a peer: its own functional operators, backward through autograd."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.scripts.bench_peers import Outputs, Peer, PeerMissing

Array = NDArray[Any]


def torch_eager(spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """The operator as `torch.nn.functional` has it; its outputs are always fresh.

    `inputs` are those of the forward, and dy for a gradient.
    backward is autograd's, on a forward recorded once. backward_from_output has no counterpart.
    """
    if importlib.util.find_spec("torch") is None:
        raise PeerMissing("torch is not installed")
    if kind == "backward_from_output":
        raise PeerMissing("torch has no backward from the output")
    if spec.correction:
        raise PeerMissing("torch has no correction of the normalising variance")
    import torch

    torch.set_num_threads(threads)
    tensors = {name: _tensor(torch, array) for name, array in inputs.items()}
    if "running_mean" in tensors:
        # torch refuses parameters of a half type beside float32 statistics.
        for name in ("gamma", "beta"):
            if name in tensors:
                tensors[name] = tensors[name].to(tensors["running_mean"].dtype)
    frozen = kind in ("inference", "backward_frozen")
    forward = _forward(torch, spec, tensors, frozen)
    if not kind.startswith("backward"):

        def call() -> Outputs:
            with torch.no_grad():
                return {"y": forward()}

        return Peer("torch eager", call, threads, fresh=True, coarse=True)
    sources = {
        gradient: tensors[name].requires_grad_(True)
        for gradient, name in (("dx", "x"), ("dgamma", "gamma"), ("dbeta", "beta"))
        if name in tensors
    }
    y = _forward(torch, spec, tensors, frozen)()
    wanted = tuple(sources.values())

    def gradients() -> Outputs:
        found = torch.autograd.grad(y, wanted, tensors["dy"], retain_graph=True)
        return dict(zip(sources, found, strict=True))

    return Peer("torch eager", gradients, threads, fresh=True, coarse=True)


def _tensor(torch: Any, array: Array) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    # A copy: training forwards update the running statistics in place.
    return torch.from_numpy(array.copy())


def _forward(
    torch: Any, spec: NormSpec, given: Mapping[str, Any], frozen: bool
) -> Callable[[], Any]:
    """The forward as a call: batch or running statistics as `frozen` says."""
    functional = torch.nn.functional
    x, gamma, beta = given["x"], given.get("gamma"), given.get("beta")
    mean, var = given.get("running_mean"), given.get("running_var")
    if spec.op == "group_norm":
        return lambda: functional.group_norm(x, spec.groups, gamma, beta, spec.eps)
    if spec.op in ("layer_norm", "rms_norm"):
        tail = tuple(x.shape[x.ndim - (spec.normalized_ndim or 1) :])
        if spec.op == "rms_norm":
            return lambda: functional.rms_norm(x, tail, gamma, spec.eps)
        return lambda: functional.layer_norm(x, tail, gamma, beta, spec.eps)
    momentum = spec.momentum if spec.momentum is not None else 0.1
    if spec.op == "instance_norm":
        own = not (frozen and spec.track_running_stats)
        return lambda: functional.instance_norm(x, mean, var, gamma, beta, own, momentum, spec.eps)
    return lambda: functional.batch_norm(x, mean, var, gamma, beta, not frozen, momentum, spec.eps)
