"""The kernels against PyTorch: float64 autograd, and PyTorch's running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.scripts.verify_inputs import Case, Inputs

Array = NDArray[Any]
torch = pytest.importorskip("torch")


def _torch_forward(spec: NormSpec, v: dict[str, Any], training: bool) -> Any:
    functional = torch.nn.functional
    x, gamma, beta = v["x"], v.get("gamma"), v.get("beta")
    if spec.op == "batch_norm":
        return functional.batch_norm(
            x, v["running_mean"], v["running_var"], gamma, beta, training, 0.1, spec.eps
        )
    if spec.op == "instance_norm":
        return functional.instance_norm(
            x, v["running_mean"], v["running_var"], gamma, beta, training, 0.1, spec.eps
        )
    if spec.op == "group_norm":
        return functional.group_norm(x, spec.groups, gamma, beta, spec.eps)
    if spec.op == "layer_norm":
        return functional.layer_norm(x, (37,), gamma, beta, spec.eps)
    return functional.rms_norm(x, (37,), gamma, spec.eps)


def _wide(values: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(array.astype(np.float64)) for name, array in values.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_outputs_and_gradients_are_those_of_float64_autograd(
    op: str,
    training: bool,
    dtype: str,
    build_row: Callable[..., Any],
    call: Callable[..., Any],
    names: Callable[..., Any],
    within: Callable[..., None],
) -> None:
    operator = build_row(op, dtype)
    spec = operator.spec
    forward, backward = ("forward", "backward") if training else ("inference", "backward_frozen")
    for mean in (0.0, 100.0):
        size = (3, 6, 11, 13) if len(operator.shape) == 4 else (3, 7, 37)
        inputs = Inputs(operator.spec, dtype, Case(size, mean), seed=7)
        values = _wide(inputs.values)
        sources = [name for name in ("x", "gamma", "beta") if op != "rms_norm" or name != "beta"]
        for name in sources:
            values[name].requires_grad_()
        y = _torch_forward(spec, values, training)
        exact = torch.autograd.grad(y, [values[name] for name in sources], values["dy"])
        want = {"y": y.detach().numpy()}
        want |= {f"d{name}": each.numpy() for name, each in zip(sources, exact, strict=True)}
        for kind in (forward, backward):
            if kind not in operator.kinds:
                assert kind == "backward_frozen"
                assert not spec.track_running_stats
                continue
            given = inputs.take(names(operator, kind))
            for name, got in call(operator, kind, given).items():
                if name in want:
                    where = f"{op} {dtype} {kind} {name} mean {mean:g}"
                    within(got, want[name], dtype, mean, where)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics_after_three_batches(op: str, build_row: Callable[..., Any]) -> None:
    operator = build_row(op)
    random = np.random.default_rng(11)
    mine = [np.zeros(6, np.float32), np.ones(6, np.float32)]
    theirs = {"running_mean": torch.zeros(6).double(), "running_var": torch.ones(6).double()}
    gamma, beta = np.ones(6, np.float32), np.zeros(6, np.float32)
    for batch in (3, 1, 5):
        x = (random.standard_normal((batch, 6, 5, 7)) * 3 + 2).astype(np.float32)
        found = operator.forward(x, gamma, beta, *mine)
        mine = [found.new_running_mean, found.new_running_var]
        _torch_forward(operator.spec, {"x": torch.from_numpy(x).double(), **theirs}, training=True)
    for got, want in zip(mine, theirs.values(), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-6, atol=1e-7)


def test_momentum_as_an_input_gives_the_cumulative_average(
    build_operator: Callable[..., Any],
) -> None:
    """PyTorch's momentum=None weights batch k by 1/k."""
    operator = build_operator(NormSpec("batch_norm", momentum=None), ("N", 6), kinds=("forward",))
    module = torch.nn.BatchNorm1d(6, momentum=None)
    random = np.random.default_rng(13)
    mine = [np.zeros(6, np.float32), np.ones(6, np.float32)]
    gamma, beta = np.ones(6, np.float32), np.zeros(6, np.float32)
    for count in (1, 2, 3):
        x = random.standard_normal((9, 6)).astype(np.float32)
        momentum = np.asarray(1.0 / count, np.float32)
        found = operator.forward(x, gamma, beta, *mine, momentum)
        mine = [found.new_running_mean, found.new_running_var]
        module(torch.from_numpy(x))
    np.testing.assert_allclose(mine[0], module.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine[1], module.running_var.numpy(), rtol=1e-5, atol=1e-6)
