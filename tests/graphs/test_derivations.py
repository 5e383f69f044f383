"""The claims of docs/derivations.md: right formulas agree with central differences, wrong do not.

The formulas here are those of the page and of the published derivations it lists, written out in
NumPy on one slice of m = 7 with eps = 1e-3; the graphs run in onnxruntime in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from normgraph import NormSpec, graphs

Array = npt.NDArray[np.float64]

M, EPS, GAMMA, BETA = 7, 1e-3, 1.7, -0.4
RNG = np.random.default_rng(7)
X = RNG.normal(0.8, 1.3, M)
DY = RNG.normal(size=M)


def forward(x: Array, correction: int = 0) -> Array:
    return GAMMA * x_hat(x, correction) + BETA


def x_hat(x: Array, correction: int = 0) -> Array:
    deviation: Array = x - x.mean()
    return deviation * inv_std(x, correction)


def inv_std(x: Array, correction: int = 0) -> float:
    return float(1 / np.sqrt(x.var(ddof=correction) + EPS))


def central_differences(loss: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    slopes = [(loss(x + step * e) - loss(x - step * e)) / (2 * step) for e in np.eye(x.size)]
    return np.array(slopes)


def true_dx(correction: int = 0) -> Array:
    return central_differences(lambda x: float(DY @ forward(x, correction)), X)


def agrees(dx: Array, correction: int = 0) -> bool:
    return bool(np.abs(dx - true_dx(correction)).max() < 1e-8)


def run_graph(run_onnx: Any, spec: NormSpec, kind: str, inputs: dict[str, Any]) -> Any:
    """One slice of `spec` in float64, out of the graph with names for all it can name."""
    model = graphs.build(spec, kind, ("B", "D"), "float64")
    return run_onnx(model, {name: np.atleast_2d(value) for name, value in inputs.items()})


@pytest.mark.parametrize("correction", [0, 1])
def test_the_graph_on_the_same_slice(run_onnx: Any, correction: int) -> None:
    spec = NormSpec("layer_norm", eps=EPS, correction=correction, weight=False, bias=False)
    made = run_graph(run_onnx, spec, "forward", {"x": X})
    np.testing.assert_allclose(GAMMA * made["y"][0] + BETA, forward(X, correction), atol=1e-14)
    saved = {n: made[n] for n in ("mean", "inv_std")}
    got = run_graph(run_onnx, spec, "backward", {"dy": DY, "x": X, **saved})
    assert agrees(GAMMA * got["dx"][0], correction)


def test_the_closed_form() -> None:
    g, hat = GAMMA * DY, x_hat(X)
    assert agrees(inv_std(X) * (g - g.mean() - hat * np.mean(g * hat)))


def test_the_three_terms() -> None:
    g, x_mu, r = GAMMA * DY, X - X.mean(), inv_std(X)
    dvar = -0.5 * r**3 * np.sum(g * x_mu)
    dmean = -r * np.sum(g) + dvar * np.sum(-2 * x_mu) / M
    assert agrees(g * r + dvar * 2 * x_mu / M + dmean / M)
    # Leaving either way out is seen.
    assert not agrees(g * r + dmean / M)
    assert not agrees(g * r + dvar * 2 * x_mu / M)


def test_the_parameters() -> None:
    hat = x_hat(X)
    slope = central_differences(lambda p: float(DY @ (p[0] * hat + p[1])), np.array([GAMMA, BETA]))
    np.testing.assert_allclose([DY @ hat, DY.sum()], slope, atol=1e-8)


def test_the_root_mean_square() -> None:
    def loss(x: Array) -> float:
        return float(GAMMA * DY @ x / np.sqrt(np.mean(x**2) + EPS))

    g, r = GAMMA * DY, 1 / np.sqrt(np.mean(X**2) + EPS)
    dvar = -0.5 * r**3 * np.sum(g * X)
    np.testing.assert_allclose(g * r + dvar * 2 * X / M, central_differences(loss, X), atol=1e-8)


def test_the_variance_over_m_minus_one() -> None:
    g, hat = GAMMA * DY, x_hat(X, 1)
    assert agrees(inv_std(X, 1) * (g - g.mean() - hat * np.sum(g * hat) / (M - 1)), correction=1)
    # With m for m - 1 it would be the other variant's.
    assert not agrees(inv_std(X, 1) * (g - g.mean() - hat * np.sum(g * hat) / M), correction=1)


@pytest.mark.parametrize("correction", [0, 1])
def test_two_elements_a_slice(correction: int) -> None:
    """dx is eps / (var + eps) of its terms."""
    x, dy = X[:2], DY[:2]
    var, r, h = x.var(ddof=correction), inv_std(x, correction), GAMMA * (dy[0] - dy[1]) / 2
    slope = central_differences(lambda v: float(dy @ forward(v, correction)), x)
    want = r * h * EPS / (var + EPS)
    assert abs(want) < 0.05 * abs(r * h)
    np.testing.assert_allclose(slope, [want, -want], atol=1e-8)


def test_two_elements_a_slice_in_float32(run_onnx: Any) -> None:
    """The error is small beside the terms of dx, and not beside dx."""
    rng = np.random.default_rng(5)
    x, dy = (rng.normal(size=(64, 2)).astype(np.float32) for _ in "xd")
    x[:, 1] = x[:, 0] + np.float32(2) * np.sign(x[:, 1])  # a variance of 1
    spec = NormSpec("layer_norm", eps=1e-5, weight=False, bias=False)
    made = graphs.reference.run(spec, "forward", {"x": x})
    saved = {name: made[name].astype(np.float32) for name in ("mean", "inv_std")}
    got = run_onnx(graphs.build(spec, "backward", ("N", 2)), {"dy": dy, "x": x, **saved})
    true = graphs.reference.run(
        spec, "backward", {"dy": dy, "x": x, **{name: made[name] for name in saved}}
    )
    error = np.abs(got["dx"] - true["dx"]).max()
    terms = np.abs(made["inv_std"] * (dy[:, :1] - dy[:, 1:]) / 2)
    np.testing.assert_allclose(np.abs(true["dx"]), terms * [1e-5, 1e-5], rtol=1e-3)
    assert error < 1e-6 * terms.max()
    assert error > 1e-3 * np.abs(true["dx"]).max()


def test_the_form_from_the_output(run_onnx: Any) -> None:
    y, r, g = forward(X), inv_std(X), GAMMA * DY
    hat = (y - BETA) / GAMMA
    assert agrees(r * (g - g.mean() - hat * np.mean(g * hat)))
    spec = NormSpec("instance_norm", eps=EPS)
    model = graphs.build(spec, "backward_from_output", ("N", 1, "L"), "float64")
    got = run_onnx(
        model,
        {
            "dy": DY.reshape(1, 1, M),
            "y": y.reshape(1, 1, M),
            "gamma": np.array([GAMMA]),
            "beta": np.array([BETA]),
            "inv_std": np.full((1, 1, 1), r),
        },
    )
    assert agrees(got["dx"].ravel())
    np.testing.assert_allclose(got["dgamma"], [DY @ x_hat(X)], atol=1e-13)


@pytest.mark.parametrize("off", [1e-3, 0.3, -40.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_the_answer_does_not_depend_on_the_mean_subtracted(
    run_onnx: Any, correction: int, off: float
) -> None:
    mean = X.mean() + off
    delta = np.mean(X - mean)
    var = (np.sum((X - mean) ** 2) - M * delta**2) / (M - correction)
    np.testing.assert_allclose(var, X.var(ddof=correction), rtol=1e-11)
    y = GAMMA * (X - mean - delta) / np.sqrt(var + EPS) + BETA
    np.testing.assert_allclose(y, forward(X, correction), atol=1e-11)
    # The graph given the wrong mean gives the right gradients.
    spec = NormSpec("instance_norm", eps=EPS, correction=correction)
    model = graphs.build(spec, "backward", ("N", 1, "L"), "float64")
    got = run_onnx(
        model,
        {
            "dy": DY.reshape(1, 1, M),
            "x": X.reshape(1, 1, M),
            "gamma": np.array([GAMMA]),
            "mean": np.full((1, 1, 1), mean),
            "inv_std": np.full((1, 1, 1), inv_std(X, correction)),
        },
    )
    assert agrees(got["dx"].ravel(), correction)
    np.testing.assert_allclose(got["dgamma"], [DY @ x_hat(X, correction)], atol=1e-11)


def test_the_diagonal_jacobian_as_printed_is_wrong() -> None:
    """ "bacth normlization": dY_i/dX_i, taken as all of the Jacobian."""
    s = X.var() + EPS
    printed = GAMMA * (1 - M * s) / (M**2 * s**1.5) * (X - M)
    assert np.abs(DY * printed - true_dx()).max() > 0.5 * np.abs(true_dx()).max()
    # Not even its diagonal is right, nor a right diagonal alone.
    dense = GAMMA * inv_std(X) * (np.eye(M) - 1 / M - np.outer(x_hat(X), x_hat(X)) / M)
    assert np.abs(printed - np.diag(dense)).max() > 0.5
    assert np.abs(DY * np.diag(dense) - true_dx()).max() > 0.1


def test_the_dense_jacobian() -> None:
    hat = x_hat(X)
    jacobian = GAMMA * inv_std(X) * (np.eye(M) - 1 / M - np.outer(hat, hat) / M)
    columns = [central_differences(lambda x, j=j: float(forward(x)[j]), X) for j in range(M)]  # type: ignore[misc]
    np.testing.assert_allclose(jacobian, np.array(columns), atol=1e-8)
    assert agrees(jacobian.T @ DY)


def test_the_sum_over_m_minus_one_as_printed_is_wrong() -> None:
    """ "Deriving the BatchNorm Gradients": its last two lines, and the last read with index i."""
    s = X.var(ddof=1) + EPS
    x_mu, hat, root = X - X.mean(), x_hat(X, 1), s**-0.5
    through_var = GAMMA / (M - 1) * x_mu * s**-1.5 * np.sum(x_mu * DY)
    before_last = GAMMA * DY * root - GAMMA / M * s**0.5 * DY.sum() - through_var
    last = GAMMA * root * (DY - DY.mean() - hat / (M - 1) * np.sum(x_mu * DY))
    index_i = GAMMA * root * (DY - DY.mean() - hat / (M - 1) * np.sum(x_mu) * DY)
    for printed in (before_last, last, index_i):
        assert np.abs(printed - true_dx(1)).max() > 0.01
    # Put right, the line before the last is the gradient.
    assert agrees(GAMMA * DY * root - GAMMA / M * root * DY.sum() - through_var, correction=1)


def instance_inputs() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {
        "x": rng.normal(1.0, 2.0, (3, 4, 5, 6)),
        "dy": rng.normal(size=(3, 4, 5, 6)),
        "gamma": rng.uniform(0.5, 2.0, 4),
        "beta": rng.normal(size=4),
    }


def train(run_onnx: Any, spec: NormSpec, shape: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The outputs of forward, and those of backward behind them, in float64."""
    models = [graphs.build(spec, kind, shape, "float64") for kind in ("forward", "backward")]
    values = dict(given)
    for model in models:
        values |= run_onnx(model, {i.name: values[i.name] for i in model.graph.input})
    return values


def test_instance_norm_is_batch_norm_on_one_long_batch(run_onnx: Any) -> None:
    given = instance_inputs()
    n, c, h, w = given["x"].shape
    got = train(run_onnx, NormSpec("instance_norm"), (n, c, h, w), given)
    long = {
        **{name: given[name].reshape(1, n * c, h * w) for name in ("x", "dy")},
        **{name: np.tile(given[name], n) for name in ("gamma", "beta")},
    }
    spec = NormSpec("batch_norm", track_running_stats=False)
    want = train(run_onnx, spec, (1, n * c, h * w), long)
    for name in ("y", "dx"):
        np.testing.assert_allclose(got[name], want[name].reshape(n, c, h, w), atol=1e-14)
    for name in ("mean", "inv_std"):
        np.testing.assert_allclose(got[name].ravel(), want[name].ravel(), atol=1e-14)
    for name in ("dgamma", "dbeta"):
        np.testing.assert_allclose(got[name], want[name].reshape(n, c).sum(0), atol=1e-13)


def test_mxnets_backward_from_the_saved_variance(run_onnx: Any) -> None:
    """As MXNet's InstanceNorm has it, with its eps of 1e-3 and what it saves."""
    given, eps = instance_inputs(), 1e-3
    got = train(run_onnx, NormSpec("instance_norm", eps=eps), given["x"].shape, given)
    n, c, h, w = given["x"].shape
    rows = {name: given[name].reshape(n * c, h * w) for name in ("x", "dy")}
    data, gout = rows["x"], rows["dy"]
    gamma = np.tile(given["gamma"], n)[:, None]
    mean, var = data.mean(1, keepdims=True), data.var(1, keepdims=True)
    scale = 1 / (h * w)
    gvar = np.sum(gout * gamma * (data - mean) * -0.5 * (var + eps) ** -1.5, 1, keepdims=True)
    gmean = np.sum(gout * gamma, 1, keepdims=True) * -1 / np.sqrt(var + eps)
    gmean += scale * np.sum(-2 * (data - mean), 1, keepdims=True) * gvar
    gdata = gout * gamma / np.sqrt(var + eps) + gvar * scale * 2 * (data - mean) + gmean * scale
    ggamma = np.sum(gout * (data - mean) / np.sqrt(var + eps), 1).reshape(n, c).sum(0)
    np.testing.assert_allclose(got["dx"].reshape(n * c, -1), gdata, atol=1e-13)
    np.testing.assert_allclose(got["dgamma"], ggamma, atol=1e-12)
    np.testing.assert_allclose(got["dbeta"], given["dy"].sum((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(got["inv_std"].ravel(), (var + eps).ravel() ** -0.5, atol=1e-13)


def test_the_numpy_check_against_pytorch(run_onnx: Any) -> None:
    """(N, C, H, W) = (4, 2, 32, 32), gamma 1, float32, atol 1e-5, as its author ran it."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shape = (4, 2, 32, 32)
    x = rng.random(shape).astype(np.float32)
    dy = rng.random(shape).astype(np.float32)
    gamma, beta = np.ones(2, np.float32), np.zeros(2, np.float32)
    spec = NormSpec("instance_norm", eps=1e-5)
    made = run_onnx(graphs.build(spec, "forward", shape), {"x": x, "gamma": gamma, "beta": beta})
    saved = {n: made[n] for n in ("mean", "inv_std")}
    got = run_onnx(
        graphs.build(spec, "backward", shape), {"dy": dy, "x": x, "gamma": gamma, **saved}
    )
    leaf = torch.tensor(x, requires_grad=True)
    module = torch.nn.InstanceNorm2d(2, affine=True, eps=1e-5)
    y = module(leaf)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(made["y"], y.detach().numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["dx"], leaf.grad.numpy(), atol=1e-5, rtol=0)
    # These two are sums of 4096 terms; the largest is of order 1e3.
    np.testing.assert_allclose(got["dgamma"], module.weight.grad.numpy(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got["dbeta"], module.bias.grad.numpy(), atol=1e-5, rtol=1e-5)


def test_pytorch_running_statistics() -> None:
    """The mean over n of each row's mean and of its variance over m - 1; momentum on the new."""
    torch = pytest.importorskip("torch")
    x = instance_inputs()["x"]
    module = torch.nn.InstanceNorm2d(4, track_running_stats=True, momentum=0.3).double()
    y = module(torch.tensor(x)).numpy()
    mean, var = x.mean((2, 3)), x.var((2, 3), ddof=1)
    np.testing.assert_allclose(module.running_mean.numpy(), 0.3 * mean.mean(0), atol=1e-14)
    np.testing.assert_allclose(module.running_var.numpy(), 0.7 + 0.3 * var.mean(0), atol=1e-14)
    biased = (x - mean[..., None, None]) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, biased, atol=1e-13)
