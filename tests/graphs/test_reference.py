"""The reference against torch in float64, central differences and values worked by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.errors import ArgumentError, SpecError
from normgraph.graphs import kinds, reference

run = reference.run


def leaves(case: Any, seed: int = 0) -> dict[str, Any]:
    """x and dy, and those of gamma and beta that the spec has."""
    rng = np.random.default_rng(seed)
    spec = case.spec
    made = {"x": rng.normal(0.5, 2.0, case.shape), "dy": rng.normal(size=case.shape)}
    if spec.weight:
        made["gamma"] = rng.uniform(0.5, 2.0, case.param_shape)
    if spec.bias:
        made["beta"] = rng.normal(size=case.param_shape)
    return made


def forward(case: Any, given: dict[str, Any]) -> dict[str, Any]:
    inputs = {k: v for k, v in given.items() if k != "dy"}
    if case.spec.track_running_stats:
        inputs["running_mean"] = np.zeros(case.shape[1])
        inputs["running_var"] = np.ones(case.shape[1])
    return run(case.spec, "forward", inputs)


def backward(case: Any, given: dict[str, Any], kind: str = "backward") -> dict[str, Any]:
    saved = {**forward(case, given), **given}
    names = ["dy", "x" if kind == "backward" else "y", "gamma", "inv_std"]
    names.append("mean" if kind == "backward" else "beta")
    return run(case.spec, kind, {n: saved[n] for n in names if n in saved})


def torch_norm(case: Any, x: Any, gamma: Any, beta: Any) -> Any:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    spec = case.spec
    if spec.correction:  # torch's own operators have the biased variance only
        axes = {"batch_norm": (0, 2), "instance_norm": (2, 3), "group_norm": (2, 3)}
        split = x.reshape(*case.shape[:1], spec.groups, -1, case.shape[2]) if spec.groups else x
        var, mean = torch.var_mean(split, axes.get(spec.op, -1), correction=1, keepdim=True)
        x_hat = ((split - mean) / torch.sqrt(var + spec.eps)).reshape(x.shape)
        tail = () if case.channels_last else (1,) * (x.ndim - 2)
        return x_hat * gamma.reshape(-1, *tail) + beta.reshape(-1, *tail)
    if spec.op == "batch_norm":
        return functional.batch_norm(x, None, None, gamma, beta, True, 0.0, spec.eps)
    if spec.op == "instance_norm":
        return functional.instance_norm(x, weight=gamma, bias=beta, eps=spec.eps)
    if spec.op == "group_norm":
        return functional.group_norm(x, spec.groups, gamma, beta, spec.eps)
    if spec.op == "layer_norm":
        return functional.layer_norm(x, case.param_shape, gamma, beta, spec.eps)
    return functional.rms_norm(x, case.param_shape, gamma, spec.eps)


def test_against_torch(case: Any) -> None:
    torch = pytest.importorskip("torch")
    given = leaves(case)
    x, dy = torch.tensor(given["x"], requires_grad=True), torch.tensor(given["dy"])
    # torch's group norm wants both parameters or neither.
    gamma = torch.tensor(given.get("gamma", np.ones(case.param_shape)), requires_grad=True)
    beta = torch.tensor(given.get("beta", np.zeros(case.param_shape)), requires_grad=True)
    y = torch_norm(case, x, gamma, beta)
    y.backward(dy)
    np.testing.assert_allclose(forward(case, given)["y"], y.detach().numpy(), atol=1e-13)
    grads = {"dx": x.grad, "dgamma": gamma.grad, "dbeta": beta.grad}
    for kind in ("backward", "backward_from_output"):
        for name, value in backward(case, given, kind).items():
            np.testing.assert_allclose(value, grads[name].numpy(), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["backward", "backward_from_output"])
def test_against_central_differences(case: Any, kind: str) -> None:
    given = leaves(case, seed=1)
    got = backward(case, given, kind)
    rng = np.random.default_rng(2)
    step = 1e-5
    for name, value in got.items():
        leaf = name[1:]
        for _ in range(3):
            direction = rng.normal(size=given[leaf].shape)
            losses = [
                np.sum(
                    forward(case, {**given, leaf: given[leaf] + s * direction})["y"] * given["dy"]
                )
                for s in (step, -step)
            ]
            slope = (losses[0] - losses[1]) / (2 * step)
            scale = np.linalg.norm(value) * np.linalg.norm(direction)
            assert abs(np.sum(value * direction) - slope) <= 1e-8 * scale + 1e-9, name


def test_dvar_and_dmean_against_central_differences(case: Any) -> None:
    """dL/dvar with mean and x held, dL/dmean with x held: what the two names stand for."""
    given = leaves(case, seed=3)
    saved = forward(case, given)
    names = ("dy", "x", "gamma", "mean", "inv_std")
    inputs = {n: {**saved, **given}[n] for n in names if n in saved or n in given}
    got = run(case.spec, "backward", inputs, debug=True)
    spec = case.spec
    # Expand each slice's statistic over x by differences of a loss that takes them as given.
    x = (
        given["x"]
        if spec.groups is None
        else given["x"].reshape(case.shape[0], spec.groups, -1, *case.shape[2:])
    )
    dy = given["dy"].reshape(x.shape)
    gamma: Any = given.get("gamma", np.ones(case.param_shape))
    if spec.groups is not None:
        gamma = gamma.reshape(1, spec.groups, -1, *(1,) * (x.ndim - 3))
    elif not case.channels_last:
        gamma = gamma.reshape(1, -1, *(1,) * (x.ndim - 2))
    var0 = 1 / saved["inv_std"] ** 2 - spec.resolve("float64").eps
    mean0 = saved.get("mean", np.zeros_like(var0))
    stats = tuple(a for a in range(x.ndim) if var0.shape[a] == 1)
    m = int(np.prod([x.shape[a] for a in stats]))

    def loss(mean: Any, var: Any) -> Any:
        y = gamma * (x - mean) / np.sqrt(var + spec.resolve("float64").eps)
        return np.sum(dy * y, axis=stats, keepdims=True)

    def var_of(mean: Any) -> Any:
        return np.sum((x - mean) ** 2, axis=stats, keepdims=True) / (m - spec.correction)

    step = 1e-5
    dvar = (loss(mean0, var0 + step) - loss(mean0, var0 - step)) / (2 * step)
    np.testing.assert_allclose(got["dvar"], dvar, atol=1e-8 * max(1, np.abs(dvar).max()))
    if "dmean" in got:
        up, down = mean0 + step, mean0 - step
        dmean = (loss(up, var_of(up)) - loss(down, var_of(down))) / (2 * step)
        np.testing.assert_allclose(got["dmean"], dmean, atol=1e-8 * max(1, np.abs(dmean).max()))


def test_a_row_worked_by_hand() -> None:
    """x = 1, 3: mean 2, var 1, with eps 3 inv_std 1/2."""
    spec = NormSpec("layer_norm", eps=3.0)
    x, gamma, beta = np.array([[1.0, 3.0]]), np.array([2.0, 4.0]), np.array([10.0, 20.0])
    made = run(spec, "forward", {"x": x, "gamma": gamma, "beta": beta})
    np.testing.assert_array_equal(made["y"], [[9.0, 22.0]])
    np.testing.assert_array_equal(made["mean"], [[2.0]])
    np.testing.assert_array_equal(made["inv_std"], [[0.5]])
    # g = (2, 0): dvar = -1/2 / 8 * (-2) = 1/8, dmean = -1, dx = (1, 0) + (-1, 1)/8 - 1/2.
    inputs = {"dy": np.array([[1.0, 0.0]]), "x": x, "gamma": gamma}
    inputs |= {"mean": made["mean"], "inv_std": made["inv_std"]}
    got = run(spec, "backward", inputs, debug=True)
    np.testing.assert_array_equal(got["dvar"], [[0.125]])
    np.testing.assert_array_equal(got["dmean"], [[-1.0]])
    np.testing.assert_array_equal(got["dx"], [[0.375, -0.375]])
    np.testing.assert_array_equal(got["dgamma"], [-0.5, 0.0])
    np.testing.assert_array_equal(got["dbeta"], [1.0, 0.0])


def test_the_same_row_over_m_minus_one() -> None:
    """Over m - 1 the variance is 2: with eps 2 inv_std is 1/2 again."""
    spec = NormSpec("layer_norm", eps=2.0, correction=1, weight=False, bias=False)
    x = np.array([[1.0, 3.0]])
    made = run(spec, "forward", {"x": x})
    np.testing.assert_array_equal(made["y"], [[-0.5, 0.5]])
    # dvar = -1/2 / 8 * (-1) = 1/16, dmean = -1/2, dx = (1/2, 0) + 2/16 * (-1, 1) - 1/4.
    inputs = {"dy": np.array([[1.0, 0.0]]), "x": x, **{n: made[n] for n in ("mean", "inv_std")}}
    np.testing.assert_array_equal(run(spec, "backward", inputs)["dx"], [[0.125, -0.125]])


def test_a_root_mean_square_worked_by_hand() -> None:
    """x = 1, 7: mean square 25, with eps 0 inv_std 1/5."""
    spec = NormSpec("rms_norm", eps=0.0)
    x, gamma = np.array([[1.0, 7.0]]), np.array([5.0, 10.0])
    made = run(spec, "forward", {"x": x, "gamma": gamma})
    np.testing.assert_allclose(made["y"], [[1.0, 14.0]], rtol=1e-15)
    # g = (5, 0): dvar = -1/2 / 125 * 5 = -1/50, dx = (1, 0) - 2/50 * (1, 7) / 2.
    inputs = {"dy": np.array([[1.0, 0.0]]), "x": x, "gamma": gamma, "inv_std": made["inv_std"]}
    np.testing.assert_allclose(run(spec, "backward", inputs)["dx"], [[0.98, -0.14]], rtol=1e-15)


def test_half_types_are_read_exactly() -> None:
    x = np.array([[1.0, 2.5, -3.0]])
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        made = run(NormSpec("rms_norm", weight=False), "forward", {"x": x.astype(dtype)})
        assert {v.dtype for v in made.values()} == {np.dtype(np.float64)}
        np.testing.assert_array_equal(
            made["y"], run(NormSpec("rms_norm", weight=False), "forward", {"x": x})["y"]
        )


def test_eps_none_is_that_of_the_compute_type() -> None:
    spec = NormSpec("rms_norm", eps=None, weight=False)
    for dtype, eps in ((ml_dtypes.bfloat16, 2.0**-23), (np.float32, 2.0**-23), (float, 2.0**-52)):
        made = run(spec, "forward", {"x": np.zeros((1, 4), dtype)})
        assert made["inv_std"].item() == pytest.approx(eps**-0.5, rel=1e-15)


def test_missing_and_surplus_inputs_are_named() -> None:
    spec = NormSpec("rms_norm")
    x = np.ones((2, 3))
    with pytest.raises(ArgumentError, match=r"forward: expected the inputs x, gamma; got x$"):
        run(spec, "forward", {"x": x})
    with pytest.raises(ArgumentError, match=r"got x, gamma, beta$"):
        run(spec, "forward", {"x": x, "gamma": x[0], "beta": x[0]})
    with pytest.raises(SpecError, match="kind: expected one of"):
        run(spec, "backwards", {"x": x})


@pytest.mark.parametrize("axis", range(5))
def test_any_dim_may_be_empty(case: Any, axis: int) -> None:
    if axis >= len(case.shape) or (not case.channels_last and axis == 1):
        return
    shape = tuple(0 if a == axis else d for a, d in enumerate(case.shape))
    empty = type(case)(case.op, shape, shape, case.options)
    given = leaves(empty)
    assert forward(empty, given)["y"].shape == shape
    for kind in kinds(empty.spec)[2:]:
        if kind == "backward_frozen":
            continue
        got = backward(empty, given, kind)
        assert got["dx"].shape == shape
        assert all(not v.any() for v in got.values())
