"""Running statistics under the three conventions, inference with them and the frozen gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from normgraph import NormSpec, graphs

SHAPE = (3, 4, 5, 7)
NAMES = ("N", 4, "H", "W")


def made_inputs(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "dy": rng.normal(size=SHAPE),
        "x": rng.normal(1.0, 2.0, SHAPE),
        "gamma": rng.uniform(0.5, 2.0, 4),
        "beta": rng.normal(size=4),
        "running_mean": rng.normal(size=4),
        "running_var": rng.uniform(0.5, 2.0, 4),
    }


def run_kind(run_onnx: Any, spec: NormSpec, kind: str, given: dict[str, Any]) -> Any:
    """The graph in onnxruntime with names for dims, once checked against the reference."""
    model = graphs.build(spec, kind, NAMES, "float64")
    inputs = {i.name: given[i.name] for i in model.graph.input}
    got = run_onnx(model, inputs)
    for name, value in graphs.reference.run(spec, kind, inputs).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12)
    return got


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 0.0, 1.0])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_torch_convention(run_onnx: Any, op: str, momentum: float, correction: int) -> None:
    torch = pytest.importorskip("torch")
    given = made_inputs()
    spec = NormSpec(op, track_running_stats=True, momentum=momentum, correction=correction)
    got = run_kind(run_onnx, spec, "forward", given)
    mean, var = (torch.tensor(given[n]) for n in ("running_mean", "running_var"))
    function = getattr(torch.nn.functional, op)
    function(torch.tensor(given["x"]), mean, var, None, None, True, momentum)
    np.testing.assert_allclose(got["new_running_mean"], mean.numpy(), atol=1e-13)
    np.testing.assert_allclose(got["new_running_var"], var.numpy(), atol=1e-13)


@pytest.mark.parametrize(
    ("convention", "momentum"), [("torch", 1.0), ("onnx", 0.0), ("mxnet", 0.0)]
)
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_all_of_the_new_value(run_onnx: Any, op: str, convention: str, momentum: float) -> None:
    """A first batch replaces what was there, however small it is beside that."""
    spec = NormSpec(op, track_running_stats=True, convention=convention, momentum=momentum)
    model = graphs.build(spec, "forward", NAMES, "float32")
    given = {k: v.astype(np.float32) for k, v in made_inputs().items()}
    given["x"] = ((given["x"] - 1.0) * np.float32(1e-5)).astype(np.float32)
    inputs = {i.name: given[i.name] for i in model.graph.input}
    got = run_onnx(model, inputs)
    x = given["x"].astype(np.float64)
    over = (0, 2, 3) if op == "batch_norm" else (2, 3)
    var = x.var(axis=over, ddof=int(convention == "torch"))
    var = var if op == "batch_norm" else var.mean(axis=0)
    np.testing.assert_allclose(got["new_running_var"], var, rtol=1e-5)
    np.testing.assert_allclose(got["new_running_mean"], x.mean(axis=(0, 2, 3)), atol=1e-11)


def test_torch_saves_the_same_statistics(run_onnx: Any) -> None:
    """native_batch_norm saves the mean and 1 / sqrt(biased variance + eps), as forward does."""
    torch = pytest.importorskip("torch")
    given = made_inputs()
    got = run_kind(run_onnx, NormSpec("batch_norm"), "forward", given)
    _, mean, inv_std = torch.native_batch_norm(
        torch.tensor(given["x"]), None, None, None, None, True, 0.1, 1e-5
    )
    np.testing.assert_allclose(got["mean"].ravel(), mean.numpy(), atol=1e-13)
    np.testing.assert_allclose(got["inv_std"].ravel(), inv_std.numpy(), atol=1e-13)


@pytest.mark.parametrize("momentum", [0.9, 0.25])
def test_onnx_convention_is_onnxruntimes(run_onnx: Any, momentum: float) -> None:
    given = made_inputs()
    spec = NormSpec("batch_norm", convention="onnx", momentum=momentum)
    got = run_kind(run_onnx, spec, "forward", given)
    ports = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
        for name, dims in (("x", SHAPE), *((n, (4,)) for n in ("g", "b", "m", "v", "nm", "nv")))
    }
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, SHAPE)
    node = onnx.helper.make_node(
        "BatchNormalization",
        ["x", "g", "b", "m", "v"],
        ["y", "nm", "nv"],
        epsilon=1e-5,
        momentum=momentum,
        training_mode=1,
    )
    graph = onnx.helper.make_graph(
        [node], "peer", [ports[n] for n in "xgbmv"], [y, ports["nm"], ports["nv"]]
    )
    peer = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8
    )
    fields = zip("xgbmv", ("x", "gamma", "beta", "running_mean", "running_var"), strict=True)
    want = run_onnx(peer, {short: given[name].astype(np.float32) for short, name in fields})
    np.testing.assert_allclose(got["y"], want["y"], atol=2e-5)
    np.testing.assert_allclose(got["new_running_mean"], want["nm"], atol=2e-6)
    np.testing.assert_allclose(got["new_running_var"], want["nv"], atol=2e-6)


@pytest.mark.parametrize("convention", ["onnx", "mxnet"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_old_value_and_population_variance(run_onnx: Any, op: str, convention: str) -> None:
    """new = 0.9 * old + 0.1 * batch with the variance over m, by NumPy's own mean and var."""
    given = made_inputs()
    spec = NormSpec(op, track_running_stats=True, convention=convention)
    got = run_kind(run_onnx, spec, "forward", given)
    axes = (0, 2, 3) if op == "batch_norm" else (2, 3)
    for name, batch in (("mean", given["x"].mean(axes)), ("var", given["x"].var(axes))):
        if op == "instance_norm":
            batch = batch.mean(0)
        want = 0.9 * given[f"running_{name}"] + 0.1 * batch
        np.testing.assert_allclose(got[f"new_running_{name}"], want, atol=1e-13)


@pytest.mark.parametrize("convention", ["torch", "onnx", "mxnet"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_momentum_as_an_input(run_onnx: Any, op: str, convention: str) -> None:
    given = made_inputs()
    options: dict[str, Any] = {"track_running_stats": True, "convention": convention}
    fixed = run_kind(run_onnx, NormSpec(op, momentum=0.25, **options), "forward", given)
    free = run_kind(
        run_onnx,
        NormSpec(op, momentum=None, **options),
        "forward",
        {**given, "momentum": np.array(0.25)},
    )
    for name, value in fixed.items():
        np.testing.assert_allclose(free[name], value, rtol=1e-14)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_a_cumulative_average(run_onnx: Any, op: str) -> None:
    """momentum = 1 / (batches so far), torch's momentum=None, averages the batches."""
    spec = NormSpec(op, track_running_stats=True, momentum=None)
    kept = {"running_mean": np.zeros(4), "running_var": np.ones(4)}
    batches = [made_inputs(seed) for seed in range(3)]
    for step, given in enumerate(batches, 1):
        made = run_kind(
            run_onnx, spec, "forward", {**given, **kept, "momentum": np.array(1 / step)}
        )
        kept = {n: made[f"new_{n}"] for n in kept}
    axes = (0, 2, 3) if op == "batch_norm" else (2, 3)
    means = [given["x"].mean(axes) for given in batches]
    if op == "instance_norm":
        means = [mean.mean(0) for mean in means]
    np.testing.assert_allclose(kept["running_mean"], np.mean(means, axis=0), atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"weight": False}, {"bias": False}])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_inference_uses_the_running_statistics(
    run_onnx: Any, op: str, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    given = made_inputs()
    spec = NormSpec(op, track_running_stats=True, **options)
    got = run_kind(run_onnx, spec, "inference", given)
    x, mean, var = (torch.tensor(given[n]) for n in ("x", "running_mean", "running_var"))
    gamma = torch.tensor(given["gamma"]) if spec.weight else None
    beta = torch.tensor(given["beta"]) if spec.bias else None
    want = getattr(torch.nn.functional, op)(x, mean, var, gamma, beta, False)
    np.testing.assert_allclose(got["y"], want.numpy(), atol=1e-13)


def test_inference_is_one_scale_and_one_shift() -> None:
    nodes = graphs.build(NormSpec("batch_norm"), "inference", NAMES).graph.node
    wide = [n for n in nodes if {"x", "x_scaled"} & set(n.input)]
    assert [n.op_type for n in wide] == ["Mul", "Add"]


@pytest.mark.parametrize("options", [{}, {"weight": False}, {"bias": False}])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_the_frozen_gradient_is_frozen(run_onnx: Any, op: str, options: dict[str, Any]) -> None:
    """torch's gradient in eval mode, in which mean and variance are constants."""
    torch = pytest.importorskip("torch")
    given = made_inputs()
    spec = NormSpec(op, track_running_stats=True, **options)
    got = run_kind(run_onnx, spec, "backward_frozen", given)
    leaf = {n: torch.tensor(given[n], requires_grad=True) for n in ("x", "gamma", "beta")}
    mean, var = (torch.tensor(given[n]) for n in ("running_mean", "running_var"))
    gamma = leaf["gamma"] if spec.weight else None
    beta = leaf["beta"] if spec.bias else None
    y = getattr(torch.nn.functional, op)(leaf["x"], mean, var, gamma, beta, False)
    y.backward(torch.tensor(given["dy"]))
    for name, value in got.items():
        np.testing.assert_allclose(value, leaf[name[1:]].grad.numpy(), atol=1e-12, err_msg=name)


def test_the_frozen_gradient_is_not_the_training_one(run_onnx: Any) -> None:
    given = made_inputs()
    spec = NormSpec("batch_norm")
    made = run_kind(run_onnx, spec, "forward", given)
    trained = run_kind(run_onnx, spec, "backward", {**given, **made})
    frozen = run_kind(run_onnx, spec, "backward_frozen", given)
    assert np.abs(trained["dx"] - frozen["dx"]).max() > 0.1
    # A constant added to x moves y when the statistics are frozen, and only then.
    assert abs(frozen["dx"].sum()) > 1.0
    assert abs(trained["dx"].sum()) < 1e-12
