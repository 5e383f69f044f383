"""PyTorch CPU tensors in, PyTorch CPU tensors out."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArgumentError, ArgumentTypeError

torch = pytest.importorskip("torch")


def _tensors(toy: Any, kind: str, dtype: Any = None) -> list[Any]:
    core = torch.float64 if dtype == torch.float64 else torch.float32
    names = ("mean", "inv_std", "running_mean", "running_var", "momentum")
    specs = toy.operator("float32").signature(kind).inputs
    return [
        torch.from_numpy(array).to(core if spec.name in names else dtype or torch.float32)
        for spec, array in zip(specs, toy.inputs(kind), strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_kind_and_dtype(toy: Any, dtype: str) -> None:
    op = toy.operator(dtype)
    for kind in op.kinds:
        inputs = _tensors(toy, kind, getattr(torch, dtype))
        answers = toy.outputs(kind, toy.inputs(kind))
        for _ in range(2):
            result = op.call(kind, *inputs)
            result = result if isinstance(result, tuple) else (result,)
            for spec, got in zip(op.signature(kind).outputs, result, strict=True):
                assert type(got) is torch.Tensor
                assert got.dtype == getattr(torch, spec.dtype)
                np.testing.assert_array_equal(got.double().numpy(), answers[spec.name])


def test_out_want_and_add(toy: Any, op: Any) -> None:
    inputs = _tensors(toy, "backward")
    answers = toy.outputs("backward", toy.inputs("backward"))
    for _ in range(2):
        acc = torch.ones(3)
        dx = torch.empty(2, 3, 5)
        result = op.backward(
            *inputs,
            want=("dx", "dgamma"),
            out={"dgamma": acc, "dx": dx},
            grad_req={"dgamma": "add"},
        )
        assert result.dx is dx
        assert result.dgamma is acc
        np.testing.assert_array_equal(acc.numpy(), answers["dgamma"] + 1)
        np.testing.assert_array_equal(dx.numpy(), answers["dx"])


def test_the_short_and_the_full_path_refuse_the_same(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    leaf = x.clone().requires_grad_()
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ((leaf, *rest), {}, ArgumentError, r"requires grad.*detach\(\).*torch.no_grad\(\)"),
        ((torch.nn.Parameter(x), *rest), {}, ArgumentError, "requires grad"),
        ((x.double(), *rest), {}, ArgumentTypeError, "x must be float32"),
        ((x[:, :2], *rest), {}, ArgumentError, "extent 3 along axis 1"),
        ((x.to_sparse(), *rest), {}, ArgumentTypeError, r"dense tensor.*to_dense\(\)"),
        ((x.to("meta"), *rest), {}, ArgumentError, "on the CPU, but it is on meta"),
        ((x.numpy(), *rest), {}, ArgumentTypeError, "must be of one kind.*torch.from_numpy"),
        ((x, *rest), {"out": {"y": x.numpy()}}, ArgumentTypeError, "must be of one kind"),
        ((x, *rest), {"out": {"y": x}}, ArgumentError, "must not share memory with x"),
        ((x, *rest), {"out": {"y": x.detach()}}, ArgumentError, "must not share memory with x"),
        ((x, *rest), {"out": {"y": leaf}}, ArgumentError, "requires grad"),
        ((x, *rest), {"out": {"y": x.half()}}, ArgumentTypeError, "must be float32"),
        ((x, *rest), {"out": {"y": x[:1].clone()}}, ArgumentError, "must have shape"),
        ((x, *rest), {"out": {"y": x.clone()[:1].expand(2, 3, 5)}}, ArgumentError, "strided"),
        ((x.mT.contiguous().mT, *rest), {"copy": False}, ArgumentError, "strided"),
    ]
    for _ in range(2):
        for args, options, error, message in cases:
            with pytest.raises(error, match=message):
                op.inference(*args, **options)
        op.inference(x, *rest)


def test_tensors_that_require_grad_where_grad_is_off(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    answer = toy.outputs("inference", toy.inputs("inference"))["y"]
    leaf = torch.nn.Parameter(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = op.inference(leaf, *rest)
            np.testing.assert_array_equal(y.numpy(), answer)
            out = torch.empty(2, 3, 5)
            assert op.inference(leaf, *rest, out={"y": out}) is out
            assert not y.requires_grad


def test_function_transforms_are_refused(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    op.inference(x, *rest)

    def call(tensor: Any) -> Any:
        return op.inference(tensor, *rest)

    with pytest.raises(ArgumentTypeError, match="no memory of its own"):
        torch.func.vmap(call)(x[None])
    with pytest.raises(ArgumentError, match="requires grad"):
        torch.func.grad(lambda tensor: call(tensor).sum())(x)
    nested = torch.nested.nested_tensor([x, x], layout=torch.jagged)
    with pytest.raises(ArgumentTypeError, match="it is nested"):
        call(nested)


def test_strided_and_lazily_negated_tensors(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    answer = toy.outputs("inference", toy.inputs("inference"))["y"]
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    for view in (x.mT.contiguous().mT, negated):
        np.testing.assert_array_equal(op.inference(view, *rest).numpy(), answer)
        with pytest.raises(ArgumentError, match="copy=False, but it is"):
            op.inference(view, *rest, copy=False)


def test_an_extent_of_one_with_odd_strides(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    odd = x[:1].clone().as_strided((1, 3, 5), (99, 5, 1))
    assert odd.is_contiguous()
    y = op.inference(odd, *rest, copy=False)
    np.testing.assert_array_equal(y, op.inference(x[:1].clone(), *rest))


def test_memory_not_aligned_to_the_element(toy: Any, op: Any) -> None:
    x, *rest = _tensors(toy, "inference")
    memory = bytearray(x.nbytes + 1)
    odd = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=1).view(x.shape)
    odd.copy_(x)
    answer = toy.outputs("inference", toy.inputs("inference"))["y"]
    np.testing.assert_array_equal(op.inference(odd, *rest).numpy(), answer)
    with pytest.raises(ArgumentError, match="not aligned"):
        op.inference(odd, *rest, copy=False)


def test_writing_bumps_the_version(toy: Any, op: Any) -> None:
    """So that autograd notices when a tensor it saved has been overwritten."""
    inputs = _tensors(toy, "inference")
    y = torch.empty(2, 3, 5)
    for expected in (1, 2):
        op.inference(*inputs, out={"y": y})
        assert y._version == expected
    weight = torch.ones(2, 3, 5, requires_grad=True)
    product = (weight * y).sum()
    op.inference(*inputs, out={"y": y})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_running_statistics_in_place_and_momentum_as_a_number(toy: Any, op: Any) -> None:
    arrays = toy.inputs("forward")
    arrays[5] = np.array(2, np.float32)
    answers = toy.outputs("forward", arrays)
    for _ in range(2):
        inputs = _tensors(toy, "forward")
        mean, var = inputs[3], inputs[4]
        out = {"new_running_mean": mean, "new_running_var": var}
        result = op.forward(*inputs[:5], 2.0, out=out)
        assert result.new_running_mean is mean
        for name, answer in answers.items():
            np.testing.assert_array_equal(getattr(result, name).numpy(), answer)


def test_a_zero_in_gamma(toy: Any, op: Any) -> None:
    inputs = _tensors(toy, "backward_from_output")
    for _ in range(2):
        op.backward_from_output(*inputs)
        bad = [*inputs[:2], torch.tensor([1.0, 2.0, 0.0]), *inputs[3:]]
        with pytest.raises(ArgumentError, match=r"gamma\[2\] is 0"):
            op.backward_from_output(*bad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_elements(toy: Any, dtype: str) -> None:
    op = toy.operator(dtype)
    dy, x, gamma, mean, inv_std = _tensors(toy, "backward", getattr(torch, dtype))
    acc = torch.ones_like(gamma)
    result = op.backward(
        dy[:0], x[:0], gamma, mean[:0], inv_std[:0], out={"dbeta": acc}, grad_req={"dbeta": "add"}
    )
    assert result.dx.shape == (0, 3, 5)
    assert not result.dgamma.any()
    assert result.dbeta.eq(1).all()


def test_threads(toy: Any, op: Any) -> None:
    failures: list[str] = []

    def work(length: int) -> None:
        inputs = toy.inputs("backward", length=length)
        tensors = [torch.from_numpy(array) for array in inputs]
        answers = toy.outputs("backward", inputs)
        for _ in range(200):
            result = op.backward(*tensors)
            if not np.array_equal(result.dgamma.numpy(), answers["dgamma"]):
                failures.append("dgamma")

    threads = [threading.Thread(target=work, args=(length,)) for length in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
