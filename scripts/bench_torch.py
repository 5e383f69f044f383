"""PyTorch as a peer: eager, as the operator that is quickest there, and compiled by Inductor.

torch's operators give fresh outputs: `torch.nn.functional` takes no `out=`, so that torch into
given outputs cannot be measured. The backward is autograd's, on a forward recorded once.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.scripts.bench_floor import torch_view
from normgraph.scripts.bench_peers import Outputs, Peer, PeerMissing

Array = NDArray[Any]
Forward = Callable[..., Any]


def torch_eager(spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """The operator as `torch.nn.functional` has it.

    `inputs` are those of the forward, and dy for a gradient.
    """
    torch, tensors = _prepared(spec, kind, inputs, threads)
    return _peer(torch, "torch eager", _forward(torch, spec, kind), kind, tensors, threads)


def torch_as_group_norm(
    spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int
) -> Peer:
    """instance_norm as a group_norm of one channel a group, which torch runs faster."""
    if spec.op != "instance_norm" or spec.track_running_stats:
        raise PeerMissing("only an instance_norm without running statistics is a group_norm")
    torch, tensors = _prepared(spec, kind, inputs, threads)

    def forward(x: Any, gamma: Any = None, beta: Any = None) -> Any:
        return torch.nn.functional.group_norm(x, x.shape[1], gamma, beta, spec.eps)

    return _peer(torch, "torch eager, as group_norm", forward, kind, tensors, threads)


def torch_compiled(spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """torch.compile of the operator for this one shape; `setup` is the time of its first call."""
    torch, tensors = _prepared(spec, kind, inputs, threads)
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise PeerMissing("torch.compile needs a C++ compiler, and none is installed")
    autograd: Any = importlib.import_module("torch._functorch.config")
    inductor: Any = importlib.import_module("torch._inductor.config")
    # A backward that may be called twice, and a compile time that is not a look-up in a cache.
    autograd.donated_buffer = False
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    torch.compiler.reset()
    compiled = torch.compile(_forward(torch, spec, kind), dynamic=False, fullgraph=True)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # That the caches are off.
        warnings.simplefilter("ignore")
        peer = _peer(torch, "torch.compile", compiled, kind, tensors, threads)
        peer.call()
    return replace(peer, setup=time.perf_counter() - start)


def _prepared(
    spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int
) -> tuple[Any, dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        raise PeerMissing("torch is not installed")
    if kind == "backward_from_output":
        raise PeerMissing("torch has no backward from the output")
    if spec.correction:
        raise PeerMissing("torch has no correction of the normalising variance")
    import torch

    torch.set_num_threads(threads)
    tensors = {
        name: torch_view(torch, array) for name, array in inputs.items() if name != "momentum"
    }
    for name in ("running_mean", "running_var"):
        if name in tensors:
            # Training forwards update the running statistics in place.
            tensors[name] = tensors[name].clone()
    if "running_mean" in tensors:
        # torch refuses parameters of a half type beside float32 statistics.
        for name in ("gamma", "beta"):
            if name in tensors:
                tensors[name] = tensors[name].to(tensors["running_mean"].dtype)
    return torch, tensors


def _peer(
    torch: Any, name: str, forward: Forward, kind: str, tensors: dict[str, Any], threads: int
) -> Peer:
    dy = tensors.pop("dy", None)
    if not kind.startswith("backward"):

        def call() -> Outputs:
            with torch.no_grad():
                return {"y": forward(**tensors)}

        return Peer(name, call, threads, fresh=True, coarse=True)
    sources = {
        gradient: tensors[each].requires_grad_(True)
        for gradient, each in (("dx", "x"), ("dgamma", "gamma"), ("dbeta", "beta"))
        if each in tensors
    }
    y = forward(**tensors)
    wanted = tuple(sources.values())

    def gradients() -> Outputs:
        found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        return dict(zip(sources, found, strict=True))

    return Peer(name, gradients, threads, fresh=True, coarse=True)


def _forward(torch: Any, spec: NormSpec, kind: str) -> Forward:
    """The forward of the inputs by name, by batch or by running statistics as the kind says."""
    functional = torch.nn.functional
    frozen = kind in ("inference", "backward_frozen")
    momentum = spec.momentum if spec.momentum is not None else 0.1

    def group_norm(x: Any, gamma: Any = None, beta: Any = None) -> Any:
        return functional.group_norm(x, spec.groups, gamma, beta, spec.eps)

    def tail(x: Any) -> tuple[int, ...]:
        return tuple(x.shape[x.ndim - (spec.normalized_ndim or 1) :])

    def layer_norm(x: Any, gamma: Any = None, beta: Any = None) -> Any:
        return functional.layer_norm(x, tail(x), gamma, beta, spec.eps)

    def rms_norm(x: Any, gamma: Any = None) -> Any:
        return functional.rms_norm(x, tail(x), gamma, spec.eps)

    def instance_norm(
        x: Any,
        gamma: Any = None,
        beta: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
    ) -> Any:
        own = not (frozen and spec.track_running_stats)
        return functional.instance_norm(
            x, running_mean, running_var, gamma, beta, own, momentum, spec.eps
        )

    def batch_norm(
        x: Any,
        gamma: Any = None,
        beta: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
    ) -> Any:
        return functional.batch_norm(
            x, running_mean, running_var, gamma, beta, not frozen, momentum, spec.eps
        )

    forwards = {
        "batch_norm": batch_norm,
        "instance_norm": instance_norm,
        "group_norm": group_norm,
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
    }
    return forwards[spec.op]
