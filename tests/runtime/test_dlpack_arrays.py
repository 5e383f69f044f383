"""Arrays of any other library that speaks DLPack, here tvm_ffi's own and a small producer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm_ffi

from normgraph.errors import ArgumentError, ArgumentTypeError


class Producer:
    """The least a DLPack library offers."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("wrap", [tvm_ffi.from_dlpack, Producer])
def test_dlpack_arrays_give_tvm_ffi_tensors(op: Any, toy: Any, wrap: Any) -> None:
    for kind in op.kinds:
        inputs = toy.inputs(kind)
        result = op.call(kind, *map(wrap, inputs))
        result = result if isinstance(result, tuple) else (result,)
        answers = toy.outputs(kind, inputs)
        for got, answer in zip(result, answers.values(), strict=True):
            assert isinstance(got, tvm_ffi.Tensor)
            np.testing.assert_array_equal(np.from_dlpack(got), answer)


def test_options(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    acc = tvm_ffi.from_dlpack(np.ones(3, np.float32))
    result = op.backward(
        *map(tvm_ffi.from_dlpack, inputs), want="dbeta", out={"dbeta": acc}, grad_req="add"
    )
    assert result is acc
    answer = toy.outputs("backward", inputs)["dbeta"] + 1
    np.testing.assert_array_equal(np.from_dlpack(acc), answer)


def test_a_momentum_number(op: Any, toy: Any) -> None:
    *inputs, _ = toy.inputs("forward")
    result = op.forward(*map(Producer, inputs), 2.0)
    answer = toy.outputs("forward", [*inputs, 2.0])
    np.testing.assert_array_equal(np.from_dlpack(result.new_running_var), answer["new_running_var"])


def test_only_tvm_ffi_tensors_are_written(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference")
    y = Producer(np.empty((2, 3, 5), np.float32))
    with pytest.raises(ArgumentError, match="must be writable"):
        op.inference(*map(Producer, inputs), out={"y": y})


def test_strided_and_wrong_arrays(op: Any, toy: Any) -> None:
    x, *rest = toy.inputs("inference")
    others = list(map(Producer, rest))
    turned = Producer(x.copy(order="F"))
    np.testing.assert_array_equal(
        np.from_dlpack(op.inference(turned, *others)), toy.outputs("inference", [x, *rest])["y"]
    )
    with pytest.raises(ArgumentError, match="strided"):
        op.inference(turned, *others, copy=False)
    with pytest.raises(ArgumentTypeError, match="x must be float32"):
        op.inference(Producer(x.astype(int)), *others)
    with pytest.raises(ArgumentTypeError, match="must be of one kind"):
        op.inference(x, *others)
    with pytest.raises(ArgumentError, match="extent 3 along axis 1"):
        op.inference(Producer(x[:, :2].copy()), *others)


def test_without_elements(op: Any, toy: Any) -> None:
    x, *rest = toy.inputs("inference")
    y = op.inference(Producer(x[:0]), *map(Producer, rest))
    assert y.shape == (0, 3, 5)
