"""Conversions of half types, one by one and in vectors, at every level this machine runs.

A level has an instruction for float16 (x86-64-v3 on) or none; this machine may have one for
bfloat16 as well, which takes numbers below 2^-126 for zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx

from normgraph import NormSpec
from normgraph.compile import codegen, half_types, link, resolve
from normgraph.compile.tir import cast, i64, loop, plus, times, vector_loop
from normgraph.cpu import levels
from normgraph.graphs import build

Array = NDArray[Any]

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LANES = (1, 4, 16, 64)
# The least float32 of full precision, which is that of bfloat16.
LEAST = 2.0**-126
Convert = Callable[[str, Array], Array]


def _conversion(source: str, to: str, lanes: int) -> Any:
    vectors = tirx.Var("vectors", "int64")
    size = times(vectors, i64(lanes))
    a, b = (
        tirx.decl_buffer((size,), each, name, data_alignment=2 if "16" in each else 4)
        for each, name in ((source, "a"), (to, "b"))
    )

    def convert(k: Any, lane: Any) -> Any:
        at = plus(times(k, i64(lanes)), lane)
        return tirx.BufferStore(b, cast(to, tirx.BufferLoad(a, [at])), [at])

    body = loop(vectors, lambda k: vector_loop(lanes, lambda lane: convert(k, lane)), name="k")
    return tirx.PrimFunc([a, b, vectors], body).with_attr("tirx.noalias", False)


class Conversions:
    """A library for one target: widen_<type> and narrow_<type>, to and from float32."""

    def __init__(self, target: str, folder: Path) -> None:
        functions = {}
        for half in HALF:
            for lanes in LANES:
                functions[f"widen_{half}{lanes}"] = _conversion(half, "float32", lanes)
                functions[f"narrow_{half}{lanes}"] = _conversion("float32", half, lanes)
        goal = resolve(target)
        codegen.generate(functions, goal.to_tvm()).write_to_file(str(folder / "k.o"), "o")
        assert link.link(folder / "k.o", folder / "k.so", goal)
        self.module = tvm_ffi.load_module(str(folder / "k.so"))
        self.flushes = "avx512bf16" in goal.features

    def run(self, name: str, lanes: int, values: Array, dtype: np.dtype[Any]) -> Array:
        """`values` converted; their number is a multiple of `lanes`."""
        made = tvm.runtime.tensor(np.zeros(values.shape, dtype))
        function = self.module[f"{name}{lanes}"]
        function(tvm.runtime.tensor(values), made, values.size // lanes)
        return np.asarray(made.numpy())


@pytest.fixture(scope="module", params=[*levels(), "cpu"])
def conversions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Conversions:
    return Conversions(request.param, tmp_path_factory.mktemp("conversions"))


def _every(dtype: np.dtype[Any]) -> Array:
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("half", HALF)
def test_every_half_value_is_widened_exactly(
    half: str, lanes: int, conversions: Conversions
) -> None:
    values = _every(HALF[half])
    got = conversions.run(f"widen_{half}", lanes, values, np.dtype(np.float32))
    want = values.astype(np.float32)
    number = ~np.isnan(want)
    assert np.array_equal(np.isnan(got), ~number)
    assert np.array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])


def _float32_to_round(dtype: np.dtype[Any]) -> Array:
    """Every half value, every middle between two, the float32 next to it on either side; NaN of any
    bits; and of each of the 512 exponents with a sign a thousand numbers."""
    finite = np.sort(_every(dtype).astype(np.float32))
    finite = finite[np.isfinite(finite)]
    beyond = finite[-1] + (finite[-1] - finite[-2]) / np.float32(2)  # rounds to infinity
    middle = np.concatenate([finite[:-1] / 2 + finite[1:] / 2, [beyond, -beyond]])
    middle = middle.astype(np.float32)
    infinity = np.float32(np.inf)
    special = np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45], np.float32)
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFF00, 0x7F800001, 0xFF802000], np.uint32)
    exponents = np.repeat(np.arange(512, dtype=np.uint32) << 23, 1000)
    drawn = exponents + np.random.default_rng(0).integers(0, 1 << 23, exponents.size, np.uint32)
    values = np.concatenate(
        [
            finite,
            middle,
            np.nextafter(middle, infinity),
            np.nextafter(middle, -infinity),
            special,
            nan.view(np.float32),
            drawn.view(np.float32),
        ]
    )
    return np.resize(values, -(-values.size // max(LANES)) * max(LANES))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("half", HALF)
def test_float32_is_rounded_to_the_nearest_half_and_ties_to_even(
    half: str, lanes: int, conversions: Conversions
) -> None:
    values = _float32_to_round(HALF[half])
    got = conversions.run(f"narrow_{half}", lanes, values, HALF[half])
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(HALF[half])
    number = ~np.isnan(values)
    assert np.array_equal(np.isnan(got.astype(np.float32)), ~number)
    wrong = (got.view(np.uint16) != want.view(np.uint16)) & number
    if half == "bfloat16" and conversions.flushes:
        tiny = np.abs(values) < LEAST
        assert not got[tiny].astype(np.float32).any()
        wrong &= ~tiny
    assert not wrong.any(), (values[wrong][:4], got[wrong][:4], want[wrong][:4])


@pytest.mark.parametrize(
    ("cpu", "float16", "bfloat16"),
    [
        ("x86-64-v2", False, False),
        ("x86-64-v3", True, False),
        ("x86-64-v4", True, False),
        ("znver4", True, True),
        ("sapphirerapids", True, True),
        ("aarch64", True, False),
    ],
)
def test_the_instructions_of_a_cpu_are_used(cpu: str, float16: bool, bfloat16: bool) -> None:
    text = half_types.functions(resolve(cpu).to_tvm())
    assert ("fptrunc <8 x float> %v to <8 x half>" in text) == float16
    assert ("fptrunc <8 x float> %v to <8 x bfloat>" in text) == bfloat16


@pytest.mark.parametrize("half", HALF)
def test_an_added_output_is_rounded_once(half: str, build_operator: Callable[..., Any]) -> None:
    """-u/4 + (1 + u/2 + u/64) is 1 and less than half of u; of the rounded 1 + u it would be 1 + u
    less a quarter."""
    spec = NormSpec("rms_norm", eps=0, param_dtype="float32")
    op = build_operator(spec, ("N", 48), half, ("inference",))
    unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[half]
    gamma = np.full(48, 1 + unit / 2 + unit / 64, np.float32)
    x = np.ones((3, 48), HALF[half])
    assert op.inference(x, gamma).astype(np.float32)[0, 0] == 1 + unit
    total = np.full(x.shape, -unit / 4, HALF[half])
    op.inference(x, gamma, out={"y": total}, grad_req="add")
    np.testing.assert_array_equal(total.astype(np.float32), np.ones(x.shape, np.float32))


# At each length both operators and both types, which change places from one length to the next.
@pytest.mark.parametrize(
    ("op", "length", "half"),
    [
        (op, length, half)
        for number, length in enumerate((3, 16, 37, 2048, 2049))
        for op, half in zip(
            ("layer_norm", "rms_norm"), sorted(HALF, reverse=bool(number % 2)), strict=True
        )
    ],
)
def test_parameters_along_a_row(
    op: str, length: int, half: str, compile_models: Callable[..., Any]
) -> None:
    """Up to 2048 of them are widened once, in vectors and what is left one by one."""
    spec = NormSpec(op).resolve(half)
    models = {kind: build(spec, kind, ("N", length), half) for kind in ("forward", "backward")}
    kernels = compile_models(spec, models)
    for kind in models:
        for rows in (1, 70):
            kernels.check(kind, kernels.inputs(kind, {"N": rows}))
