"""What is linked into a library: it runs with tvm_ffi alone, and the same way where TVM is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph.compile import link, resolve
from normgraph.errors import CompileError, ToolMissing

# Runs every kind of each library twice on inputs from a file; prints a hash of all outputs.
# argv: whether TVM is loaded first, then libraries and their inputs by turns.
_RUN = """
import ctypes, hashlib, os, sys
import numpy as np
refused = {"torch"}  # tvm_ffi imports it where it is, and it takes seconds
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
if sys.argv[1] == "tvm":
    import tvm
else:
    refused |= {"tvm", "onnx", "normgraph"}
    try:
        import tvm
    except ImportError:
        pass
    else:
        raise SystemExit("tvm was imported")
import tvm_ffi
for library, inputs in zip(sys.argv[2::2], sys.argv[3::2]):
    ctypes.CDLL(library, os.RTLD_NOW)  # no symbol is left undefined
    module, data = tvm_ffi.load_module(library), np.load(inputs)
    seen = []
    for turn in range(2):
        bits = hashlib.sha256()
        for kind in sorted({key.split(".")[0] for key in data}):
            keys = sorted(k for k in data if k.split(".")[0] == kind)
            given = [data[k] for k in keys if ".in." in k]
            made = [np.full(data[k], np.nan, np.float32) for k in keys if ".out." in k]
            module[kind](*given, *made, sum(1 << 2 * k for k in range(len(made))))
            for array in made:
                assert not np.isnan(array).any(), kind
                bits.update(array.tobytes())
        seen.append(bits.hexdigest())
    assert seen[0] == seen[1], "two runs differ"
    print(seen[0])
"""

# Large enough for parallel loops.
_SIZES = {"N": 9, "H": 41, "W": 23, "T": 113}


def test_same_bits_without_tvm_and_with_any_number_of_threads(
    row: Callable[..., Any], tmp_path: Path
) -> None:
    operators = ("batch_norm", "instance_norm", "group_norm", "layer_norm")
    arguments: list[str] = []
    for op in operators:
        kernels = row(op)
        data: dict[str, NDArray[Any]] = {}
        for kind in kernels.kinds:
            inputs = kernels.inputs(kind, _SIZES)
            for place, value in enumerate(inputs.values()):
                data[f"{kind}.in.{place}"] = value
            for place, shape in enumerate(kernels.shapes(kind, inputs).values()):
                data[f"{kind}.out.{place}"] = np.array(shape)
        np.savez(tmp_path / f"{op}.npz", **data)  # type: ignore[arg-type]
        arguments += [str(kernels.path), str(tmp_path / f"{op}.npz")]
    alone = _run(arguments, "alone", 1)
    assert len(alone) == len(operators)
    assert _run(arguments, "alone", 2) == alone
    assert _run(arguments, "alone", 5) == alone
    assert _run(arguments, "tvm", 2) == alone


def _run(arguments: list[str], how: str, threads: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, how, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "NORMGRAPH_NUM_THREADS": str(threads)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def _symbols(library: Path, which: str) -> list[str]:
    done = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in done.stdout.splitlines()]


def test_nothing_but_the_kernels_is_exported(row: Callable[..., Any]) -> None:
    """So the loader cannot put TVM's pool in place of ours, nor another library its functions."""
    kernels = row("layer_norm")
    exported = _symbols(kernels.path, "--defined-only")
    assert sorted(exported) == sorted(f"__tvm_ffi_{kind}" for kind in kernels.kinds)


def test_a_library_needs_an_old_c_library_and_tvm_ffi(row: Callable[..., Any]) -> None:
    """glibc 2.17 is what the wheels of NumPy and tvm_ffi need at least."""
    needed = _symbols(row("layer_norm").path, "--undefined-only")
    versions = {name.partition("@GLIBC_")[2] for name in needed if "@GLIBC_" in name}
    newest = max(tuple(map(int, version.split("."))) for version in versions)
    assert newest <= (2, 17), needed
    assert "TVMFFIErrorSetRaisedFromCStrParts" in needed
    assert not any(name.startswith(("TVMBackend", "_ZN3tvm")) for name in needed)


def test_a_symbol_that_stays_open_stops_the_build(tmp_path: Path) -> None:
    source = tmp_path / "kernel.c"
    source.write_text(
        "int TVMBackendParallelBarrier(int, void*);\n"
        "int __tvm_ffi_kernel(void) { return TVMBackendParallelBarrier(0, 0); }\n"
    )
    goal = resolve("cpu")
    subprocess.run(
        [str(link.compiler(goal)), "-fPIC", "-c", str(source), "-o", str(tmp_path / "kernel.o")],
        check=True,
    )
    with pytest.raises(CompileError, match="needs TVMBackendParallelBarrier"):
        link.link(tmp_path / "kernel.o", tmp_path / "kernel.so", goal)


def test_no_c_compiler_is_a_missing_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ToolMissing, match=r"C compiler.*apt-get install gcc"):
        link.link(tmp_path / "a.o", tmp_path / "a.so", resolve("cpu"))


def test_cc_is_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "my-cc"
    own.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    own.chmod(0o755)
    monkeypatch.setenv("CC", str(own))
    assert link.compiler(resolve("cpu")) == str(own)
    with pytest.raises(CompileError, match=r"status 3(.|\n)*out of order"):
        link.link(tmp_path / "a.o", tmp_path / "a.so", resolve("cpu"))


def test_a_cross_target_asks_for_its_own_linker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    other = resolve("aarch64" if os.uname().machine == "x86_64" else "x86-64-v2")
    assert link.compiler(other) is None
    assert not link.link(tmp_path / "a.o", tmp_path / "a.so", other)
    cross = tmp_path / f"{other.triple}-gcc"
    cross.write_text("#!/bin/sh\necho /bin/true\n")
    cross.chmod(0o755)
    assert link.compiler(other) == str(cross)
    assert link.link(tmp_path / "a.o", tmp_path / "a.so", other)
