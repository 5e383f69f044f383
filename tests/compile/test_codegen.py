"""Lowering: the two places where TVM's own way gives wrong code, on functions as ours are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx

from normgraph import NormSpec
from normgraph.compile import codegen, link, resolve
from normgraph.compile.tir import bind, both, cast, demand, i64, loop, seq, when
from normgraph.graphs import build

Build = Callable[..., Any]


@pytest.fixture
def packed(tmp_path: Path) -> Build:
    """packed(func): the compiled function, without TVM's own passes for scheduled functions."""

    def make(func: Any) -> Any:
        goal = resolve("cpu")
        codegen.generate({"f": func}, goal.to_tvm()).write_to_file(str(tmp_path / "f.o"), "o")
        assert link.link(tmp_path / "f.o", tmp_path / "f.so", goal)
        return tvm_ffi.load_module(str(tmp_path / "f.so"))["f"]

    return make


def test_an_if_else_chain_in_a_parallel_loop_keeps_every_branch(packed: Build) -> None:
    """HoistIfThenElse, in TVM's list, drops the first branch; requests are just such a chain."""
    mode = tirx.Var("mode", "int64")
    size = tirx.Var("size", "int64")
    out = tirx.decl_buffer((size,), "float32", "out", data_alignment=4)

    def put(value: float) -> Callable[[Any], Any]:
        return lambda i: tirx.BufferStore(out, tirx.const(value, "float32"), [i])

    def body(i: Any) -> Any:
        third = when(tirx.EQ(mode, i64(2)), put(3.0)(i))
        second = when(tirx.EQ(mode, i64(1)), put(2.0)(i), third)
        return when(both([tirx.EQ(mode, i64(0)), tirx.EQ(mode, i64(0))]), put(1.0)(i), second)

    func = tirx.PrimFunc([out, mode], loop(size, body, name="i", kind="parallel"))
    run = packed(func.with_attr("tirx.noalias", False))
    for choice, value in ((0, 1.0), (1, 2.0), (2, 3.0), (3, -1.0)):
        array = np.full(37, -1.0, np.float32)
        run(array, choice)
        np.testing.assert_array_equal(array, np.full(37, value, np.float32))


def test_a_bfloat16_value_kept_in_front_of_a_loop(packed: Build) -> None:
    a = tirx.decl_buffer((1,), "bfloat16", "a", data_alignment=2)
    x = tirx.decl_buffer((33,), "float32", "x", data_alignment=4)
    before: list[Any] = []
    value = bind("fixed", cast("float32", tirx.BufferLoad(a, [i64(0)])), before, "float32")
    each = loop(
        i64(33),
        lambda i: tirx.BufferStore(x, tirx.Mul(tirx.BufferLoad(x, [i]), value), [i]),
        name="i",
    )
    run = packed(tirx.PrimFunc([a, x], seq([*before, each])).with_attr("tirx.noalias", False))
    array = np.arange(33, dtype=np.float32)
    run(tvm.runtime.tensor(np.asarray([1.5], ml_dtypes.bfloat16)), array)
    np.testing.assert_array_equal(array, 1.5 * np.arange(33))


def test_x_minus_x_is_not_folded(packed: Build) -> None:
    """It is 0 for numbers, and NaN for infinities and NaN."""
    x = tirx.decl_buffer((3,), "float32", "x", data_alignment=4)
    body = loop(
        i64(3),
        lambda i: tirx.BufferStore(
            x, tirx.Sub(tirx.BufferLoad(x, [i]), tirx.BufferLoad(x, [i])), [i]
        ),
        name="i",
    )
    array = np.array([1.0, np.inf, np.nan], np.float32)
    packed(tirx.PrimFunc([x], body).with_attr("tirx.noalias", False))(array)
    np.testing.assert_array_equal(array, np.array([0.0, np.nan, np.nan], np.float32))


def test_demand_raises_with_its_message(packed: Build) -> None:
    n = tirx.Var("n", "int64")
    out = tirx.decl_buffer((1,), "float32", "out", data_alignment=4)
    store = tirx.BufferStore(out, tirx.const(1.0, "float32"), [i64(0)])
    func = tirx.PrimFunc([out, n], seq([demand(tirx.GT(n, i64(2)), "n is too small"), store]))
    run = packed(func.with_attr("tirx.noalias", False))
    array = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="n is too small"):
        run(array, 2)
    assert array[0] == 0
    run(array, 3)
    assert array[0] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_parameters_along_a_slice_are_read_right(
    dtype: str, compile_models: Callable[..., Any]
) -> None:
    """gamma and beta of a channel are half values in front of the loop over its elements."""
    spec = NormSpec("instance_norm")
    models = {kind: build(spec, kind, ("N", 3, "L"), dtype) for kind in ("forward", "backward")}
    kernels = compile_models(spec, models)
    for kind in models:
        inputs = kernels.inputs(kind, {"N": 2, "L": 9})
        inputs["gamma"] = np.array([2, -3, 0.5]).astype(inputs["gamma"].dtype)
        kernels.check(kind, inputs)
