"""Rows of docs/reliability.md: the arrays of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import normgraph as ng
from normgraph.errors import ArgumentError, ArgumentTypeError

Array = NDArray[Any]
Row = Callable[[object], None]


def placed(array: Array, offset: int) -> Array:
    """A copy that begins `offset` bytes behind a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def copied(norm: Any, x: Any, values: Any = None, like: Any = np.asarray) -> str:
    """x gives the right results, and is refused where it may not be copied."""
    norm.check(x, values, like)
    with pytest.raises(ArgumentError, match="copy=False"):
        norm.op.forward(x, like(norm.gamma), like(norm.beta), copy=False)
    return "right, from a copy"


def test_off_a_cache_line(norm: Any, row: Row) -> None:
    """memory that begins 4 bytes behind a multiple of 64"""
    x = placed(norm.x(), 4)
    norm.check(x, copy=False)
    for offset in range(4, 64, 4):
        y = placed(np.zeros_like(x), offset)
        norm.op.forward(x, placed(norm.gamma, offset), placed(norm.beta, 8), out={"y": y})
        np.testing.assert_allclose(y, norm.answers(x, x)["y"], atol=1e-4)
    row("right")


def test_off_an_element(norm: Any, row: Row) -> None:
    """memory that begins 1 byte behind a multiple of 64"""
    row(copied(norm, placed(norm.x(), 1)))


def test_strided(norm: Any, row: Row) -> None:
    """every second element of an array"""
    wide = np.zeros((3, 8, 74), np.float32)
    wide[..., ::2] = norm.x()
    row(copied(norm, wide[..., ::2]))


def test_transposed(norm: Any, row: Row) -> None:
    """an array in column-major order"""
    row(copied(norm, np.asfortranarray(norm.x())))


def test_reversed(norm: Any, row: Row) -> None:
    """a negative stride: x[:, :, ::-1]"""
    row(copied(norm, norm.x()[:, :, ::-1]))


def test_broadcast(norm: Any, row: Row) -> None:
    """an array broadcast from one row (a stride of 0, read-only)"""
    row(copied(norm, np.broadcast_to(norm.x()[:1, :1], (3, 8, 37))))


def test_read_only_input(norm: Any, row: Row, tmp_path: Any) -> None:
    """a read-only input, such as a file mapped into memory"""
    np.save(tmp_path / "x.npy", norm.x())
    norm.check(np.load(tmp_path / "x.npy", mmap_mode="r"), copy=False)
    row("right")


def test_read_only_output(norm: Any, row: Row) -> None:
    """a read-only array to write to"""
    y = np.zeros_like(norm.x())
    y.flags.writeable = False
    with pytest.raises(ArgumentError) as caught:
        norm.op.forward(norm.x(), norm.gamma, norm.beta, out={"y": y})
    assert not y.any()
    row(caught.value)


def test_big_endian(norm: Any, row: Row) -> None:
    """big-endian values"""
    with pytest.raises(ArgumentTypeError) as caught:
        norm.op.forward(norm.x().astype(">f4"), norm.gamma, norm.beta)
    row(caught.value)


def test_masked(norm: Any, row: Row) -> None:
    """a masked array"""
    with pytest.raises(ArgumentTypeError) as caught:
        norm.op.forward(np.ma.masked_greater(norm.x(), 2), norm.gamma, norm.beta)
    row(caught.value)


def test_bfloat16(build_operator: Callable[..., Any], norm_of: Any, row: Row) -> None:
    """bfloat16 in a NumPy array"""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    spec = ng.NormSpec("instance_norm", param_dtype="float32")
    norm = norm_of(build_operator(spec, ("N", 8, "L"), "bfloat16", kinds=("forward",)))
    x = norm.x().astype(bfloat16)
    y, mean, inv_std = norm.op.forward(x, norm.gamma, norm.beta)
    answers = norm.answers(x, x)
    assert y.dtype == bfloat16
    np.testing.assert_allclose(y.astype(np.float64), answers["y"], rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(mean, answers["mean"], atol=1e-4)
    np.testing.assert_allclose(inv_std, answers["inv_std"], rtol=1e-4)
    row("right")


def test_wrong_dtype(norm: Any, row: Row) -> None:
    """float64 for float32"""
    with pytest.raises(ArgumentTypeError) as caught:
        norm.op.forward(norm.x().astype(np.float64), norm.gamma, norm.beta)
    row(caught.value)


def test_wrong_extent(norm: Any, row: Row) -> None:
    """nine channels for eight"""
    x = norm.x()
    with pytest.raises(ArgumentError) as caught:
        norm.op.forward(np.concatenate([x, x[:, :1]], axis=1), norm.gamma, norm.beta)
    row(caught.value)


def nothing(norm: Any, n: int, length: int) -> str:
    x, statistic = np.zeros((n, 8, length), np.float32), np.zeros((n, 8, 1), np.float32)
    y, mean, inv_std = norm.op.forward(x, norm.gamma, norm.beta)
    dx, dgamma, dbeta = norm.op.backward(x, x, norm.gamma, mean, inv_std)
    assert y.shape == dx.shape == x.shape
    assert mean.shape == inv_std.shape == statistic.shape
    assert not dgamma.any()
    assert not dbeta.any()
    return "right"


def test_no_batch(norm: Any, row: Row) -> None:
    """an empty batch: (0, 8, L)"""
    row(nothing(norm, 0, 37))


def test_no_length(norm: Any, row: Row) -> None:
    """rows without elements: (N, 8, 0)"""
    row(nothing(norm, 3, 0))


def test_one_value(norm: Any, row: Row) -> None:
    """one value per statistic: (N, 8, 1)"""
    with pytest.raises(ArgumentError) as caught:
        norm.op.forward(norm.x(length=1), norm.gamma, norm.beta)
    row(caught.value)


def test_overlap(norm: Any, row: Row) -> None:
    """an output that overlaps an input"""
    block = norm.x(4)
    before = block.copy()
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            norm.op.forward(block[:3], norm.gamma, norm.beta, out={"y": block[1:]})
        np.testing.assert_array_equal(block, before)
        norm.check(norm.x(3))
    row(caught.value)


def test_negated(norm: Any, row: Row) -> None:
    """a tensor that PyTorch negates or conjugates lazily"""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(norm.x())
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    row(copied(norm, view, norm.x(), torch.from_numpy))


def test_requires_grad(norm: Any, row: Row) -> None:
    """a tensor that requires grad"""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(norm.x()).requires_grad_()
    with pytest.raises(ArgumentError) as caught:
        norm.op.forward(x, torch.from_numpy(norm.gamma), torch.from_numpy(norm.beta))
    row(caught.value)


def test_saved_tensor(norm: Any, row: Row) -> None:
    """writing to a tensor that autograd has saved; what its backward pass does then"""
    torch = pytest.importorskip("torch")
    x, y = torch.from_numpy(norm.x()), torch.full((3, 8, 37), 5.0)
    weight = torch.ones_like(x, requires_grad=True)
    total = (weight * y).sum()
    norm.op.forward(x, *map(torch.from_numpy, (norm.gamma, norm.beta)), out={"y": y})
    with pytest.raises(RuntimeError) as caught:
        total.backward()
    row(caught.value)


def test_wrong_device(norm: Any, row: Row) -> None:
    """a tensor on another device (meta)"""
    torch = pytest.importorskip("torch")
    x = torch.empty((3, 8, 37), device="meta")
    with pytest.raises(ArgumentError) as caught:
        norm.op.forward(x, torch.from_numpy(norm.gamma), torch.from_numpy(norm.beta))
    row(caught.value)
