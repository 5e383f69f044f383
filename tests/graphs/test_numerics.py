"""Every operator, kind and dtype in onnxruntime against the float64 reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normgraph import graphs

# Largest error as a share of the largest value: at x = N(0, 1), and at x = N(100, 1).
BOUNDS = {"float32": (2e-5, 2e-4), "float64": (1e-12, 1e-11)}
ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}


def check(got: Any, want: Any, dtype: str, *, far: bool = False) -> None:
    """Compare outputs; half types may be one unit in their last place off on top of float32."""
    assert list(got) == list(want)
    core = BOUNDS["float64" if dtype == "float64" else "float32"][far]
    for name, value in want.items():
        found = got[name]
        assert found.shape == value.shape, name
        limit = core * max(np.max(np.abs(value), initial=0.0), float(name == "delta"))
        if found.dtype in (np.float16, ml_dtypes.bfloat16):
            limit = limit + ULP[dtype] * np.abs(value) + SMALLEST[dtype]
        error = np.abs(found.astype(np.float64) - value)
        assert np.all(error <= limit), f"{name}: {error.max()} of {np.max(limit)}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_kind_against_the_reference(case: Any, run_onnx: Any, dtype: str) -> None:
    for kind in graphs.kinds(case.spec):
        for shape in (case.shape, case.names):
            model = graphs.build(case.spec, kind, shape, dtype, debug=True)
            inputs = case.inputs(model)
            spec = case.spec.resolve(dtype)
            want = graphs.reference.run(spec, kind, inputs, debug=True)
            check(run_onnx(model, inputs), want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_far_from_zero(case: Any, run_onnx: Any, dtype: str) -> None:
    for kind in graphs.kinds(case.spec):
        model = graphs.build(case.spec, kind, case.names, dtype)
        inputs = case.inputs(model, seed=1, mean=100.0)
        want = graphs.reference.run(case.spec.resolve(dtype), kind, inputs)
        check(run_onnx(model, inputs), want, dtype, far=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_x_with_float32_parameters(make_case: Any, run_onnx: Any, dtype: str) -> None:
    case = make_case("layer_norm", (5, 33), ("N", 33), {"param_dtype": "float32"})
    for kind in graphs.kinds(case.spec):
        model = graphs.build(case.spec, kind, case.names, dtype)
        inputs = case.inputs(model)
        got = run_onnx(model, inputs)
        assert {str(v.dtype) for k, v in got.items() if k in ("dgamma", "dbeta")} <= {"float32"}
        check(got, graphs.reference.run(case.spec, kind, inputs), dtype)


@pytest.mark.parametrize(
    ("op", "shape", "options"),
    [
        ("instance_norm", (2, 3, 56, 56), {}),
        ("batch_norm", (8, 3, 7, 7), {}),
        ("batch_norm", (3, 2, 131, 1), {"track_running_stats": False}),
        ("group_norm", (1, 64, 1, 37), {"groups": 32}),
        ("layer_norm", (3, 1009), {}),
        ("rms_norm", (1, 4096), {}),
    ],
)
def test_training_as_a_chain(
    make_case: Any, run_onnx: Any, op: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """backward fed with what forward gave, against the reference's own chain in float64."""
    case = make_case(op, shape, shape, options)
    forward = graphs.build(case.spec, "forward", shape)
    inputs = case.inputs(forward, seed=2)
    got = run_onnx(forward, inputs)
    want = graphs.reference.run(case.spec, "forward", inputs)
    check(got, want, "float32")
    for kind in ("backward", "backward_from_output"):
        backward = graphs.build(case.spec, kind, shape)
        fed = {**case.inputs(backward, seed=3), **inputs}
        names = [i.name for i in backward.graph.input]
        here = {n: got[n] if n in got else fed[n] for n in names}
        there = {n: want[n] if n in want else fed[n] for n in names}
        check(run_onnx(backward, here), graphs.reference.run(case.spec, kind, there), "float32")
