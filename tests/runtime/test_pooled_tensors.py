"""Large torch outputs show pooled memory and are tensors like any other."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.runtime import OutputPool

torch = pytest.importorskip("torch")

LENGTH = 20000  # of the toy's x, (2, 3, LENGTH)


@pytest.fixture(autouse=True)
def pool() -> Iterator[OutputPool]:
    """The pool that calls use, empty of what other tests left; its limit is put back."""
    gc.collect()
    limit = ng.pool.limit
    ng.pool.clear()
    yield ng.pool
    ng.pool.limit = limit
    ng.pool.clear()


@pytest.fixture
def call(toy: Any, op: Any) -> Callable[[], Any]:
    """A call of inference with torch tensors, whose answer is x * 2 - 1."""
    x = torch.arange(2 * 3 * LENGTH, dtype=torch.float32).view(2, 3, LENGTH)
    rest = [torch.full((3,), value) for value in (2.0, -3.0, 1.0, 2.0)]

    def inference(**options: Any) -> Any:
        return op.inference(x, *rest, **options)

    np.testing.assert_array_equal(inference().numpy(), answer())
    return inference


def answer() -> Any:
    return np.arange(2 * 3 * LENGTH, dtype=np.float32).reshape(2, 3, LENGTH) * 2 - 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_kind_and_dtype(toy: Any, pool: OutputPool, dtype: str) -> None:
    op = toy.operator(dtype)
    core = torch.float64 if dtype == "float64" else torch.float32
    names = ("mean", "inv_std", "running_mean", "running_var", "momentum")
    for kind in ("forward", "inference", "backward"):
        arrays = toy.inputs(kind, length=LENGTH)
        inputs = [
            torch.from_numpy(array).to(core if spec.name in names else getattr(torch, dtype))
            for spec, array in zip(op.signature(kind).inputs, arrays, strict=True)
        ]
        places = set()
        for _ in range(3):
            result = op.call(kind, *inputs)
            large = result[0] if isinstance(result, tuple) else result
            assert type(large) is torch.Tensor
            assert large.dtype == getattr(torch, dtype)
            assert large.is_contiguous()
            assert not large.requires_grad
            assert large.is_leaf
            assert large.device.type == "cpu"
            assert pool.stats().in_use >= large.nbytes
            places.add(large.data_ptr())
            name = op.signature(kind).outputs[0].name
            np.testing.assert_array_equal(large.double().numpy(), toy.outputs(kind, arrays)[name])
            del result, large
        assert len(places) == 1
        assert pool.stats().in_use == 0


# What may keep a result, and how to read the whole of it again.
HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "itself": (lambda tensor: tensor, lambda held: held),
    "view": (lambda tensor: tensor.view(-1)[:], lambda held: held),
    "transpose": (lambda tensor: tensor.mT, lambda held: held.mT),
    "detached": (lambda tensor: tensor.detach(), lambda held: held),
    "storage": (
        lambda tensor: tensor.untyped_storage(),
        lambda held: torch.tensor([], dtype=torch.float32).set_(held),
    ),
    "numpy": (lambda tensor: tensor.numpy(), torch.from_numpy),
    "slice of numpy": (lambda tensor: tensor.numpy()[:][:], torch.from_numpy),
    "numpy from_dlpack": (np.from_dlpack, lambda held: torch.from_dlpack(held)),
    "torch from_dlpack": (torch.from_dlpack, lambda held: held),
    "memoryview": (
        lambda tensor: memoryview(tensor.numpy()),
        lambda held: torch.from_numpy(np.asarray(held)),
    ),
    "parameter": (torch.nn.Parameter, lambda held: held.detach()),
    "saved by autograd": (
        lambda tensor: (torch.ones((), requires_grad=True) * tensor).sum().grad_fn,
        lambda held: held.next_functions[0][0]._saved_other,
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_never_taken_from_who_shows_it(
    call: Callable[..., Any], pool: OutputPool, holder: str
) -> None:
    hold, read = HOLDERS[holder]
    y = call()
    place = y.data_ptr()
    held = hold(y)
    del y
    gc.collect()
    others = [call() for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    for other in others:
        other.fill_(torch.nan)
    np.testing.assert_array_equal(read(held).numpy().ravel(), answer().ravel())
    del held, other, others
    gc.collect()
    assert pool.stats().in_use == 0
    again = [call() for _ in range(4)]
    assert place in [tensor.data_ptr() for tensor in again]


def test_tensors_are_like_any_other(call: Callable[..., Any]) -> None:
    y = call()
    y += 1
    y.mul_(2).add_(torch.ones_like(y))
    right = (answer() + 1) * 2 + 1
    np.testing.assert_array_equal(y.numpy(), right)
    for twin in (y.clone(), copy.deepcopy(y), y + 0):
        assert twin.data_ptr() != y.data_ptr()
        np.testing.assert_array_equal(twin.numpy(), right)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    np.testing.assert_array_equal(torch.load(file).numpy(), right)
    y.share_memory_()
    assert y.is_shared()
    y += 1
    np.testing.assert_array_equal(y.numpy(), right + 1)
    y.resize_(2, 3, 5)
    assert y.shape == (2, 3, 5)
    with pytest.raises(RuntimeError, match="not resizable"):
        call().resize_(5, 3, LENGTH)


def test_autograd_over_a_pooled_result(call: Callable[..., Any]) -> None:
    y = call().requires_grad_()
    (y * y).sum().backward()
    np.testing.assert_array_equal(y.grad.numpy(), 2 * answer())
    weight = torch.ones((), requires_grad=True)
    y = call()
    loss = (weight * y).sum()
    call(out={"y": y})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_marks_its_results(call: Callable[..., Any]) -> None:
    assert not call().is_inference()
    with torch.inference_mode():
        assert call().is_inference()


def test_strided_input_is_copied_into_pooled_memory(toy: Any, op: Any, pool: OutputPool) -> None:
    x, *rest = map(torch.from_numpy, toy.inputs("inference", length=LENGTH))
    right = op.inference(x, *rest).numpy()
    for _ in range(2):
        y = op.inference(x.mT.contiguous().mT, *rest)
        np.testing.assert_array_equal(y.numpy(), right)
        del y
    assert pool.stats().cached > x.nbytes


def test_the_pool_can_be_turned_off(call: Callable[..., Any], pool: OutputPool) -> None:
    pool.limit = 0
    np.testing.assert_array_equal(call().numpy(), answer())
    assert pool.stats() == (0, 0, 0)
