"""The training example learns the digits, on the curve PyTorch takes from the same start."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]

EPOCHS = 4


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "train_numpy.py"
    spec = importlib.util.spec_from_file_location("train_numpy_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four epochs of the example: its losses, its last parameters and its accuracy."""
    norm = example.build_norm(tmp_path_factory.mktemp("norm") / "artifact")
    data, parameters = example.load_digits(), example.start()
    losses = [
        example.step(norm, parameters, x, labels) for x, labels in example.batches(data, EPOCHS)
    ]
    accuracy = example.accuracy(norm, parameters, data.test_x, data.test_y)
    return {"losses": losses, "parameters": parameters, "accuracy": accuracy, "data": data}


def test_the_loss_falls_and_the_digits_are_read(trained: dict[str, Any]) -> None:
    losses = trained["losses"]
    assert losses[0] > 1.5
    assert np.mean(losses[-20:]) < 0.25
    assert trained["accuracy"] > 0.95


def test_losses_and_running_statistics_follow_pytorch(
    example: ModuleType, trained: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    first = {name: torch.from_numpy(array.copy()) for name, array in example.start().items()}
    norm = torch.nn.BatchNorm1d(example.HIDDEN)
    trained_names = ("w1", "w2", "b2")
    leaves = [first[name].requires_grad_() for name in trained_names]
    optimiser = torch.optim.SGD([*leaves, *norm.parameters()], lr=example.RATE)
    losses = []
    for x, labels in example.batches(trained["data"], EPOCHS):
        active = torch.relu(norm(torch.from_numpy(x) @ first["w1"]))
        logits = active @ first["w2"] + first["b2"]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # Two float32 programs part slowly: each step adds roundings and multiplies what came before.
    np.testing.assert_allclose(trained["losses"][:20], losses[:20], rtol=2e-5)
    np.testing.assert_allclose(trained["losses"], losses, rtol=5e-3, atol=1e-4)
    mine = trained["parameters"]
    for name, theirs in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
        np.testing.assert_allclose(mine[name], theirs.numpy(), rtol=2e-3, atol=2e-3)
    norm.eval()
    with torch.no_grad():
        active = torch.relu(norm(torch.from_numpy(trained["data"].test_x) @ first["w1"]))
        answers = (active @ first["w2"] + first["b2"]).argmax(1).numpy()
    right = float(np.mean(answers == trained["data"].test_y))
    assert abs(trained["accuracy"] - right) <= 2 / len(answers)
