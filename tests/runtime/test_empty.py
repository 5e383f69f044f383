"""An input without elements is answered without the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize(("n", "length"), [(0, 5), (2, 0), (0, 0), (0, 2)])
def test_forward(op: Any, toy: Any, n: int, length: int) -> None:
    x = np.ones((n, 3, length), np.float32)
    _, gamma, beta, mean, var, momentum = toy.inputs("forward")
    for _ in range(2):
        result = op.forward(x, gamma, beta, mean, var, momentum)
        assert result.y.shape == (n, 3, length)
        assert result.mean.shape == result.inv_std.shape == (n, 3, 1)
        np.testing.assert_array_equal(result.mean, 0)
        np.testing.assert_allclose(result.inv_std, 1 / np.sqrt(op.spec.eps), rtol=1e-6)
        np.testing.assert_array_equal(result.new_running_mean, mean)
        np.testing.assert_array_equal(result.new_running_var, var)
        assert result.new_running_mean is not mean


def test_forward_in_place_and_added(op: Any, toy: Any) -> None:
    x, gamma, beta, mean, var, momentum = toy.inputs("forward")
    kept = mean.copy()
    held = np.full((2, 3, 1), 5, np.float32)
    more = np.full((2, 3, 1), 5, np.float32)
    total = np.ones(3, np.float32)
    out = {"new_running_mean": mean, "new_running_var": total, "mean": held, "inv_std": more}
    result = op.forward(
        x[:, :, :0],
        gamma,
        beta,
        mean,
        var,
        momentum,
        out=out,
        grad_req={"new_running_var": "add", "mean": "add", "inv_std": "add"},
    )
    assert result.new_running_mean is mean
    np.testing.assert_array_equal(mean, kept)
    np.testing.assert_array_equal(total, 1 + var)
    np.testing.assert_array_equal(held, 5)
    np.testing.assert_allclose(more, 5 + 1 / np.sqrt(op.spec.eps), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_backward(toy: Any, dtype: str) -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    op = toy.operator(dtype)
    dy, x, gamma, mean, inv_std = toy.inputs("backward", dtype=kind)
    acc = np.full(3, 7, kind)
    result = op.backward(
        dy[:0],
        x[:0],
        gamma,
        mean[:0],
        inv_std[:0],
        out={"dgamma": acc},
        grad_req={"dgamma": "add"},
    )
    assert result.dx.shape == (0, 3, 5)
    assert result.dx.dtype == kind
    np.testing.assert_array_equal(result.dgamma.astype(np.float32), 7)
    np.testing.assert_array_equal(result.dbeta.astype(np.float32), 0)


def test_inference_and_want(op: Any, toy: Any) -> None:
    x, *rest = toy.inputs("inference")
    y = np.empty((2, 3, 0), np.float32)
    assert op.inference(x[:, :, :0], *rest, out={"y": y}) is y
    dy, x, gamma, mean, inv_std = toy.inputs("backward")
    dbeta = op.backward(dy[:, :, :0], x[:, :, :0], gamma, mean, inv_std, want="dbeta")
    np.testing.assert_array_equal(dbeta, np.zeros(3))
