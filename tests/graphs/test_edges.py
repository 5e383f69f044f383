"""Empty x, one element a slice, a large mean, NaN, and extreme variances."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from normgraph import NormSpec, graphs

OPERATORS: list[tuple[str, dict[str, Any], tuple[int | str, ...]]] = [
    ("batch_norm", {"momentum": None}, ("N", 4, "H", "W")),
    ("batch_norm", {"convention": "onnx", "correction": 1}, ("N", 4, "H", "W")),
    ("instance_norm", {"track_running_stats": True}, ("N", 4, "H", "W")),
    ("instance_norm", {"weight": False, "bias": False}, ("N", "C", "H", "W")),
    ("group_norm", {"groups": 2, "correction": 1}, ("N", 4, "H", "W")),
    ("layer_norm", {}, ("N", "T", "H", 4)),
    ("layer_norm", {"weight": False, "bias": False}, ("N", "T", "H", "D")),
    ("rms_norm", {"weight": False}, ("N", "T", "H", "D")),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("empty", [(0, 4, 3, 4), (2, 4, 0, 4), (2, 4, 3, 0), (0, 4, 0, 0)])
@pytest.mark.parametrize(("op", "options", "names"), OPERATORS)
def test_an_empty_x(
    make_case: Any,
    run_onnx: Any,
    op: str,
    options: dict[str, Any],
    names: tuple[int | str, ...],
    empty: tuple[int, ...],
    dtype: str,
) -> None:
    """Empty y and dx, zero parameter gradients, running statistics as they were, no NaN."""
    shape = tuple(d if isinstance(n, str) else n for n, d in zip(names, empty, strict=True))
    if 0 not in shape:
        shape = (0, *shape[1:])
    case = make_case(op, shape, names, options)
    for kind in graphs.kinds(case.spec):
        model = graphs.build(case.spec, kind, names, dtype)
        inputs = case.inputs(model)
        got = run_onnx(model, inputs)
        for name, value in graphs.reference.run(case.spec, kind, inputs).items():
            assert got[name].shape == value.shape
            np.testing.assert_allclose(got[name], value, rtol=1e-6)
            if name in ("dgamma", "dbeta"):
                assert not got[name].any()
            if name.startswith("new_running"):
                np.testing.assert_array_equal(got[name], inputs[name.removeprefix("new_")])


ONE = [
    ("batch_norm", {}, (1, 4, 1, 1), ("N", 4, "H", "W")),
    ("batch_norm", {"convention": "mxnet"}, (1, 4), ("N", 4)),
    ("instance_norm", {"track_running_stats": True}, (3, 4, 1), ("N", 4, "L")),
    ("group_norm", {"groups": 4}, (3, 4, 1, 1), ("N", 4, "H", "W")),
    ("layer_norm", {}, (3, 1), ("N", 1)),
]


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(("op", "options", "shape", "names"), ONE)
def test_one_element_a_slice(
    make_case: Any,
    run_onnx: Any,
    op: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    names: tuple[int | str, ...],
    correction: int,
) -> None:
    """y = beta and dx = 0; neither correction nor the torch convention divides by zero."""
    case = make_case(op, shape, names, {**options, "correction": correction})
    for dims in (shape, names):
        model = graphs.build(case.spec, "forward", dims)
        inputs = case.inputs(model)
        made = run_onnx(model, inputs)
        tail = (1,) * (len(shape) - 2)
        beta = inputs["beta"] if op == "layer_norm" else inputs["beta"].reshape(-1, *tail)
        np.testing.assert_array_equal(made["y"], np.broadcast_to(beta, shape))
        if "new_running_var" in made:
            old = case.spec.momentum if case.spec.convention != "torch" else 0.9
            np.testing.assert_allclose(made["new_running_var"], old * inputs["running_var"])
        for kind in ("backward", "backward_from_output"):
            model = graphs.build(case.spec, kind, dims)
            given = {**case.inputs(model, seed=1), **inputs, **made}
            got = run_onnx(model, given)
            np.testing.assert_array_equal(got["dx"], np.zeros(shape))
            np.testing.assert_array_equal(got["dgamma"], np.zeros_like(got["dgamma"]))
            assert got["dbeta"].any()


def without_delta(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with delta, which is zero on paper, made exactly zero."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((), np.float32), "nothing")
    )
    (delta,) = (node for node in changed.graph.node if node.name == "delta")
    delta.op_type = "Mul"
    delta.input[1] = "nothing"
    return changed


@pytest.mark.parametrize(
    ("op", "options", "shape"),
    [
        ("instance_norm", {}, (2, 4, 64, 64)),
        ("batch_norm", {"track_running_stats": False}, (16, 4, 16, 16)),
        ("group_norm", {"groups": 2}, (2, 8, 32, 32)),
        ("layer_norm", {}, (8, 4096)),
    ],
)
def test_what_the_term_that_is_zero_on_paper_gains(
    make_case: Any, run_onnx: Any, op: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """At mean 1e6 and m = 4096 it is worth two orders of magnitude in y and in dx."""
    case = make_case(op, shape, shape, options)
    forward = graphs.build(case.spec, "forward", shape)
    backward = graphs.build(case.spec, "backward", shape)
    inputs = case.inputs(forward, mean=1e6)
    dy = case.inputs(backward, seed=1)["dy"]
    want = graphs.reference.run(case.spec, "forward", inputs)
    names = [i.name for i in backward.graph.input]
    true = graphs.reference.run(
        case.spec, "backward", {n: {**inputs, **want, "dy": dy}[n] for n in names}
    )
    errors = []
    for change in (lambda model: model, without_delta):
        made = run_onnx(change(forward), inputs)
        got = run_onnx(change(backward), {**inputs, **made, "dy": dy})
        errors.append(
            [
                np.abs(found - value).max() / np.abs(value).max()
                for found, value in ((made["y"], want["y"]), (got["dx"], true["dx"]))
            ]
        )
    (y, dx), (plain_y, plain_dx) = errors
    assert y < 2e-6
    assert dx < 2e-6
    assert plain_y > 100 * y
    assert plain_dx > 100 * dx


def test_a_constant_row_far_from_zero_has_no_nan(make_case: Any, run_onnx: Any) -> None:
    """The variance is rounding alone, which the square of delta may turn negative."""
    rng = np.random.default_rng(0)
    case = make_case("layer_norm", (512, 4093), ("N", 4093), {"weight": False, "bias": False})
    model = graphs.build(case.spec, "forward", case.names, debug=True)
    level = 10 ** rng.uniform(6, 12, (512, 1))
    x = np.broadcast_to(level, case.shape).astype(np.float32)
    made = run_onnx(model, {"x": x})
    assert all(np.isfinite(value).all() for value in made.values())
    assert (made["var"] >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("op", "options", "names"), OPERATORS)
def test_nan_and_inf_are_not_hidden(
    make_case: Any,
    run_onnx: Any,
    op: str,
    options: dict[str, Any],
    names: tuple[int | str, ...],
    bad: float,
) -> None:
    case = make_case(op, (2, 4, 3, 4), names, options)
    model = graphs.build(case.spec, "forward", names)
    inputs = case.inputs(model)
    inputs["x"][0, 0, 0, 0] = bad
    made = run_onnx(model, inputs)
    assert np.isnan(made["y"][0, 0, 0, 0])
    assert np.isnan(made["inv_std"]).any() or op == "rms_norm"
    if "new_running_var" in made:
        assert np.isnan(made["new_running_var"][0])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_variance_at_the_ends_of_float32(make_case: Any, run_onnx: Any, scale: float) -> None:
    """inv_std^3 alone would leave float32's range; the gradient does not."""
    case = make_case("layer_norm", (4, 64), ("N", 64), {"eps": 0.0, "weight": False})
    model = graphs.build(case.spec, "backward", case.names)
    rng = np.random.default_rng(0)
    x = (scale * rng.normal(size=case.shape)).astype(np.float32)
    dy = rng.normal(size=case.shape).astype(np.float32)
    forward = graphs.build(case.spec, "forward", case.names)
    made = run_onnx(forward, {"x": x, "beta": np.zeros(64, np.float32)})
    inputs = {"dy": dy, "x": x, "mean": made["mean"], "inv_std": made["inv_std"]}
    got = run_onnx(model, inputs)
    want = graphs.reference.run(case.spec, "backward", inputs)
    assert np.abs(got["dx"] - want["dx"]).max() <= 2e-6 * np.abs(want["dx"]).max()


def test_half_types_are_summed_in_float32(run_onnx: Any) -> None:
    """4096 values of 32 have a sum and a sum of squares that float16 cannot hold."""
    spec = NormSpec("rms_norm", weight=False)
    x = np.full((1, 4096), 32.0, np.float16)
    made = run_onnx(graphs.build(spec, "forward", ("N", 4096), "float16"), {"x": x})
    np.testing.assert_allclose(made["inv_std"], [[1 / 32]], rtol=1e-6)
    np.testing.assert_array_equal(made["y"], np.ones_like(x))
