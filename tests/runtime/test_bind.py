"""Bound calls of NumPy and DLPack arrays: checked once, then repeated on the same memory."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from normgraph.errors import ArgumentError, ArgumentTypeError, SpecError
from normgraph.runtime import load, pool
from normgraph.runtime.call import Call

KINDS = ["forward", "inference", "backward", "backward_from_output"]


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_computes_with_the_values_of_its_time(toy: Any, kind: str, dtype: str) -> None:
    native = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    op = toy.operator(dtype)
    inputs = toy.inputs(kind, dtype=native)
    call = op.bind(kind, *inputs)
    first = call()
    for turn in range(3):
        for array in inputs:
            array[...] = array + (turn > 0)
        result = call()
        assert result is first
        ordinary = op.call(kind, *inputs)
        assert type(result) is type(ordinary)
        answers = toy.outputs(kind, inputs)
        for spec, got in zip(op.signature(kind).outputs, as_tuple(result), strict=True):
            assert type(got) is np.ndarray
            assert got.dtype == spec.dtype
            np.testing.assert_allclose(got.astype(np.float64), answers[spec.name], rtol=1e-2)
        for got, want in zip(as_tuple(result), as_tuple(ordinary), strict=True):
            np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_given_outputs_are_written_and_returned(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    answers = toy.outputs("backward", inputs)
    dx, dbeta = np.full((2, 3, 5), np.nan, np.float32), np.full(3, np.nan, np.float32)
    call = op.bind("backward", *inputs, out={"dbeta": dbeta, "dx": dx})
    assert np.isnan(dx).all()
    for _ in range(2):
        dx[...] = np.nan
        result = call()
        assert result.dx is dx
        assert result.dbeta is dbeta
        for name, answer in answers.items():
            np.testing.assert_array_equal(getattr(result, name), answer)


def test_want_and_add(op: Any, toy: Any) -> None:
    dy, x, gamma, mean, inv_std = inputs = toy.inputs("backward")
    answers = toy.outputs("backward", inputs)
    total = np.full(3, 10, np.float32)
    call = op.bind(
        "backward", dy, x, inv_std=inv_std, mean=mean, gamma=gamma,
        out={"dgamma": total}, grad_req={"dgamma": "add", "dbeta": "null"},
    )  # fmt: skip
    for times in (1, 2, 3):
        result = call()
        assert result._fields == ("dx", "dgamma")
        np.testing.assert_array_equal(total, 10 + times * answers["dgamma"])
    only = op.bind("backward", *inputs, want="dbeta")()
    np.testing.assert_array_equal(only, answers["dbeta"])


def test_running_statistics_are_updated_in_place(op: Any, toy: Any) -> None:
    *inputs, mean, var, _ = toy.inputs("forward")
    first, second = mean.copy(), var.copy()
    out = {"new_running_mean": mean, "new_running_var": var}
    call = op.bind("forward", *inputs, mean, var, 3, out=out)
    for times in (1, 2):
        assert call().new_running_mean is mean
        np.testing.assert_array_equal(mean, first + 3 * times)
        np.testing.assert_array_equal(var, second * 3**times)


def test_read_only_inputs(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference")
    base = inputs[0].copy()
    inputs[0] = base.view()
    inputs[0].flags.writeable = False
    call = op.bind("inference", *inputs)
    for _ in range(2):
        base += 1
        np.testing.assert_array_equal(call(), toy.outputs("inference", inputs)["y"])


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_call_refuses_is_refused_when_it_is_bound(op: Any, toy: Any, warm: bool) -> None:
    dy, x, gamma, mean, inv_std = inputs = toy.inputs("backward")
    if warm:
        op.backward(*inputs)
    dx, read_only = np.zeros_like(x), np.zeros_like(x)
    read_only.flags.writeable = False
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((dy, x, gamma, mean), {}, ArgumentTypeError, "inv_std missing"),
        ((*inputs, x), {}, ArgumentTypeError, "expected 5 arrays, but 6 came"),
        (inputs, {"copy": True}, ArgumentTypeError, "'copy'; it takes .* out, want, grad_req"),
        ((dy, x[:1], gamma, mean, inv_std), {}, ArgumentError, "N = 2 along axis 0"),
        ((dy.astype(float), *inputs[1:]), {}, ArgumentTypeError, "dy must be float32"),
        ((dy, x, [1.0] * 3, mean, inv_std), {}, ArgumentTypeError, "must be a numpy array"),
        ((dy, x.copy(order="F"), gamma, mean, inv_std), {}, ArgumentError, "to be bound, but"),
        (inputs, {"out": {"dx": read_only}}, ArgumentError, "must be writable"),
        (inputs, {"out": {"dx": x}}, ArgumentError, "must not share memory with x"),
        (inputs, {"out": {"dx": dx[:1]}}, ArgumentError, "must have shape"),
        (inputs, {"out": {"dx": dx.astype(float)}}, ArgumentTypeError, "must be float32"),
        (inputs, {"out": {"dbeta": dx}, "want": "dx"}, ArgumentError, "not wanted"),
        (inputs, {"grad_req": {"dx": "add"}}, ArgumentError, "array to add to"),
        (inputs, {"want": ()}, ArgumentError, "no output is wanted"),
    ]
    for arrays, options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            op.bind("backward", *arrays, **options)
        assert str(caught.value).startswith("backward: ")
    with pytest.raises(ArgumentError, match="Expected more than 1 spatial element"):
        op.bind("forward", *toy.inputs("forward", length=1))
    with pytest.raises(SpecError, match="no kind 'backward_frozen'"):
        op.bind("backward_frozen", *inputs)


def test_a_zero_in_gamma_is_looked_for_in_each_call(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward_from_output")
    kept, gamma = inputs[2].copy(), inputs[2]
    gamma[:] = 0  # to be filled later
    call = op.bind("backward_from_output", *inputs)
    gamma[:] = kept
    dx = call().dx
    np.testing.assert_array_equal(dx, toy.outputs("backward", inputs)["dx"])
    before = dx.copy()
    gamma[1] = 0
    inputs[0][:] = 9
    with pytest.raises(ArgumentError, match=r"gamma\[1\] is\s+0"):
        call()
    np.testing.assert_array_equal(dx, before)
    gamma[1] = 1
    np.testing.assert_array_equal(call().dx, toy.outputs("backward", inputs)["dx"])


def test_a_negative_zero_of_bfloat16(toy: Any) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    inputs = toy.inputs("backward_from_output", dtype=bfloat16)
    call = toy.operator("bfloat16").bind("backward_from_output", *inputs)
    call()
    inputs[2][2] = -0.0
    with pytest.raises(ArgumentError, match=r"gamma\[2\] is\s+0"):
        call()


@pytest.mark.parametrize("wrap", [np.asarray, tvm_ffi.from_dlpack])
def test_an_input_without_elements(op: Any, toy: Any, wrap: Any) -> None:
    _, gamma, beta, mean, var, momentum = toy.inputs("forward")
    arrays = (np.ones((2, 3, 0), np.float32), gamma, beta, mean, var, momentum)
    total = np.ones(3, np.float32)
    call = op.bind(
        "forward",
        *map(wrap, arrays),
        out={"new_running_var": wrap(total)},
        grad_req={"new_running_var": "add"},
    )
    for times in (1, 2):
        mean += 1
        result = call()
        assert tuple(result.y.shape) == (2, 3, 0)
        np.testing.assert_array_equal(np.from_dlpack(result.mean), 0)
        np.testing.assert_allclose(
            np.from_dlpack(result.inv_std), 1 / np.sqrt(op.spec.eps), rtol=1e-6
        )
        np.testing.assert_array_equal(np.from_dlpack(result.new_running_mean), mean)
        np.testing.assert_array_equal(total, 1 + times * var)


def test_dlpack_arrays(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    acc = np.ones(3, np.float32)
    call = op.bind(
        "backward",
        *map(tvm_ffi.from_dlpack, inputs),
        out={"dbeta": tvm_ffi.from_dlpack(acc)},
        grad_req={"dbeta": "add"},
    )
    for times in (1, 2):
        result = call()
        assert isinstance(result.dx, tvm_ffi.Tensor)
        answers = toy.outputs("backward", inputs)
        np.testing.assert_array_equal(np.from_dlpack(result.dx), answers["dx"])
        np.testing.assert_array_equal(acc, 1 + times * answers["dbeta"])
    with pytest.raises(ArgumentTypeError, match="must be of one kind"):
        op.bind("backward", *map(tvm_ffi.from_dlpack, inputs[:4]), inputs[4])


def test_the_arrays_are_checked_and_allocated_once(
    op: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = toy.inputs("backward")
    call = op.bind("backward", *inputs)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("checked or allocated again")

    for name in ("__call__", "_check", "_full", "_short"):
        monkeypatch.setattr(Call, name, never)
    monkeypatch.setattr(pool, "empty", never)
    monkeypatch.setattr(np, "empty", never)
    result = call()
    np.testing.assert_array_equal(result.dx, toy.outputs("backward", inputs)["dx"])


def test_nothing_is_computed_when_it_is_bound(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference")
    y = np.full((2, 3, 5), np.nan, np.float32)
    call = op.bind("inference", *inputs, out={"y": y})
    assert np.isnan(y).all()
    assert call() is y
    np.testing.assert_array_equal(y, toy.outputs("inference", inputs)["y"])


def test_it_holds_the_arrays_and_the_library(toy: Any) -> None:
    op = load(toy.artifact("float32"))
    inputs = toy.inputs("inference")
    answer = toy.outputs("inference", inputs)["y"]
    watched = [weakref.ref(array) for array in inputs]
    call = op.bind("inference", *inputs)
    del inputs, op
    gc.collect()
    others = [np.full((2, 3, 5), 7, np.float32) for _ in range(50)]  # would take its place
    np.testing.assert_array_equal(call(), answer)
    assert all(each() is not None for each in watched)
    del call, others
    assert all(each() is None for each in watched)


@pytest.mark.parametrize("view", [False, True])
def test_numpy_does_not_resize_what_is_bound(op: Any, toy: Any, view: bool) -> None:
    x, *rest = toy.inputs("inference")
    owner = x
    if view:
        owner = np.zeros(40, np.float32)
        owner[4:34] = x.ravel()
        x = owner[4:34].reshape(2, 3, 5)
    y = np.zeros((2, 3, 5), np.float32)
    call = op.bind("inference", x, *rest, out={"y": y})
    answer = call().copy()
    for array in (owner, y):
        with pytest.raises(ValueError, match="cannot resize"):
            array.resize(1 << 20, refcheck=False)
    np.testing.assert_array_equal(call(), answer)
    del call
    y.resize(1 << 10, refcheck=False)
    assert y.nbytes == 4096


def test_a_shape_given_to_the_array_later_changes_nothing(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference")
    answer = toy.outputs("inference", inputs)["y"]
    call = op.bind("inference", *inputs)
    inputs[0].shape = (30,)
    np.testing.assert_array_equal(call(), answer)


def test_large_outputs_lie_in_the_pool(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference", n=40, length=1000)
    before = pool.stats().in_use
    call = op.bind("inference", *inputs)
    assert pool.stats().in_use >= before + 480000
    assert call() is call()
    del call
    assert pool.stats().in_use == before


def test_bound_calls_on_threads(op: Any, toy: Any) -> None:
    """One for each thread, on shared inputs."""
    inputs = toy.inputs("backward", n=20, length=50)
    answers = toy.outputs("backward", inputs)
    wrong: list[int] = []

    def work(number: int) -> None:
        call = op.bind("backward", *inputs)
        for _ in range(200):
            result = call()
            if not all(np.array_equal(getattr(result, n), a) for n, a in answers.items()):
                wrong.append(number)
            for array in result:
                array.fill(np.nan)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_says_what_it_is(op: Any, toy: Any) -> None:
    call = op.bind("backward", *toy.inputs("backward"))
    assert call.__name__ == "backward"
    assert str(op.signature("backward")) in call.__doc__
    with pytest.raises(TypeError, match="0 positional arguments"):
        call(1)
