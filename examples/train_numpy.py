"""Train a small network on handwritten digits with NumPy and one compiled BatchNorm. No framework.

    pixels (N, 64) -> linear (128) -> BatchNorm -> ReLU -> linear (10) -> cross entropy

The digits are the 1797 pictures of 8 x 8 pixels that come with scikit-learn. Matrix products are
NumPy's; BatchNorm forward (with its running statistics), backward and inference are the compiled
kernels; the rest of the backward and plain SGD are written out below.

    python examples/train_numpy.py

Needs normgraph[compile] and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph as ng

Array = NDArray[Any]

HIDDEN, CLASSES, BATCH, RATE = 128, 10, 64, 0.2


@dataclass
class Digits:
    """Pixels from 0 to 1, (rows, 64) float32, and labels, (rows,) int64; 1437 rows to learn."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def load_digits() -> Digits:
    """The digits in a fixed random order, split 4 to 1."""
    from sklearn.datasets import load_digits as load

    data = load()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.data[order] / 16.0).astype(np.float32)
    y = data.target[order].astype(np.int64)
    cut = len(y) * 4 // 5
    return Digits(x[:cut], y[:cut], x[cut:], y[cut:])


def start(seed: int = 0) -> dict[str, Array]:
    """The first parameters and the first running statistics."""
    random = np.random.default_rng(seed)

    def weights(rows: int, columns: int) -> Array:
        values: Array = random.standard_normal((rows, columns)) * np.sqrt(2.0 / rows)
        return values.astype(np.float32)

    return {
        "w1": weights(64, HIDDEN),
        "gamma": np.ones(HIDDEN, np.float32),
        "beta": np.zeros(HIDDEN, np.float32),
        "w2": weights(HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
        "running_mean": np.zeros(HIDDEN, np.float32),
        "running_var": np.ones(HIDDEN, np.float32),
    }


def batches(data: Digits, epochs: int) -> Iterator[tuple[Array, Array]]:
    """The training rows in a new order each epoch; the last, smaller batch is left out."""
    random = np.random.default_rng(1)
    for _ in range(epochs):
        order = random.permutation(len(data.train_y))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            yield data.train_x[rows], data.train_y[rows]


def step(norm: Any, p: dict[str, Array], x: Array, labels: Array) -> float:
    """One step of SGD; the parameters and running statistics in `p` are updated. The loss."""
    hidden = x @ p["w1"]
    # The running statistics are their own output: updated in place.
    running = {"new_running_mean": p["running_mean"], "new_running_var": p["running_var"]}
    found = norm.forward(
        hidden, p["gamma"], p["beta"], p["running_mean"], p["running_var"], out=running
    )
    active = np.maximum(found.y, 0.0)
    loss, dlogits = cross_entropy(active @ p["w2"] + p["b2"], labels)

    dactive = dlogits @ p["w2"].T
    dnorm = np.where(found.y > 0.0, dactive, np.float32(0.0))
    dhidden, dgamma, dbeta = norm.backward(dnorm, hidden, p["gamma"], found.mean, found.inv_std)
    gradients = {
        "w1": x.T @ dhidden,
        "gamma": dgamma,
        "beta": dbeta,
        "w2": active.T @ dlogits,
        "b2": dlogits.sum(axis=0),
    }
    for name, gradient in gradients.items():
        p[name] -= np.float32(RATE) * gradient
    return loss


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean of -log softmax(logits)[label], and its gradient."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    total = powers.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    gradient = powers / total
    gradient[rows, labels] -= 1.0
    return loss, gradient / np.float32(len(labels))


def accuracy(norm: Any, p: dict[str, Array], x: Array, labels: Array) -> float:
    """The share of right answers, BatchNorm with its running statistics."""
    hidden = x @ p["w1"]
    y = norm.inference(hidden, p["gamma"], p["beta"], p["running_mean"], p["running_var"])
    logits = np.maximum(y, 0.0) @ p["w2"] + p["b2"]
    return float(np.mean(logits.argmax(axis=1) == labels))


def build_norm(out: Path | str | None = None) -> Any:
    """BatchNorm over a batch of any size, compiled for this machine."""
    spec = ng.NormSpec("batch_norm")
    kinds = ("forward", "inference", "backward")
    return ng.build(spec, shape=("N", HIDDEN), dtype="float32", kinds=kinds, out=out)


def main() -> None:
    """Train for eight epochs and print the loss as it falls."""
    data, p, norm = load_digits(), start(), build_norm()
    epochs = 8
    losses = [step(norm, p, x, labels) for x, labels in batches(data, epochs)]
    for epoch, mean in enumerate(np.array(losses).reshape(epochs, -1).mean(axis=1), 1):
        print(f"epoch {epoch}: loss {mean:.4f}")
    print(f"accuracy on digits not seen: {accuracy(norm, p, data.test_x, data.test_y):.1%}")


if __name__ == "__main__":
    main()
