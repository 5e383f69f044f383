"""Running a graph of an artifact in onnxruntime, with what onnxruntime cannot take said."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph.scripts.verify_tolerance import numpy_dtype

Array = NDArray[Any]

_BFLOAT16 = 16  # TensorProto.BFLOAT16


class NotRun(Exception):
    """onnxruntime is missing, or lacks a kernel for bfloat16; the message says which."""


class Refused(Exception):
    """onnxruntime cannot run a graph of a dtype it has every kernel for: the graph is wrong."""


def run_onnx(
    model: Path | bytes, inputs: Mapping[str, Array], outputs: Sequence[tuple[str, str]]
) -> dict[str, Array]:
    """The outputs (name, dtype) of the graph for these inputs, on onnxruntime's CPU provider.

    bfloat16 goes in and out as its bits. Raises NotRun where onnxruntime is not installed or cannot
    run a graph with bfloat16, Refused where it cannot run any other.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise NotRun("onnxruntime is not installed: pip install 'normgraph[verify]'")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    feed = {name: _value(ort, array) for name, array in inputs.items()}
    wanted = [name for name, _ in outputs]
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        results = session.run_with_ort_values(wanted, feed)
    except Exception as error:
        reason = f"onnxruntime {ort.__version__}: {_first_line(error)}"
        dtypes = {array.dtype.name for array in inputs.values()} | {dtype for _, dtype in outputs}
        raise (NotRun(reason) if "bfloat16" in dtypes else Refused(reason)) from None
    return {
        name: _array(result, dtype) for (name, dtype), result in zip(outputs, results, strict=True)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _value(ort: Any, array: Array) -> Any:
    packed = np.ascontiguousarray(array).reshape(array.shape)
    if packed.dtype == numpy_dtype("bfloat16"):
        bits = packed.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(packed)


def _array(value: Any, dtype: str) -> Array:
    if dtype != "bfloat16":
        found: Array = np.asarray(value.numpy())
        return found
    import ml_dtypes

    # OrtValue.numpy() does not know bfloat16: read its memory as 16-bit integers.
    bits = np.ctypeslib.as_array(
        _pointer(value.data_ptr()), shape=(int(np.prod(value.shape(), dtype=np.int64)),)
    )
    copied: Array = bits.copy().view(ml_dtypes.bfloat16).reshape(value.shape())
    return copied


def _pointer(address: int) -> Any:
    import ctypes

    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16))
