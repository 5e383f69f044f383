"""The operators and shapes the graph tests go over, their random inputs, and onnxruntime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import normgraph as ng

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Run = Callable[[onnx.ModelProto, Mapping[str, Array]], Arrays]

_TYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class Case:
    """An operator with its options, an x, and the same x's dims with names wherever allowed."""

    op: str
    shape: tuple[int, ...]
    names: tuple[int | str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ng.NormSpec:
        return ng.NormSpec(self.op, **self.options)

    @property
    def channels_last(self) -> bool:
        """Whether the parameters have the shape of x's last axes."""
        return self.op in ("layer_norm", "rms_norm")

    @property
    def param_shape(self) -> tuple[int, ...]:
        k: int = self.options.get("normalized_ndim", 1)
        return self.shape[-k:] if self.channels_last else (self.shape[1],)

    @property
    def stat_shape(self) -> tuple[int, ...]:
        n, c, *spatial = self.shape
        ones = (1,) * len(spatial)
        if self.op == "batch_norm":
            return (1, c, *ones)
        if self.op == "instance_norm":
            return (n, c, *ones)
        if self.op == "group_norm":
            return (n, self.options["groups"], 1, *ones)
        k: int = self.options.get("normalized_ndim", 1)
        return self.shape[:-k] + (1,) * k

    def inputs(self, model: onnx.ModelProto, seed: int = 0, mean: float = 0.0) -> Arrays:
        """Random inputs of a graph: x around `mean`, gamma and the statistics away from zero."""
        rng = np.random.default_rng(seed)
        made: Arrays = {}
        for port in model.graph.input:
            name = port.name
            dtype = onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
            if name in ("x", "y", "dy"):
                value = rng.normal(mean if name == "x" else 0.0, 1.0, self.shape)
            elif name in ("mean", "inv_std"):
                value = rng.uniform(0.5, 1.5, self.stat_shape)
                if name == "mean":
                    value += mean - 1.0
            elif name == "momentum":
                value = np.array(0.3)
            else:
                value = rng.uniform(0.5, 1.5, self.param_shape)
            made[name] = np.asarray(value).astype(dtype)
        return made


def _ids(case: Case) -> str:
    options = "-".join(f"{k}={v}" for k, v in case.options.items())
    return "-".join(filter(None, [case.op, "x".join(map(str, case.shape)), options]))


_CASES = [
    Case("batch_norm", (5, 6), ("N", 6)),
    Case("batch_norm", (3, 6, 7), ("N", 6, "L"), {"correction": 1}),
    Case("batch_norm", (3, 4, 5, 7), ("N", 4, "H", "W")),
    Case("batch_norm", (2, 3, 3, 4, 5), ("N", 3, "D", "H", "W"), {"bias": False}),
    Case(
        "batch_norm",
        (3, 4, 5, 7),
        ("N", "C", "H", "W"),
        {"weight": False, "bias": False, "track_running_stats": False},
    ),
    Case("instance_norm", (3, 4, 11), ("N", 4, "L")),
    Case("instance_norm", (3, 4, 5, 7), ("N", 4, "H", "W"), {"correction": 1}),
    Case("instance_norm", (2, 3, 3, 4, 5), ("N", 3, "D", "H", "W"), {"weight": False}),
    Case("instance_norm", (3, 4, 5, 7), ("N", 4, "H", "W"), {"track_running_stats": True}),
    Case("instance_norm", (3, 4, 7), ("N", "C", "L"), {"weight": False, "bias": False}),
    Case("group_norm", (5, 6), ("N", 6), {"groups": 2}),
    Case("group_norm", (3, 6, 7), (3, 6, "L"), {"groups": 3, "correction": 1}),
    Case("group_norm", (3, 6, 5, 7), ("N", 6, 5, 7), {"groups": 1}),
    Case("group_norm", (3, 6, 5, 7), ("N", 6, "H", "W"), {"groups": 2}),
    Case("group_norm", (2, 4, 3, 4, 5), ("N", 4, "D", "H", "W"), {"groups": 2, "bias": False}),
    Case("group_norm", (3, 6, 5), ("N", 6, "L"), {"groups": 2, "weight": False}),
    Case("group_norm", (3, 6, 5), ("N", 6, "L"), {"groups": 2, "weight": False, "bias": False}),
    Case("layer_norm", (5, 13), ("N", 13)),
    Case("layer_norm", (2, 3, 13), ("N", "T", 13), {"correction": 1}),
    Case("layer_norm", (2, 3, 4, 5), ("N", "T", 4, 5), {"normalized_ndim": 2}),
    Case("layer_norm", (2, 3, 2, 3, 5), ("A", "B", 2, 3, 5), {"normalized_ndim": 3}),
    Case("layer_norm", (4, 5), (4, 5), {"normalized_ndim": 2}),
    Case("layer_norm", (3, 4, 5), ("A", "B", "D"), {"weight": False, "bias": False}),
    Case("layer_norm", (3, 4, 5), ("A", "B", 5), {"weight": False}),
    Case("rms_norm", (5, 13), ("N", 13)),
    Case("rms_norm", (2, 3, 13), ("N", "T", 13), {"eps": None}),
    Case("rms_norm", (2, 3, 4, 5), ("N", "T", 4, 5), {"normalized_ndim": 2}),
    Case("rms_norm", (2, 3, 2, 3, 5), ("A", "B", "C", "D", "E"), {"weight": False}),
]


@pytest.fixture(params=_CASES, ids=_ids)
def case(request: pytest.FixtureRequest) -> Case:
    """Every operator, rank and option in turn."""
    made: Case = request.param
    return made


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """`Case` itself, for tests with a shape of their own."""
    return Case


@pytest.fixture(scope="session")
def run_onnx() -> Run:
    """Run a model in onnxruntime; bfloat16 goes in and comes out as ml_dtypes arrays."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an expected refusal is an exception, not a line as well
    options.intra_op_num_threads = 1

    def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> Arrays:
        session = ort.InferenceSession(model.SerializeToString(), options)
        names = [output.name for output in model.graph.output]
        values = {name: _to_ort(inputs[name]) for name in (i.name for i in model.graph.input)}
        return dict(
            zip(names, map(_from_ort, session.run_with_ort_values(names, values)), strict=True)
        )

    return run


def _to_ort(value: Array) -> ort.OrtValue:
    if value.dtype == _TYPES["bfloat16"]:
        bits = np.ascontiguousarray(value).view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value)


def _from_ort(value: ort.OrtValue) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    return np.ctypeslib.as_array(pointer, value.shape()).copy().view(_TYPES["bfloat16"])
