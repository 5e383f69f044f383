"""Kernels of every target level this machine runs, against float64 NumPy.

`--every-level` runs every operator in every dtype at each of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
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
from normgraph.compile import codegen, link, resolve
from normgraph.compile.tir import cast, loop
from normgraph.cpu import LEVELS, levels
from normgraph.graphs import build as build_graph
from normgraph.graphs import kinds

Array = NDArray[Any]

OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
DTYPES = ("float16", "bfloat16", "float32", "float64")
# One element a plane; one slice; primes; 7 x 7; rows of one vector and an element, and of one less,
# at every width; above the size where loops are parallel.
PLANES = ((3, 1, 1), (1, 5, 7), (2, 7, 7), (3, 1, 15), (3, 1, 17), (2, 1, 31), (2, 1, 33),
          (53, 2, 3), (1, 1, 1021), (3, 61, 67))  # fmt: skip
LINES = ((1, 1), (3, 5), (1, 16), (61, 17))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """At each level every operator, in one dtype that differs by level and operator, or in all."""
    if "case" in metafunc.fixturenames:
        cases = [
            (level, op, dtype)
            for place, level in enumerate(levels())
            for index, op in enumerate(OPS)
            for number, dtype in enumerate(DTYPES)
            if number == (place + index) % 4 or metafunc.config.getoption("--every-level")
        ]
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


def test_every_kind_at_every_level(
    case: tuple[str, str, str],
    rows: Mapping[str, tuple[NormSpec, tuple[int | str, ...]]],
    compile_models: Callable[..., Any],
) -> None:
    level, op, dtype = case
    spec, shape = rows[op]
    spec = spec.resolve(dtype)
    models = {kind: build_graph(spec, kind, shape, dtype) for kind in kinds(spec)}
    kernels = compile_models(spec, models, target=level)
    sizes = [dict(zip("NT", each, strict=True)) for each in LINES]
    if len(shape) == 4:
        sizes = [dict(zip("NHW", each, strict=True)) for each in PLANES]
    for seed, size in enumerate(sizes):
        for kind in kernels.kinds:
            for mean in (0.0, 30.0):
                kernels.check(kind, kernels.inputs(kind, size, seed=seed, mean=mean))


def test_this_machine_runs_a_level() -> None:
    assert levels()
    assert levels() == [name for name in levels() if resolve(name).runs_here]


def test_the_levels_are_those_of_llvm() -> None:
    """The psABI names two features more, which concern no generated code."""
    for machine in LEVELS.values():
        for level, features in machine.items():
            assert set(features) - {"cx16", "sahf"} == set(resolve(level).features)


# Conversions of half types: an instruction where the CPU has it (F16C is x86-64-v3, bfloat16 is
# arithmetic on bits everywhere), else a function that has to be in the library.

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _conversion(source: str, to: str) -> Any:
    count = tirx.Var("count", "int64")
    a, b = (tirx.decl_buffer((count,), each, name) for each, name in ((source, "a"), (to, "b")))

    def convert(i: Any) -> Any:
        return tirx.BufferStore(b, cast(to, tirx.BufferLoad(a, [i])), [i])

    body = loop(count, convert, name="i")
    return tirx.PrimFunc([a, b], body).with_attr("tirx.noalias", False)


@pytest.fixture(scope="module", params=levels())
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of one level: widen_<type> and narrow_<type>, to and from float32."""
    functions = {f"widen_{half}": _conversion(half, "float32") for half in HALF}
    functions |= {f"narrow_{half}": _conversion("float32", half) for half in HALF}
    target, folder = resolve(request.param), tmp_path_factory.mktemp("conversions")
    codegen.generate(functions, target.to_tvm()).write_to_file(str(folder / "k.o"), "o")
    assert link.link(folder / "k.o", folder / "k.so", target)
    return folder / "k.so"


def _converted(library: Path, name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    made = tvm.runtime.tensor(np.zeros(values.shape, dtype))
    tvm_ffi.load_module(str(library))[name](tvm.runtime.tensor(values), made)
    return np.asarray(made.numpy())


def _every(dtype: np.dtype[Any]) -> Array:
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize("half", HALF)
def test_every_half_value_is_widened_exactly(half: str, conversions: Path) -> None:
    values = _every(HALF[half])
    got = _converted(conversions, f"widen_{half}", values, np.dtype(np.float32))
    want = values.astype(np.float32)
    number = ~np.isnan(want)
    assert np.array_equal(np.isnan(got), ~number)
    assert np.array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])


@pytest.mark.parametrize("half", HALF)
def test_float32_is_rounded_to_the_nearest_half_and_ties_to_even(
    half: str, conversions: Path
) -> None:
    """Every half value, every middle between two, and the float32 next to it on either side."""
    finite = np.sort(_every(HALF[half]).astype(np.float32))
    finite = finite[np.isfinite(finite)]
    beyond = finite[-1] + (finite[-1] - finite[-2]) / np.float32(2)  # rounds to infinity
    middle = np.concatenate([finite[:-1] / 2 + finite[1:] / 2, [beyond, -beyond]])
    middle = middle.astype(np.float32)
    infinity = np.float32(np.inf)
    values = np.concatenate(
        [
            finite,
            middle,
            np.nextafter(middle, infinity),
            np.nextafter(middle, -infinity),
            np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45], np.float32),
        ]
    )
    got = _converted(conversions, f"narrow_{half}", values, HALF[half])
    with np.errstate(over="ignore"):
        want = values.astype(HALF[half])
    number = ~np.isnan(values)
    assert np.array_equal(np.isnan(got.astype(np.float32)), ~number)
    wrong = (got.view(np.uint16) != want.view(np.uint16)) & number
    assert not wrong.any(), (values[wrong][:4], got[wrong][:4], want[wrong][:4])


# What a library may ask of the process: the C library, and tvm-ffi.
_ALLOWED = {"free", "memcpy", "memmove", "memset", "posix_memalign"}


def test_a_library_needs_the_c_library_and_tvm_ffi_alone(conversions: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(conversions)],
        capture_output=True,
        text=True,
        check=True,
    )
    strong = re.findall(r"^ +U (\w+)", listed.stdout, re.MULTILINE)
    assert {name for name in strong if not name.startswith("TVMFFI")} <= _ALLOWED


# Puts functions of the same names in front: a library that calls them gives other numbers.
_OTHERS = """
float __extendhfsf2(float value) { return value * 0 + 77; }
float __truncsfhf2(float value) { return value * 0; }
"""
_WIDEN = """
import sys, numpy as np, tvm_ffi
made = np.zeros(7, np.float32)
tvm_ffi.load_module(sys.argv[1])["widen_float16"](np.arange(7, dtype=np.float16), made)
print(made.tolist())
"""


def test_a_library_calls_its_own_conversions(conversions: Path, tmp_path: Path) -> None:
    (tmp_path / "others.c").write_text(_OTHERS)
    others = str(tmp_path / "others.so")
    compiler = str(link.compiler(resolve("cpu")))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", others, str(tmp_path / "others.c")], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", _WIDEN, str(conversions)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": others},
        check=False,
    )
    assert done.stdout.split("\n")[0] == str([float(i) for i in range(7)]), done.stderr
