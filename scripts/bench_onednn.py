"""oneDNN as a peer: its own layer, batch and group normalization, into given outputs.

batch_norm runs in the row-major layout and in the blocked one (16 channels innermost, nChw16c),
which a network of oneDNN's convolutions would have it in: x and dy are reordered before they are
timed, and so are the results before they are checked. Two libraries: the one NORMGRAPH_ONEDNN or
the package onednn-cpu-gomp gives, through its C interface, and the newer one inside torch, which
takes its blocked layout from a convolution and whose outputs are fresh.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.scripts import bench_dnnl
from normgraph.scripts.bench_dnnl import BACKWARD, FORWARD_INFERENCE, FORWARD_TRAINING
from normgraph.scripts.bench_floor import torch_view
from normgraph.scripts.bench_peers import Outputs, Peer, PeerMissing
from normgraph.scripts.verify_tolerance import numpy_dtype

Array = NDArray[Any]
Pointer = ctypes.c_void_p

_NAMES = {
    "batch_norm": "batch_normalization",
    "group_norm": "group_normalization",
    "layer_norm": "layer_normalization",
}


class _Tensor:
    """An array in one of oneDNN's layouts; `numpy()` gives it row-major."""

    def __init__(
        self, library: bench_dnnl.Library, shape: tuple[int, ...], dtype: str, blocked: bool
    ) -> None:
        self._library, self._shape, self._dtype = library, shape, dtype
        self._plain = library.describe(shape, dtype, bench_dnnl.PLAIN[len(shape)])
        tag = bench_dnnl.BLOCKED[len(shape)] if blocked else bench_dnnl.PLAIN[len(shape)]
        self.descriptor = library.describe(shape, dtype, tag)
        self._data = np.zeros(library.size(self.descriptor), np.uint8)
        self.memory = library.memory(self.descriptor, self._data)

    def set(self, array: Array) -> _Tensor:
        self._library.reorder(self._plain, np.ascontiguousarray(array), self.descriptor, self._data)
        return self

    def numpy(self) -> Array:
        out = np.empty(self._shape, numpy_dtype(self._dtype))
        self._library.reorder(self.descriptor, self._data, self._plain, out)
        return out


def onednn(
    spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int, *, blocked: bool
) -> Peer:
    """The operator through oneDNN's C interface. `inputs`: our kernel's, and gamma and beta."""
    name = _NAMES.get(spec.op)
    if name is None or kind not in ("forward", "inference", "backward"):
        raise PeerMissing(f"oneDNN has no {spec.op} {kind}")
    if spec.correction:
        raise PeerMissing("oneDNN has no correction of the normalising variance")
    x = inputs["x"]
    if blocked and (spec.op != "batch_norm" or x.ndim not in bench_dnnl.BLOCKED):
        raise PeerMissing("only batch_norm has a blocked layout")
    if spec.op == "layer_norm" and spec.normalized_ndim != 1:
        raise PeerMissing("oneDNN's layer normalization is over the last axis")
    library = bench_dnnl.library()
    made = functools.partial(_Tensor, library)
    dtype = x.dtype.name
    tensors = {"src": made(x.shape, dtype, blocked).set(x)}
    flags = 0
    for each, argument, flag in (
        ("gamma", "scale", bench_dnnl.USE_SCALE),
        ("beta", "shift", bench_dnnl.USE_SHIFT),
    ):
        if each in inputs:
            flags |= flag
            values = inputs[each].astype(np.float32)
            tensors[argument] = made(values.shape, "float32", False).set(values)
    descriptor = tensors["src"].descriptor
    extra: tuple[Any, ...] = ()
    if spec.op == "layer_norm":
        statistics = x.shape[:-1]
        extra = (made(statistics, "float32", False).descriptor,)
    elif spec.op == "group_norm":
        statistics = (x.shape[0], spec.groups or 1)
        extra = (ctypes.c_int64(spec.groups or 1),)
    else:
        statistics = (x.shape[1],)
    eps = ctypes.c_float(spec.eps or 0.0)
    mode = FORWARD_INFERENCE if kind == "inference" else FORWARD_TRAINING
    if spec.op == "batch_norm" and kind == "inference":
        flags |= bench_dnnl.USE_GLOBAL_STATS
    settings = (*extra, eps, ctypes.c_uint(flags))
    forward = library.description(
        f"{name}_forward", library.engine, ctypes.c_int(mode), descriptor, descriptor,
        *settings, None,
    )  # fmt: skip
    chosen, outputs = forward, {"y": "dst"}
    if kind == "backward":
        if spec.op != "layer_norm":  # whose backward wants to be given it
            tensors.pop("shift", None)
        dy = made(x.shape, dtype, blocked).set(inputs["dy"])
        tensors |= {"diff_dst": dy, "diff_src": made(x.shape, dtype, blocked)}
        outputs = {"dx": "diff_src"}
        for each, gradient, argument in (
            ("gamma", "dgamma", "diff_scale"), ("beta", "dbeta", "diff_shift"),
        ):  # fmt: skip
            if each in inputs:
                tensors[argument] = made(inputs[each].shape, "float32", False)
                outputs[gradient] = argument
        chosen = library.description(
            f"{name}_backward", library.engine, ctypes.c_int(BACKWARD),
            descriptor, descriptor, descriptor, *settings, forward, None,
        )  # fmt: skip
    else:
        tensors["dst"] = made(x.shape, dtype, blocked)
    if kind != "inference" or spec.op == "batch_norm":
        tensors |= _statistics(made, spec, kind, inputs, statistics)
        if kind == "forward":
            outputs["mean"] = "mean"
    memories = {each: tensor.memory for each, tensor in tensors.items()}
    run = library.bound(library.primitive(chosen), memories)

    def call() -> Outputs:
        run()
        # Named here, the tensors live as long as the call: oneDNN knows their addresses only.
        return {each: tensors[argument] for each, argument in outputs.items()}

    layout = bench_dnnl.BLOCKED[x.ndim] if blocked else bench_dnnl.PLAIN[x.ndim]
    return Peer(
        f"oneDNN {library.version}, {'blocked' if blocked else 'row-major'}",
        call,
        threads,
        fresh=False,
        bound=True,
        coarse=True,
        blocked=blocked,
        detail=f"{library.implementation(chosen)}, {layout}",
    )


def _statistics(
    made: functools.partial[_Tensor],
    spec: NormSpec,
    kind: str,
    inputs: Mapping[str, Array],
    shape: tuple[int, ...],
) -> dict[str, _Tensor]:
    """mean and variance: given to inference and backward, written by forward."""
    mean, variance = made(shape, "float32", False), made(shape, "float32", False)
    if kind == "inference":
        mean.set(inputs["running_mean"])
        variance.set(inputs["running_var"])
    elif kind == "backward":
        inv_std = inputs["inv_std"].astype(np.float64).reshape(shape)
        mean.set(inputs["mean"].reshape(shape))
        variance.set((inv_std**-2.0 - (spec.eps or 0.0)).astype(np.float32))
    return {"mean": mean, "variance": variance}


def torch_blocked(spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """batch_norm by the oneDNN inside torch, on tensors in oneDNN's own layout."""
    if spec.op != "batch_norm" or kind not in ("forward", "inference", "backward"):
        raise PeerMissing(f"torch has no {spec.op} {kind} in a layout of oneDNN")
    if not (spec.weight and spec.bias) or spec.correction or inputs["x"].ndim != 4:
        raise PeerMissing("torch's batch_norm by oneDNN takes images, a weight and a bias")
    if inputs["x"].dtype.name != "float32":
        raise PeerMissing("torch's batch_norm by oneDNN trains in float32 only")
    if importlib.util.find_spec("torch") is None:
        raise PeerMissing("torch is not installed")
    import torch

    if not torch.backends.mkldnn.is_available():
        raise PeerMissing("this torch has no oneDNN")
    torch.set_num_threads(threads)
    tensors = {name: torch_view(torch, array) for name, array in inputs.items()}
    channels = tensors["x"].shape[1]
    identity = torch.eye(channels).reshape(channels, channels, 1, 1).to_mkldnn()
    weight, bias = tensors["gamma"], tensors["beta"]
    running = [tensors[name].clone() for name in ("running_mean", "running_var")]

    def blocked(name: str) -> Any:
        """The result of a convolution is in the layout that oneDNN prefers."""
        ones = (1, 1)
        with torch.no_grad():
            return torch.mkldnn_convolution(
                tensors[name].to_mkldnn(), identity, None, (0, 0), ones, ones, 1
            )

    x = blocked("x")
    name = f"oneDNN {_version_in(torch)} in torch, blocked"
    if kind != "backward":
        training = kind == "forward"

        def call() -> Outputs:
            with torch.no_grad():
                return {
                    "y": torch.native_batch_norm(
                        x, weight, bias, *running, training, spec.momentum, spec.eps
                    )[0]
                }

        return Peer(name, call, threads, fresh=True, coarse=True, blocked=True)
    dy = blocked("dy")
    with torch.no_grad():
        _, mean, inv_std = torch.native_batch_norm(
            x, weight, bias, *running, True, spec.momentum, spec.eps
        )

    def gradients() -> Outputs:
        with torch.no_grad():
            found = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, *running, mean, inv_std, True, spec.eps, [True, True, True]
            )
        return dict(zip(("dx", "dgamma", "dbeta"), found, strict=True))

    return Peer(name, gradients, threads, fresh=True, coarse=True, blocked=True)


def _version_in(torch: Any) -> str:
    """The version torch was built with, from the text it prints."""
    _, _, rest = torch.__config__.show().partition("MKL-DNN v")
    return rest.split(" ", 1)[0] or "of torch"
