"""Graphs no rule knows still compile, slowly and rightly; and both rules agree where both work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normgraph import NormSpec
from normgraph.compile import pipeline, plain_rule, resolve, slice_rule
from normgraph.graphs import build

NULL, WRITE, ADD = 0, 1, 2
OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


def _maximum_graph() -> onnx.ModelProto:
    """high = max over the last axis; y = x - high."""
    like_x = ["N", "M"]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["x", "axes"], ["high"], keepdims=1),
            helper.make_node("Sub", ["x", "high"], ["y"]),
        ],
        "largest",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, like_x)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, like_x),
            helper.make_tensor_value_info("high", TensorProto.FLOAT, ["N", 1]),
        ],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_an_unknown_pattern_is_compiled_plainly_and_said(
    compile_models: Callable[..., Any],
) -> None:
    said: list[str] = []
    goal, dump = resolve("cpu"), pipeline.Dump(None)
    made = pipeline.schedule("largest", _maximum_graph(), goal, dump, said.append)
    assert made.rule == plain_rule.NAME
    assert said == ["largest: no schedule rule knows this pattern; compiled plainly, slow"]
    kernels = compile_models(NormSpec("rms_norm"), {"largest": _maximum_graph()})
    x = np.random.default_rng(0).standard_normal((5, 13)).astype(np.float32)
    high = x.max(axis=1, keepdims=True)
    want = {"y": x - high, "high": high}
    rng = np.random.default_rng(1)
    old = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in want.items()}
    for requests in itertools.product((NULL, WRITE, ADD), repeat=2):
        asked = dict(zip(want, requests, strict=True))
        got = kernels.call("largest", {"x": x}, asked, old)
        for name, request in asked.items():
            expected = {NULL: old[name], WRITE: want[name], ADD: old[name] + want[name]}[request]
            np.testing.assert_array_equal(got[name], expected, f"{name} {asked}")
    placeholder = {"high": np.full((1, 1), np.nan, np.float32)}
    got = kernels.call("largest", {"x": x}, {"y": WRITE}, placeholder)
    np.testing.assert_array_equal(got["y"], want["y"])
    assert np.isnan(got["high"]).all()


def test_the_plain_kernel_refuses_wrong_shapes(compile_models: Callable[..., Any]) -> None:
    kernels = compile_models(NormSpec("rms_norm"), {"largest": _maximum_graph()})
    x, y = np.zeros((5, 13), np.float32), np.full((5, 12), np.nan, np.float32)
    with pytest.raises(ValueError, match="y does not have the shape"):
        kernels.module["largest"](x, y, np.zeros((5, 1), np.float32), WRITE | WRITE << 2)
    assert np.isnan(y).all()
    with pytest.raises(ValueError, match=r"shape|ndim|dimension"):
        kernels.module["largest"](x[0], y, np.zeros((5, 1), np.float32), WRITE)


def test_a_graph_with_a_maximum_becomes_an_artifact(tmp_path: Path) -> None:
    """With the metadata of an export, it passes the self-test if it means the same."""
    from normgraph.compile import build as compile_directory

    spec = NormSpec("rms_norm", weight=False)
    model = build(spec, "inference", ("N", 7))
    # y = max over one element of y: the same numbers by an operator no rule knows.
    node = next(n for n in model.graph.node if "y" in n.output)
    node.output[0] = "y_before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "last"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["y_before", "last"], ["y_one"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["y_one", "last"], ["y"], keepdims=0))
    (tmp_path / "g").mkdir()
    onnx.save(model, tmp_path / "g" / "inference.onnx")
    said: list[str] = []
    compile_directory(tmp_path / "g", out=tmp_path / "a", progress=said.append)
    assert "inference: no schedule rule knows this pattern; compiled plainly, slow" in said
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["kinds"]["inference"]["rule"] == plain_rule.NAME
    assert manifest["self_test"]["status"] == "passed"


@pytest.mark.parametrize("op", OPS)
def test_the_slice_rule_takes_every_kind_and_agrees_with_the_plain_one(
    op: str,
    row: Callable[..., Any],
    shapes: dict[str, Any],
    compile_models: Callable[..., Any],
) -> None:
    fast = row(op)
    assert all(fast.ports[kind]["rule"] == slice_rule.NAME for kind in fast.kinds)
    models = {kind: build(fast.spec, kind, shapes[op]) for kind in ("forward", "backward")}
    plain = compile_models(fast.spec, models, plain_rule)
    for kind in models:
        for sizes in ({"N": 3, "H": 7, "W": 5, "T": 3}, {"N": 7, "H": 31, "W": 37, "T": 257}):
            inputs = fast.inputs(kind, sizes)
            got, want = fast.call(kind, inputs), plain.call(kind, inputs)
            for name, value in want.items():
                # The plain sum of m terms one after the other is the less exact one.
                bound = 2e-6 * (1 + fast.growth(inputs)) * (1 + np.sqrt(value.size) / 100)
                largest = max(float(np.max(np.abs(value))), fast.terms(name, inputs), 1.0)
                error = float(np.max(np.abs(got[name] - value)))
                assert error <= bound * largest, (kind, name, error / largest)


def test_plain_requests_of_half_outputs_are_rounded_once(
    compile_models: Callable[..., Any],
) -> None:
    spec = NormSpec("rms_norm")
    models = {"backward": build(spec, "backward", ("N", 9), "bfloat16")}
    kernels = compile_models(spec, models, plain_rule)
    inputs = kernels.inputs("backward", {"N": 33})
    want = kernels.answers("backward", inputs)
    old = {name: np.ones(value.shape, inputs["x"].dtype) for name, value in want.items()}
    got = kernels.call("backward", inputs, dict.fromkeys(want, ADD), old)
    for name, value in want.items():
        np.testing.assert_allclose(
            got[name].astype(np.float64), 1 + value, rtol=2.0**-7, atol=2.0**-7, err_msg=name
        )
