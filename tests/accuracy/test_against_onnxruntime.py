"""The exported graphs in onnxruntime, and running statistics as its BatchNormalization has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import normgraph.graphs.reference as reference
from normgraph import NormSpec, graphs
from normgraph.scripts.verify_debug import outputs_of
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_onnx import NotRun, run_onnx

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("fixed", [False, True], ids=["symbolic", "static"])
def test_every_graph_runs_and_is_within_its_bound(
    op: str,
    rows: dict[str, tuple[NormSpec, tuple[int | str, ...]]],
    fixed: bool,
    dtype: str,
    within: Callable[..., None],
) -> None:
    spec, shape = rows[op]
    size = (3, 6, 5, 7) if len(shape) == 4 else (3, 5, 37)
    for mean in (0.0, 100.0):
        inputs = Inputs(spec.resolve(dtype), dtype, Case(size, mean), seed=19)
        for kind in graphs.kinds(spec):
            model = graphs.build(spec, kind, size if fixed else shape, dtype)
            given = inputs.take([each.name for each in model.graph.input])
            want = reference.run(spec.resolve(dtype), kind, given)
            factor = inputs.conditions(kind).from_output
            found = run_onnx(model.SerializeToString(), given, outputs_of(model))
            for name, got in found.items():
                where = f"{spec.op} {dtype} {kind} {name} mean {mean:g}"
                within(got, want[name], got.dtype.name, mean, where, factor)


def test_running_statistics_of_the_onnx_convention(build_operator: Callable[..., Any]) -> None:
    """As BatchNormalization-15 in training mode: population variance, momentum on the old value."""
    spec = NormSpec("batch_norm", convention="onnx", momentum=0.8)
    operator = build_operator(spec, ("N", 5, "L"), kinds=("forward",))
    inputs = Inputs(spec, "float32", Case((3, 5, 7), 1.0), seed=23)
    given = inputs.take(["x", "gamma", "beta", "running_mean", "running_var"])
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "BatchNormalization",
        list(given),
        ["y", "new_running_mean", "new_running_var"],
        training_mode=1,
        momentum=0.8,
        epsilon=1e-5,
    )
    graph = onnx.helper.make_graph(
        [node],
        "batch_norm",
        [value(name, kind, array.shape) for name, array in given.items()],
        [value(name, kind, None) for name in node.output],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=10
    )
    names = [(name, "float32") for name in node.output]
    theirs = run_onnx(model.SerializeToString(), given, names)
    found = operator.forward(*given.values())
    for name, want in theirs.items():
        np.testing.assert_allclose(getattr(found, name), want, rtol=2e-6, atol=2e-6)


def test_a_kernel_onnxruntime_lacks_is_named() -> None:
    """It takes bfloat16 in Cast and few other operators: the message names the first it lacks."""
    half = onnx.TensorProto.BFLOAT16
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["x", "x"], ["y"], name="square")],
        "square",
        [onnx.helper.make_tensor_value_info("x", half, [2])],
        [onnx.helper.make_tensor_value_info("y", half, [2])],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    with pytest.raises(NotRun, match=r"onnxruntime .* Mul"):
        run_onnx(model.SerializeToString(), {"x": np.ones(2, np.float32)}, [("y", "bfloat16")])
