"""onnxruntime as a peer: on the same graph, and on its own operator for the same forward."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.scripts.bench_peers import Outputs, Peer, PeerMissing, first_line

Array = NDArray[Any]

# Every one of these files is read by an onnxruntime that knows this IR version.
_IR_VERSION = 10


def same_graph(graph: Path, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """onnxruntime on the artifact's own .onnx file."""
    return _session("onnxruntime, same graph", str(graph), kind, inputs, threads, coarse=False)


def own_operator(spec: NormSpec, kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """onnxruntime on the one ONNX operator that computes this forward or inference.

    rms_norm is SimplifiedLayerNormalization where the forward's inv_std is wanted, and
    RMSNormalization where y alone is.
    """
    if kind not in ("forward", "inference"):
        raise PeerMissing("ONNX has no operator for this kind")
    if importlib.util.find_spec("onnx") is None:
        raise PeerMissing("onnx is not installed")
    if spec.correction:
        raise PeerMissing("ONNX has no correction of the normalising variance")
    node, arrays, names, opset = _node(spec, kind, inputs)
    model = _model(node, arrays, names, opset)
    return _session("onnxruntime, own operator", model, kind, arrays, threads, coarse=True)


def _node(
    spec: NormSpec, kind: str, inputs: Mapping[str, Array]
) -> tuple[Any, dict[str, Array], list[str], int]:
    """The node, what it takes, the names of what it gives, and the opset it is of."""
    from onnx import helper

    given = dict(inputs)
    x = given["x"]
    shape = (
        x.shape[x.ndim - (spec.normalized_ndim or 1) :] if spec.normalized_ndim else x.shape[1:2]
    )
    arrays: dict[str, Array] = {"x": x, "gamma": given.get("gamma", np.ones(shape, x.dtype))}
    attributes: dict[str, Any] = {"epsilon": float(spec.eps or 0.0)}
    outputs, opset = ["y"], 21
    if spec.eps is None:
        attributes["epsilon"] = float(np.finfo(np.float32).eps)
    if spec.op != "rms_norm":
        arrays["beta"] = given.get("beta", np.zeros(shape, x.dtype))
    if spec.op == "batch_norm":
        name, opset = "BatchNormalization", 15
        zeros = np.zeros(shape, np.float32)
        arrays["running_mean"] = given.get("running_mean", zeros)
        arrays["running_var"] = given.get("running_var", zeros)
        if kind == "forward":
            attributes["training_mode"] = 1
            attributes["momentum"] = 1.0 - (0.1 if spec.momentum is None else spec.momentum)
            # The running variance it gives is the biased one: not ours, and not compared.
            outputs = ["y", "new_running_mean", "biased_running_var"]
        elif "running_mean" not in given:
            raise PeerMissing("ONNX has no inference by batch statistics")
    elif spec.op == "instance_norm":
        if "running_mean" in given:
            raise PeerMissing("InstanceNormalization has no running statistics")
        name = "InstanceNormalization"
    elif spec.op == "group_norm":
        name = "GroupNormalization"
        attributes["num_groups"] = spec.groups
    else:
        attributes["axis"] = -(spec.normalized_ndim or 1)
        if spec.op == "layer_norm":
            name, opset = "LayerNormalization", 17
            outputs = ["y", "mean", "inv_std"] if kind == "forward" else ["y"]
        elif kind == "forward":
            name, opset, outputs = "SimplifiedLayerNormalization", 17, ["y", "inv_std"]
        else:
            name, opset = "RMSNormalization", 23
    node = helper.make_node(name, list(arrays), outputs, **attributes)
    return node, arrays, outputs, opset


def _model(node: Any, arrays: Mapping[str, Array], names: Sequence[str], opset: int) -> bytes:
    from onnx import TensorProto, helper

    def described(name: str, array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            kind = TensorProto.BFLOAT16
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, list(array.shape))

    x = arrays["x"]
    outputs = []
    for name in names:
        like = x.dtype if name == "y" else arrays.get("running_mean", np.empty(0, np.float32)).dtype
        kind = described(name, np.empty(0, like)).type.tensor_type.elem_type
        outputs.append(helper.make_tensor_value_info(name, kind, None))
    graph = helper.make_graph(
        [node], "own", [described(name, array) for name, array in arrays.items()], outputs
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def _session(
    name: str,
    model: str | bytes,
    kind: str,
    inputs: Mapping[str, Array],
    threads: int,
    *,
    coarse: bool,
) -> Peer:
    """A session with inputs and outputs bound to memory allocated once."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise PeerMissing("onnxruntime is not installed")
    import onnxruntime as ort

    if any(array.dtype.name == "bfloat16" for array in inputs.values()):
        raise PeerMissing("onnxruntime binds no bfloat16 arrays")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if threads > 1:
        # The calling thread is the first; the others are bound to the cores after it.
        affinities = ";".join(str(core + 1) for core in range(1, threads))
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        arrays = dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise PeerMissing(f"onnxruntime cannot run {kind}: {first_line(error)}") from None
    binding = session.io_binding()
    for each, array in inputs.items():
        binding.bind_cpu_input(each, array)
    for each, array in arrays.items():
        binding.bind_output(each, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call() -> Outputs:
        session.run_with_iobinding(binding)
        return arrays

    return Peer(name, call, threads, fresh=False, bound=True, coarse=coarse)
