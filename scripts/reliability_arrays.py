"""The cases of reliability.py that are about the arrays of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NOT_THERE = "-"  # the peer has nothing of the kind


def plain(n: int = 4, length: int = 1000) -> Array:
    return np.random.default_rng(0).normal(2, 1, (n, 8, length)).astype(np.float32)


def answer(x: Any) -> Array:
    wide = np.asarray(x, np.float64)
    mean = wide.mean(2, keepdims=True)
    return np.asarray((wide - mean) / np.sqrt(wide.var(2, keepdims=True) + 1e-5))


def placed(array: Array, offset: int) -> Array:
    """A copy that begins `offset` bytes behind a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def judged(y: Any, expected: Array) -> str:
    y = np.asarray(y)
    if y.shape != expected.shape:
        return f"an array of shape {y.shape}"
    return "right" if np.allclose(y, expected, atol=1e-3) else "wrong, without an error"


def forward(peer: Any, x: Any, expected: Array) -> str:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = judged(peer.forward(x), expected)
    return result + (", with a warning" if said else "")


def _given(change: Callable[[Array], Any]) -> Callable[[str, Any], str]:
    """x changed in how it lies in memory, but not in value."""

    def run(name: str, peer: Any) -> str:
        x = placed(plain(), 0)
        changed = change(x)
        return forward(peer, changed, answer(np.asarray(changed, np.float32)))

    return run


def _strided(x: Array) -> Array:
    wide = placed(np.zeros((*x.shape[:2], 2 * x.shape[2]), np.float32), 0)
    wide[..., ::2] = x
    return wide[..., ::2]


def _read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


def _masked(name: str, peer: Any) -> str:
    x = np.ma.masked_array(placed(plain(), 0), mask=False)
    x[:, :, :500] = np.ma.masked
    y = np.asarray(peer.forward(x))
    return "the mask is ignored" if np.allclose(y, answer(x.data), atol=1e-3) else "uses the mask"


def _bfloat16(name: str, peer: Any) -> str:
    import ml_dtypes

    return forward(peer, plain().astype(ml_dtypes.bfloat16), answer(plain()))


def _double(name: str, peer: Any) -> str:
    return forward(peer, plain().astype(np.float64), answer(plain()))


def _nine_channels(name: str, peer: Any) -> str:
    x = np.concatenate([plain(), plain()[:, :1]], axis=1)
    return forward(peer, x, answer(x))


def _empty(n: int, length: int) -> Callable[[str, Any], str]:
    return lambda name, peer: forward(peer, plain(n, length), plain(n, length))


def _one_value(name: str, peer: Any) -> str:
    said = forward(peer, plain(4, 1), np.zeros((4, 8, 1)))
    return "computes beta" if said == "right" else said


def _negated(name: str, peer: Any) -> str:
    if name == "onnxruntime":
        return NOT_THERE
    import torch

    x = torch.from_numpy(placed(plain(), 0))
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    expected = answer(view.numpy(force=True))
    if name == "torch":
        return judged(peer.forward(view.detach()), expected)
    memory = torch.from_numpy(placed(np.zeros_like(plain()), 0))
    negated = torch._neg_view(memory.copy_(-x))
    return judged(peer.forward(negated, np.zeros(x.shape, np.float32)), answer(x.numpy()))


def _requires_grad(name: str, peer: Any) -> str:
    if name == "onnxruntime":
        return NOT_THERE
    import torch

    leaf = torch.from_numpy(placed(plain(), 0)).requires_grad_()
    if name == "torch":
        y = peer.forward(leaf)
        return "recorded" if y.requires_grad else "the gradient is lost, without an error"
    y = torch.from_numpy(placed(plain(), 0))
    peer.forward(leaf, y)
    return "recorded" if y.requires_grad else "the gradient is lost, without an error"


def _saved_tensor(name: str, peer: Any) -> str:
    """y is saved for a backward pass, and then a call writes to it."""
    if name == "onnxruntime":
        return NOT_THERE
    import torch

    weight = torch.ones(4, 8, 1000, requires_grad=True)
    y = torch.from_numpy(placed(np.full((4, 8, 1000), 5, np.float32), 0))
    total = (weight * y).sum()
    if name == "torch":
        torch.add(y, 1, out=y)
    else:
        peer.forward(placed(plain(), 0), y)
    total.backward()
    assert weight.grad is not None
    return "right" if bool((weight.grad == 5).all()) else "wrong gradients, without an error"


def _meta(name: str, peer: Any) -> str:
    if name == "onnxruntime":
        return NOT_THERE
    import torch

    x = torch.empty((4, 8, 1000), device="meta")
    if name == "torch":
        return "a tensor without data" if peer.forward(x).is_meta else "a result"
    return judged(peer.forward(x, placed(plain(), 0)), answer(plain()))


def _overlap(name: str, peer: Any) -> str:
    if name != "tvm":
        return NOT_THERE
    block = placed(plain(5), 0)
    expected = answer(block[:4])
    return judged(peer.forward(block[:4], block[1:]), expected)


def _read_only_output(name: str, peer: Any) -> str:
    if name != "tvm":
        return NOT_THERE
    return judged(peer.forward(placed(plain(), 0), _read_only(placed(plain(), 0))), answer(plain()))


CASES: dict[str, Callable[[str, Any], str]] = {
    "off_a_cache_line": _given(lambda x: placed(x, 4)),
    "off_an_element": _given(lambda x: placed(x, 1)),
    "strided": _given(_strided),
    "transposed": _given(np.asfortranarray),
    "reversed": _given(lambda x: x[:, :, ::-1]),
    "broadcast": _given(lambda x: np.broadcast_to(x[:1, :1], x.shape)),
    "read_only_input": _given(_read_only),
    "read_only_output": _read_only_output,
    "big_endian": _given(lambda x: x.astype(">f4")),
    "masked": _masked,
    "bfloat16": _bfloat16,
    "wrong_dtype": _double,
    "wrong_extent": _nine_channels,
    "no_batch": _empty(0, 1000),
    "no_length": _empty(4, 0),
    "one_value": _one_value,
    "overlap": _overlap,
    "negated": _negated,
    "requires_grad": _requires_grad,
    "saved_tensor": _saved_tensor,
    "wrong_device": _meta,
}
