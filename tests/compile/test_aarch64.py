"""Kernels for aarch64, run under qemu-aarch64 from a C program, against float64 NumPy.

Collected where qemu-aarch64 and aarch64-linux-gnu-gcc are on the PATH. `--every-level` runs every
operator in every dtype.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi.libinfo
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.compile import build
from normgraph.graphs import export

Array = NDArray[Any]

# DLPack's type codes.
CODES = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16)}
# The last is above the size where loops are parallel: here all of it is left to one thread.
PLANES = ((3, 1, 1), (1, 5, 7), (2, 7, 7), (2, 31, 37), (53, 2, 3), (1, 1, 1021), (3, 61, 67))
LINES = ((1, 1), (3, 5), (1, 16), (61, 17))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Some operators and dtypes, or all."""
    if "op" in metafunc.fixturenames:
        ops = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
        pairs = list(
            zip(ops, ("bfloat16", "float16", "float64", "float32", "float16"), strict=True)
        )
        pairs += [("batch_norm", "float32"), ("layer_norm", "bfloat16")]
        if metafunc.config.getoption("--every-level"):
            pairs = [(op, dtype) for op in ops for dtype in CODES]
        metafunc.parametrize(("op", "dtype"), pairs)


class Emulated:
    """An emulator, the folder of its C library, and the C program."""

    def __init__(self, folder: Path) -> None:
        gcc = str(shutil.which("aarch64-linux-gnu-gcc"))
        found = subprocess.run(
            [gcc, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
        )
        self.root = Path(found.stdout.strip()).resolve().parent.parent
        self.folder = folder
        self.program = folder / "host"
        source = Path(__file__).with_name("host.c")
        headers = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
        subprocess.run(
            [gcc, "-O1", "-Wall", "-Werror", "-rdynamic", *headers, "-o", str(self.program),
             str(source), "-ldl"],
            check=True,
        )  # fmt: skip

    def run(self, library: Path, calls: bytes) -> bytes:
        """What the program writes for these calls."""
        (self.folder / "calls").write_bytes(calls)
        done = subprocess.run(
            ["qemu-aarch64", "-L", str(self.root), str(self.program), str(library),
             str(self.folder / "calls"), str(self.folder / "results")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        return (self.folder / "results").read_bytes()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("emulated"))


def _array(values: Array, dtype: str) -> bytes:
    values = np.asarray(values, order="C")
    head = struct.pack("<iiiq", *CODES[dtype], values.ndim, values.nbytes)
    return head + struct.pack(f"<{values.ndim}q", *values.shape) + values.tobytes()


def _call(kernels: Any, kind: str, inputs: Mapping[str, Array], made: Mapping[str, Array]) -> bytes:
    ports = kernels.ports[kind]
    arrays = [(inputs[p["name"]], p["dtype"]) for p in ports["inputs"]]
    arrays += [(made[p["name"]], p["dtype"]) for p in ports["outputs"]]
    request = sum(1 << 2 * k for k in range(len(made)))
    head = struct.pack("<i", len(kind)) + kind.encode()
    head += struct.pack("<qii", request, len(arrays), len(made))
    return head + b"".join(_array(values, dtype) for values, dtype in arrays)


def test_every_kind_on_aarch64(
    op: str,
    dtype: str,
    emulated: Emulated,
    rows: Mapping[str, tuple[NormSpec, tuple[int | str, ...]]],
    ports_only: Callable[..., Any],
    tmp_path: Path,
) -> None:
    spec, shape = rows[op]
    export(spec, shape=shape, dtype=dtype, out=tmp_path / "graphs")
    path = build(tmp_path / "graphs", "aarch64", tmp_path / "artifact", self_test=False)
    (library,) = path.glob("kernels-aarch64-*.so")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    kernels = ports_only(NormSpec.from_dict(manifest["spec"]), manifest["kinds"])
    sizes = [dict(zip("NT", each, strict=True)) for each in LINES]
    if len(shape) == 4:
        sizes = [dict(zip("NHW", each, strict=True)) for each in PLANES]
    calls, asked = b"", []
    for seed, size in enumerate(sizes):
        for kind in kernels.kinds:
            for mean in (0.0, 30.0):
                inputs = kernels.inputs(kind, size, seed=seed, mean=mean)
                empty = kernels.empty(kind, inputs)
                calls += _call(kernels, kind, inputs, empty)
                asked.append((kind, inputs, empty))
    results = emulated.run(library, calls)
    for kind, inputs, outputs in asked:
        got = {}
        for name, array in outputs.items():
            got[name] = np.frombuffer(results[: array.nbytes], array.dtype).reshape(array.shape)
            results = results[array.nbytes :]
        kernels.compare(kind, inputs, got)
    assert not results
