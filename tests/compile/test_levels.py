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

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx

from normgraph import NormSpec
from normgraph.compile import codegen, link, resolve
from normgraph.compile.tir import loop
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


# What is left of TVM's own casts of float16, in kernels no rule knows: an instruction where the
# CPU has it (F16C is x86-64-v3), else a function that has to be in the library.


def _conversion(source: str, to: str) -> Any:
    count = tirx.Var("count", "int64")
    a, b = (tirx.decl_buffer((count,), each, name) for each, name in ((source, "a"), (to, "b")))

    def convert(i: Any) -> Any:
        return tirx.BufferStore(b, tirx.Cast(to, tirx.BufferLoad(a, [i])), [i])

    body = loop(count, convert, name="i")
    return tirx.PrimFunc([a, b], body).with_attr("tirx.noalias", False)


@pytest.fixture(scope="module", params=levels())
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of one level: widen and narrow, between float16 and float32."""
    functions = {
        "widen": _conversion("float16", "float32"),
        "narrow": _conversion("float32", "float16"),
    }
    target, folder = resolve(request.param), tmp_path_factory.mktemp("conversions")
    codegen.generate(functions, target.to_tvm()).write_to_file(str(folder / "k.o"), "o")
    assert link.link(folder / "k.o", folder / "k.so", target)
    return folder / "k.so"


def test_float16_casts_of_tvm(conversions: Path) -> None:
    module = tvm_ffi.load_module(str(conversions))
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    wide = tvm.runtime.tensor(np.zeros(halves.shape, np.float32))
    module["widen"](tvm.runtime.tensor(halves), wide)
    np.testing.assert_array_equal(wide.numpy(), halves.astype(np.float32))
    numbers = np.random.default_rng(0).uniform(-7e4, 7e4, 2**12).astype(np.float32)
    made = tvm.runtime.tensor(np.zeros(numbers.shape, np.float16))
    module["narrow"](tvm.runtime.tensor(numbers), made)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(made.numpy(), numbers.astype(np.float16))


def test_a_library_needs_the_c_library_and_tvm_ffi_alone(conversions: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(conversions)],
        capture_output=True,
        text=True,
        check=True,
    )
    # A version tells of the library that a symbol is to come from: no compiler's, for one.
    needed = re.findall(r"^ +U (\S+)", listed.stdout, re.MULTILINE)
    others = [name for name in needed if not name.startswith("TVMFFI")]
    assert others
    assert [name for name in others if "@GLIBC_" not in name] == []


# Puts functions of the same names in front: a library that calls them gives other numbers.
_OTHERS = """
float __extendhfsf2(float value) { return value * 0 + 77; }
float __truncsfhf2(float value) { return value * 0; }
"""
_WIDEN = """
import sys, numpy as np, tvm_ffi
made = np.zeros(7, np.float32)
tvm_ffi.load_module(sys.argv[1])["widen"](np.arange(7, dtype=np.float16), made)
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
