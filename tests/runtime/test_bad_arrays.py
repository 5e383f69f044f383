"""Each bad argument is refused with an error that says what to do, before any kernel runs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArgumentError, ArgumentTypeError

F = np.float32


def _replace(index: int, value: Any) -> Any:
    def change(inputs: list[Any]) -> list[Any]:
        return [*inputs[:index], value, *inputs[index + 1 :]]

    return change


class _Refuses:
    """A DLPack producer that cannot export."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("no")


class _OnCuda(_Refuses):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_replace(0, np.ones((2, 3, 5))), ArgumentTypeError, "dy must be float32"),
        (_replace(0, np.ones((2, 3, 5), int)), ArgumentTypeError, "but it is int64"),
        (_replace(2, np.ones(3, object)), ArgumentTypeError, "but it is object"),
        (_replace(1, np.ones((2, 3, 5), ">f4")), ArgumentTypeError, "byte order '>'"),
        (_replace(1, np.ones((2, 3), F)), ArgumentError, "x must have rank 3"),
        (_replace(1, np.float32(1)), ArgumentTypeError, "x must be a numpy array"),
        (_replace(1, np.ones((2, 3, 6), F)), ArgumentError, "L = 5 along axis 2, as dy"),
        (_replace(1, np.ones((3, 3, 5), F)), ArgumentError, "N = 2 along axis 0, as dy"),
        (_replace(0, np.ones((2, 4, 5), F)), ArgumentError, "extent 3 along axis 1"),
        (_replace(2, np.ones(4, F)), ArgumentError, "gamma must have extent 3"),
        (_replace(3, np.ones((2, 3, 2), F)), ArgumentError, "mean must have extent 1"),
        (_replace(2, [1.0, 1.0, 1.0]), ArgumentTypeError, "gamma must be a numpy array"),
        (_replace(2, None), ArgumentTypeError, "but it is NoneType"),
        (_replace(2, np.ma.ones(3, F)), ArgumentTypeError, "masked array"),
        (_replace(2, _Refuses()), ArgumentTypeError, "all arrays of a call must be of one kind"),
        (lambda inputs: [_Refuses()] * 5, ArgumentTypeError, "cannot be exported"),
        (lambda inputs: [_OnCuda()] * 5, ArgumentError, "must be on the CPU"),
        (lambda inputs: inputs[:4], ArgumentTypeError, "inv_std missing"),
        (lambda inputs: [], ArgumentTypeError, "dy, x, gamma, mean, inv_std missing"),
        (lambda inputs: [*inputs, inputs[0]], ArgumentTypeError, "expected 5 arrays, but 6 came"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_bad_inputs(
    op: Any, toy: Any, change: Any, error: type[Exception], message: str, warm: bool
) -> None:
    inputs = toy.inputs("backward")
    if warm:
        op.backward(*inputs)
    with pytest.raises(error) as caught:
        op.backward(*change(inputs))
    assert str(caught.value).startswith("backward: ")
    assert message in str(caught.value)


def test_names_that_are_wrong_or_double(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    with pytest.raises(ArgumentTypeError, match="no argument 'rstd'; it takes dy, x, gamma"):
        op.backward(*inputs[:4], rstd=inputs[4])
    with pytest.raises(ArgumentTypeError, match="x was given twice"):
        op.backward(*inputs[:4], x=inputs[1])


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (np.ones((2, 3, 5)), ArgumentTypeError, "must be float32"),
        (np.ones((2, 3, 5), ">f4"), ArgumentTypeError, "byte order"),
        (np.ones((2, 3, 6), F), ArgumentError, "must have shape (2, 3, 5)"),
        (np.ones((30,), F), ArgumentError, "must have shape (2, 3, 5)"),
        (np.ones((2, 3, 10), F)[:, :, ::2], ArgumentError, "it is strided"),
        (np.ones((2, 3, 5), F, order="F"), ArgumentError, "it is strided"),
        (np.zeros(121, "u1")[1:].view(F).reshape(2, 3, 5), ArgumentError, "not aligned"),
        ([1.0], ArgumentTypeError, "must be a numpy array"),
        (_Refuses(), ArgumentTypeError, "must be of one kind"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_bad_outputs(
    op: Any, toy: Any, output: Any, error: type[Exception], message: str, warm: bool
) -> None:
    inputs = toy.inputs("inference")
    if warm:
        op.inference(*inputs)
    before = np.array(output) if isinstance(output, np.ndarray) else None
    with pytest.raises(error) as caught:
        op.inference(*inputs, out={"y": output})
    assert "out['y']" in str(caught.value)
    assert message in str(caught.value)
    if before is not None:
        np.testing.assert_array_equal(output, before)


def test_a_read_only_output(op: Any, toy: Any) -> None:
    inputs = toy.inputs("inference")
    y = np.zeros((2, 3, 5), F)
    y.flags.writeable = False
    for _ in range(2):
        with pytest.raises(ArgumentError, match="must be writable"):
            op.inference(*inputs, out={"y": y})
    assert not y.any()


@pytest.mark.parametrize("warm", [False, True])
def test_an_output_that_overlaps_an_input(op: Any, toy: Any, warm: bool) -> None:
    x, *rest = toy.inputs("inference")
    if warm:
        op.inference(x, *rest)
    block = np.ones((3, 3, 5), F)
    for given, y in [(x, x), (x, x[:]), (block[:2], block[1:]), (block[1:], block[:2])]:
        before = y.copy()
        with pytest.raises(ArgumentError, match="must not share memory with x"):
            op.inference(given, *rest, out={"y": y})
        np.testing.assert_array_equal(y, before)


@pytest.mark.parametrize("warm", [False, True])
def test_outputs_that_overlap_each_other(op: Any, toy: Any, warm: bool) -> None:
    inputs = toy.inputs("backward")
    if warm:
        op.backward(*inputs)
    one = np.ones(3, F)
    block = np.ones(4, F)
    for dgamma, dbeta in [(one, one), (one, one[:]), (block[:3], block[1:])]:
        with pytest.raises(ArgumentError, match=r"share memory with out\['dgamma'\]"):
            op.backward(*inputs, out={"dgamma": dgamma, "dbeta": dbeta})
    assert block.all()


def test_running_statistics_overlap_only_as_themselves(op: Any, toy: Any) -> None:
    inputs = toy.inputs("forward")
    op.forward(*inputs)
    mean, var = inputs[3], inputs[4]
    with pytest.raises(ArgumentError, match="share memory with running_var"):
        op.forward(*inputs, out={"new_running_mean": var})
    with pytest.raises(ArgumentError, match="share memory with running_mean"):
        op.forward(*inputs, out={"new_running_mean": mean, "new_running_var": mean})
    block = np.ones(4, F)
    with pytest.raises(ArgumentError, match="share memory with running_mean"):
        op.forward(*inputs[:3], block[:3], var, inputs[5], out={"new_running_mean": block[1:]})
    with pytest.raises(ArgumentError, match='"add" needs an array of its own'):
        op.forward(*inputs, out={"new_running_mean": mean}, grad_req={"new_running_mean": "add"})
    shared = np.ones(3, F)
    with pytest.raises(ArgumentError, match="share memory with running_var"):
        op.forward(*inputs[:3], shared, shared, inputs[5], out={"new_running_mean": shared})


def test_strided_inputs_are_copied_or_refused(op: Any, toy: Any) -> None:
    x, *rest = toy.inputs("inference")
    answer = toy.outputs("inference", [x, *rest])["y"]
    wide = np.zeros((2, 3, 10), F)
    wide[:, :, ::2] = x
    for strided in (wide[:, :, ::2], np.asfortranarray(x), x[::-1][::-1].transpose(1, 0, 2)[:]):
        if strided.shape != x.shape:
            strided = strided.transpose(1, 0, 2).copy(order="F")
        np.testing.assert_array_equal(op.inference(strided, *rest), answer)
        with pytest.raises(ArgumentError, match=r"copy=False, but it is strided"):
            op.inference(strided, *rest, copy=False)
    np.testing.assert_array_equal(op.inference(x, *rest, copy=False), answer)


def test_broadcast_input(op: Any, toy: Any) -> None:
    x, *rest = toy.inputs("inference")
    x = np.broadcast_to(x[:1, :1, :1], (2, 3, 5))
    answer = toy.outputs("inference", [x, *rest])["y"]
    np.testing.assert_array_equal(op.inference(x, *rest), answer)


@pytest.mark.parametrize("kind", ["forward", "inference", "backward"])
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 12])
def test_any_alignment(op: Any, toy: Any, kind: str, offset: int) -> None:
    """Memory that starts anywhere: not at a multiple of the element (copied), or of 64 bytes."""
    inputs = toy.inputs(kind)
    moved = []
    for array in inputs:
        memory = np.zeros(array.nbytes + offset, np.uint8)
        view = memory[offset:].view(F).reshape(array.shape)
        view[...] = array
        moved.append(view)
    result = op.call(kind, *moved)
    result = result if isinstance(result, tuple) else (result,)
    for got, answer in zip(result, toy.outputs(kind, inputs).values(), strict=True):
        np.testing.assert_array_equal(got, answer)
    if offset % 4:
        with pytest.raises(ArgumentError, match="not aligned to its element size"):
            op.call(kind, *moved, copy=False)


def test_an_extent_of_one_with_odd_strides(op: Any, toy: Any) -> None:
    """NumPy counts these as contiguous, whatever the stride of the axis of extent 1."""
    x, *rest = toy.inputs("inference", n=1)
    odd = np.repeat(x, 7, axis=0)[::7]
    assert odd.flags.c_contiguous
    assert odd.strides != x.strides
    for _ in range(2):
        np.testing.assert_array_equal(
            op.inference(odd, *rest, copy=False), toy.outputs("inference", [x, *rest])["y"]
        )


def test_read_only_inputs_are_not_copied(op: Any, toy: Any, tmp_path: Any) -> None:
    x, *rest = toy.inputs("inference")
    answer = toy.outputs("inference", [x, *rest])["y"]
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert not mapped.flags.writeable
    for array in (x, *rest):
        array.flags.writeable = False
    for given in (mapped, x):
        result = op.inference(given, *rest, copy=False)
        assert type(result) is np.ndarray
        np.testing.assert_array_equal(result, answer)


def test_a_subclass_gives_plain_arrays(op: Any, toy: Any) -> None:
    class Mine(np.ndarray):
        pass

    x, *rest = toy.inputs("inference")
    result = op.inference(x.view(Mine), *rest)
    assert type(result) is np.ndarray


def test_bfloat16_without_its_package(toy: Any) -> None:
    """Results have the dtype object of the inputs; bits as integers are refused."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    op = toy.operator("bfloat16")
    for kind in op.kinds:
        inputs = toy.inputs(kind, dtype=ml_dtypes.bfloat16)
        inputs[0].flags.writeable = False
        result = op.call(kind, *inputs)
        result = result if isinstance(result, tuple) else (result,)
        specs = op.signature(kind).outputs
        for spec, got, answer in zip(
            specs, result, toy.outputs(kind, inputs).values(), strict=True
        ):
            assert got.dtype == spec.dtype
            np.testing.assert_array_equal(got.astype(np.float64), answer)
    inputs = toy.inputs("backward", dtype=ml_dtypes.bfloat16)
    acc = np.full(3, 2, ml_dtypes.bfloat16)
    op.backward(*inputs, want="dbeta", out={"dbeta": acc}, grad_req="add")
    answer = toy.outputs("backward", inputs)["dbeta"] + 2
    np.testing.assert_array_equal(acc.astype(np.float64), answer)
    strided = [inputs[0].copy(order="F"), *inputs[1:]]
    np.testing.assert_array_equal(
        op.backward(*strided).dx.astype(np.float64), toy.outputs("backward", inputs)["dx"]
    )
    with pytest.raises(ArgumentTypeError, match="dy must be bfloat16"):
        op.backward(inputs[0].view(np.uint16), *inputs[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_backward_from_output_with_a_zero_in_gamma(toy: Any, dtype: str) -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    op = toy.operator(dtype)
    inputs = toy.inputs("backward_from_output", dtype=kind)
    for zero in (0.0, -0.0):
        for _ in range(2):
            inputs[2][:] = (1, zero, zero)
            with pytest.raises(ArgumentError, match=r"gamma\[1\] is 0 \(2 of 3 elements"):
                op.backward_from_output(*inputs)
            inputs[2][:] = (1, np.nan, 1e-30)
            op.backward_from_output(*inputs)
            inputs[2][:] = 1
            op.backward_from_output(*inputs)


def test_nothing_warns(op: Any, toy: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.backward(*toy.inputs("backward"))
