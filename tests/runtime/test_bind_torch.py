"""Bound calls of PyTorch CPU tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArgumentError

torch = pytest.importorskip("torch")


def tensors(toy: Any, kind: str, dtype: str = "float32") -> list[Any]:
    specs = toy.operator(dtype).signature(kind).inputs
    return [
        torch.from_numpy(array).to(getattr(torch, spec.dtype))
        for spec, array in zip(specs, toy.inputs(kind), strict=True)
    ]


def values(arrays: list[Any]) -> list[Any]:
    return [tensor.detach().double().numpy() for tensor in arrays]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_kind_and_dtype(toy: Any, dtype: str) -> None:
    op = toy.operator(dtype)
    for kind in op.kinds:
        inputs = tensors(toy, kind, dtype)
        call = op.bind(kind, *inputs)
        for _ in range(2):
            inputs[0].add_(1)
            result = call()
            assert result is call()
            result = result if isinstance(result, tuple) else (result,)
            answers = toy.outputs(kind, values(inputs))
            for spec, got in zip(op.signature(kind).outputs, result, strict=True):
                assert type(got) is torch.Tensor
                assert got.dtype == getattr(torch, spec.dtype)
                np.testing.assert_allclose(got.double(), answers[spec.name], rtol=1e-2)


def test_given_outputs_and_add(op: Any, toy: Any) -> None:
    inputs = tensors(toy, "backward")
    answers = toy.outputs("backward", values(inputs))
    total, dx = torch.ones(3), torch.empty(2, 3, 5)
    call = op.bind(
        "backward",
        *inputs,
        want=("dx", "dgamma"),
        out={"dgamma": total, "dx": dx},
        grad_req={"dgamma": "add"},
    )
    for times in (1, 2):
        result = call()
        assert result.dx is dx
        assert result.dgamma is total
        np.testing.assert_array_equal(total, 1 + times * answers["dgamma"])
        np.testing.assert_array_equal(dx, answers["dx"])


def test_strided_and_lazily_negated_tensors_are_refused(op: Any, toy: Any) -> None:
    x, *rest = tensors(toy, "inference")
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    for view, what in ((x.mT.contiguous().mT, "strided"), (negated, "lazily negated")):
        with pytest.raises(ArgumentError, match=f"to be bound, but it is .*{what}"):
            op.bind("inference", view, *rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_is_bound_and_not_the_object(toy: Any, dtype: str) -> None:
    x, gamma, *rest = tensors(toy, "inference", dtype)
    answer = toy.outputs("inference", values([x, gamma, *rest]))["y"]
    call = toy.operator(dtype).bind("inference", x, gamma, *rest)
    y = call()
    shown = y.detach()
    x.resize_(2)
    x.set_(torch.zeros(3, dtype=x.dtype))
    gamma.data = torch.zeros(3, dtype=x.dtype)
    y.set_(torch.zeros(3, dtype=x.dtype))
    shown.zero_()
    del x, gamma
    assert call() is y
    np.testing.assert_array_equal(y.double(), 0)
    np.testing.assert_array_equal(shown.double(), answer)


@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("size", [0, 1 << 22])
def test_memory_that_was_resized_is_noticed(op: Any, toy: Any, place: str, size: int) -> None:
    x, *rest = tensors(toy, "inference")
    x = x.clone()
    answer = torch.from_numpy(toy.outputs("inference", values(tensors(toy, "inference")))["y"])
    call = op.bind("inference", x, *rest)
    tensor = {"x": x, "y": call()}[place]
    assert torch.equal(call().double(), answer)
    # What was seen as a NumPy array would not be resized at all.
    tensor.untyped_storage().resize_(size)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"inference: the memory .* was resized or freed"):
            call()


def test_autograd_notices_that_a_saved_tensor_is_overwritten(op: Any, toy: Any) -> None:
    inputs = tensors(toy, "inference")
    for out in ({}, {"y": torch.empty(2, 3, 5)}):
        call = op.bind("inference", *inputs, out=out)
        leaf = torch.ones(2, 3, 5, requires_grad=True)
        product = leaf * call()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_inference_tensors(op: Any, toy: Any) -> None:
    with torch.inference_mode():
        inputs = tensors(toy, "inference")
        call = op.bind("inference", *inputs)
    np.testing.assert_array_equal(call(), toy.outputs("inference", values(inputs))["y"])


def test_tensors_that_come_to_require_grad(op: Any, toy: Any) -> None:
    inputs = tensors(toy, "inference")
    answer = toy.outputs("inference", values(inputs))["y"]
    call = op.bind("inference", *inputs)
    inputs[1].requires_grad_()
    with pytest.raises(ArgumentError, match="inference: gamma requires grad"):
        call()
    with pytest.raises(ArgumentError, match="gamma requires grad"):
        op.bind("inference", *inputs)
    with torch.no_grad():
        np.testing.assert_array_equal(call(), answer)
        bound = op.bind("inference", *inputs)
        np.testing.assert_array_equal(bound(), answer)
    with pytest.raises(ArgumentError, match="gamma requires grad"):
        bound()
    inputs[1].requires_grad_(False)
    np.testing.assert_array_equal(bound(), answer)
    y = call()
    y.requires_grad_()
    with pytest.raises(ArgumentError, match="inference: y requires grad"):
        call()


# torch compiles its own formulas with a function it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_tangent_and_a_trace_are_refused(op: Any, toy: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, *rest = tensors(toy, "inference")
    call = op.bind("inference", x, *rest)
    with pytest.raises(ArgumentError, match="is being traced"):
        make_fx(lambda t: t + call())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(x), torch.ones_like(x))
        call()
        x.copy_(dual)
        with pytest.raises(ArgumentError, match="x has a forward-mode tangent"):
            call()


def test_a_zero_in_gamma(op: Any, toy: Any) -> None:
    inputs = tensors(toy, "backward_from_output")
    call = op.bind("backward_from_output", *inputs)
    call()
    inputs[2][1] = 0
    with pytest.raises(ArgumentError, match=r"gamma\[1\] is\s+0"):
        call()


def test_an_input_without_elements(op: Any, toy: Any) -> None:
    dy, x, gamma, mean, inv_std = tensors(toy, "backward")
    total = torch.full((3,), 7.0)
    call = op.bind(
        "backward", dy[:0], x[:0], gamma, mean[:0], inv_std[:0],
        out={"dgamma": total}, grad_req={"dgamma": "add"},
    )  # fmt: skip
    for _ in range(2):
        result = call()
        assert result.dx.shape == (0, 3, 5)
        assert result.dgamma is total
        np.testing.assert_array_equal(total, 7)
        np.testing.assert_array_equal(result.dbeta, 0)
