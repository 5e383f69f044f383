"""Requests of an output (null, write, add), and what a kernel refuses by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm

from normgraph import NormSpec
from normgraph.graphs import build

NULL, WRITE, ADD = 0, 1, 2
OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
SIZES = {"N": 5, "H": 3, "W": 11, "T": 19}


def _combinations(count: int) -> list[tuple[int, ...]]:
    """Every one of up to three outputs; of five, each alone and each with one other."""
    every = list(itertools.product((NULL, WRITE, ADD), repeat=count))
    if count <= 3:
        return every
    return [c for c in every if sum(r != NULL for r in c) <= 2 or NULL not in c][::3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_combination_of_requests(op: str, dtype: str, row: Callable[..., Any]) -> None:
    kernels = row(op, dtype)
    for kind in kernels.kinds:
        inputs = kernels.inputs(kind, SIZES)
        written = kernels.call(kind, inputs)
        rng = np.random.default_rng(2)
        old = {
            name: rng.standard_normal(value.shape).astype(value.dtype)
            for name, value in written.items()
        }
        for combination in _combinations(len(written)):
            requests = dict(zip(written, combination, strict=True))
            got = kernels.call(kind, inputs, requests, old)
            for name, request in requests.items():
                where = f"{kind} {name} {requests}"
                if request == NULL:
                    np.testing.assert_array_equal(got[name], old[name], where)
                elif request == WRITE:
                    _same(got[name], written[name], where)
                else:
                    _added(got[name], old[name], kernels.answers(kind, inputs)[name], where)


def _same(got: Any, written: Any, where: str) -> None:
    """Equal but for the last bits: another set of outputs may split the loops differently."""
    scale = float(np.max(np.abs(written.astype(np.float64)))) + 1e-3
    unit = 2.0**-7 if got.dtype.itemsize == 2 else 2e-6
    error = np.max(np.abs(got.astype(np.float64) - written.astype(np.float64)))
    assert error <= unit * scale, where


def _added(got: Any, old: Any, answer: Any, where: str) -> None:
    want = old.astype(np.float64) + answer
    bound = 2e-5 * float(np.max(np.abs(answer))) * 20 + 1e-4
    if got.dtype.itemsize == 2:
        bound = bound + 2.0**-8 * np.abs(want)  # rounded once: half a unit
    assert np.all(np.abs(got.astype(np.float64) - want) <= bound), where


@pytest.mark.parametrize("op", OPS)
def test_a_null_output_may_be_a_placeholder_and_is_not_touched(
    op: str, row: Callable[..., Any]
) -> None:
    kernels = row(op)
    for kind in kernels.kinds:
        inputs = kernels.inputs(kind, SIZES)
        written = kernels.call(kind, inputs)
        for left in written:
            requests = dict.fromkeys((n for n in written if n != left), WRITE)
            small = np.full((1,) * written[left].ndim, np.nan, written[left].dtype)
            full = np.full(written[left].shape, np.nan, written[left].dtype)
            for given in (small, full):
                got = kernels.call(kind, inputs, requests, {left: given})
                assert np.isnan(got[left]).all(), (kind, left)
                for name in requests:
                    _same(got[name], written[name], f"{kind} {name} without {left}")


def test_nothing_wanted_touches_nothing(row: Callable[..., Any]) -> None:
    kernels = row("layer_norm")
    got = kernels.call("backward", kernels.inputs("backward", SIZES), {})
    assert all(np.isnan(value).all() for value in got.values())


def test_half_gradients_are_rounded_once(row: Callable[..., Any]) -> None:
    """old + value is rounded to the half type after the sum, not before it."""
    kernels = row("layer_norm", "bfloat16")
    inputs = kernels.inputs("backward", {"N": 7, "T": 61})
    dgamma = kernels.answers("backward", inputs)["dgamma"]
    old = (-dgamma).astype(inputs["gamma"].dtype)
    got = kernels.call("backward", inputs, {"dgamma": ADD}, {"dgamma": old})["dgamma"]
    want = dgamma + old.astype(np.float64)
    assert np.max(np.abs(want)) > 0
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8, atol=1e-4)


def _arguments(kernels: Any, kind: str) -> tuple[list[Any], list[Any]]:
    inputs = kernels.inputs(kind, SIZES)
    shapes = kernels.shapes(kind, inputs)
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes.values()]
    return list(inputs.values()), outputs


def _refused(kernels: Any, kind: str, inputs: list[Any], outputs: list[Any]) -> str:
    """The kernel's message; every output is still NaN."""
    write_all = sum(WRITE << (2 * k) for k in range(len(outputs)))
    with pytest.raises((ValueError, TypeError)) as caught:
        kernels.module[kind](*inputs, *outputs, write_all)
    for output in outputs:
        assert np.isnan(output).all(), "written before the refusal"
    return str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_each_wrong_argument_is_refused_before_anything_is_written(
    op: str, row: Callable[..., Any]
) -> None:
    kernels = row(op)
    for kind in kernels.kinds:
        inputs, outputs = _arguments(kernels, kind)
        for place in range(len(inputs)):
            good = inputs[place]
            for wrong in (
                good.astype(np.float64),
                good[None],
                np.concatenate([good, good]),
                np.repeat(good, 2, axis=-1)[..., ::2],
            ):
                strided = not wrong.flags.c_contiguous
                if wrong.shape == good.shape and wrong.dtype == good.dtype and not strided:
                    continue
                given = [*inputs[:place], wrong, *inputs[place + 1 :]]
                if _fits_another_size(kernels, kind, place, wrong, good):
                    continue
                assert _refused(kernels, kind, given, outputs), (kind, place)


def _fits_another_size(kernels: Any, kind: str, place: int, wrong: Any, good: Any) -> bool:
    """Twice the leading size is right where no other input has that dim."""
    ports = kernels.ports[kind]["inputs"]
    dim = (ports[place]["shape"] or [0])[0]
    elsewhere = any(dim in p["shape"] for k, p in enumerate(ports) if k != place)
    twice = wrong.shape[:1] == (2 * good.shape[0],) if good.ndim else False
    return isinstance(dim, str) and twice and wrong.ndim == good.ndim and not elsewhere


@pytest.mark.parametrize("op", OPS)
def test_each_wrong_output_is_refused(op: str, row: Callable[..., Any]) -> None:
    kernels = row(op)
    for kind in kernels.kinds:
        inputs, outputs = _arguments(kernels, kind)
        for place, good in enumerate(outputs):
            longer = np.full((*good.shape[:-1], good.shape[-1] + 1), np.nan, np.float32)
            apart = np.full((*good.shape[:-1], 2 * good.shape[-1]), np.nan, np.float32)[..., ::2]
            wrongs = [longer, good.astype(np.float64), good[None]]
            if good.size > 1 and not apart.flags.c_contiguous:
                wrongs.append(apart)
            for wrong in wrongs:
                given = [*outputs[:place], wrong, *outputs[place + 1 :]]
                assert _refused(kernels, kind, inputs, given), (kind, place)


def test_a_wrong_output_shape_is_named(row: Callable[..., Any]) -> None:
    kernels = row("instance_norm")
    inputs, outputs = _arguments(kernels, "backward")
    outputs[0] = np.full((5, 6, 3, 12), np.nan, np.float32)
    assert "dx does not have the shape" in _refused(kernels, "backward", inputs, outputs)


def test_a_wrong_count_of_arguments_is_refused(row: Callable[..., Any]) -> None:
    kernels = row("rms_norm")
    inputs, outputs = _arguments(kernels, "forward")
    with pytest.raises(TypeError, match="arguments"):
        kernels.module["forward"](*inputs, *outputs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_pointers_need_no_more_than_an_elements_alignment(
    op: str, dtype: str, row: Callable[..., Any]
) -> None:
    kernels = row(op, dtype)
    for kind in kernels.kinds:
        inputs = kernels.inputs(kind, SIZES)
        want = kernels.call(kind, inputs)
        for offset in (1, 3):
            given = [_shifted(value, offset) for value in inputs.values()]
            made = [_shifted(np.full_like(value, np.nan), offset) for value in want.values()]
            write_all = sum(WRITE << (2 * k) for k in range(len(made)))
            kernels.module[kind](*given, *made, write_all)
            for name, got in zip(want, made, strict=True):
                np.testing.assert_array_equal(got, want[name], f"{kind} {name}")


def _shifted(values: Any, offset: int) -> Any:
    """A copy that begins `offset` elements behind a 64-byte boundary."""
    memory = np.zeros(values.nbytes + 128 + offset * values.itemsize, np.uint8)
    start = -memory.ctypes.data % 64 + offset * values.itemsize
    view = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    assert view.ctypes.data % 64 == offset * values.itemsize
    view[...] = values
    return view


def test_an_input_that_no_node_reads_is_still_an_argument(
    compile_models: Callable[..., Any],
) -> None:
    """Without weight and bias, a frozen backward reads only dy and running_var."""
    spec = NormSpec("batch_norm", weight=False, bias=False)
    model = build(spec, "backward_frozen", ("N", 3, "L"))
    kernels = compile_models(spec, {"backward_frozen": model})
    inputs = kernels.inputs("backward_frozen", {"N": 2, "L": 5})
    assert set(inputs) == {"dy", "x", "running_mean", "running_var"}
    kernels.check("backward_frozen", inputs)
    given = [tvm.runtime.tensor(value) for value in inputs.values()]
    given[1] = tvm.runtime.tensor(np.zeros((2, 3, 6), np.float32))
    with pytest.raises(ValueError, match="shape"):
        kernels.module["backward_frozen"](*given, np.zeros((2, 3, 5), np.float32), WRITE)
