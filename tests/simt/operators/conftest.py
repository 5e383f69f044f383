"""Artifacts for CUDA whose kernels run in the emulator: all of it but the CUDA compiler is real.

In place of the compiler's machine code an artifact holds the path of the emulator's program, made
of the very text that the compiler is given; and in place of the driver the launcher opens the
emulator. So the host's code, its launches, workspaces and requests are those of a device.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tvm_ffi

import normgraph as ng
from normgraph import cuda_memory
from normgraph.compile import cuda_compilers
from normgraph.compile.cuda_compilers import Image
from normgraph.graphs import reference
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_tolerance import ulp

Array = npt.NDArray[Any]
NULL, WRITE, ADD = 0, 1, 2
INPUT, OUTPUT, UPDATE = 0, 1, 2
TARGET = "sm_90"


def numpy_type(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class EmulatedCompiler:
    """Makes programs of the emulator; `text` is the last source it was given."""

    name, version = "emulator", (13, 0)

    def __init__(self, emulator: Any) -> None:
        self.emulator = emulator
        self.text = ""

    def compile(self, text: str, arch: str) -> Image:
        self.text = text
        return Image(arch, bytes(self.emulator.compile(text).path) + b"\0", "")


@dataclass(frozen=True)
class Emulated:
    """A run as the emulator tells it, and what it takes to run the same kernels again."""

    arrays: Mapping[str, Array]
    findings: Sequence[Any]
    launches: Sequence[Any]
    scratch: Mapping[str, tuple[tuple[int, ...], str]]


class Device:
    """The emulator as the CUDA device of this process."""

    def __init__(self, emulator: Any, launch: Callable[..., Any]) -> None:
        self.emulator = emulator
        self.launch = launch
        self.library = ctypes.CDLL(str(emulator.library))
        self.library.simt_allocate.restype = ctypes.c_uint64
        self.results = Path(emulator.folder) / "launched.out"

    def tensor(self, name: str, role: int, array: Array, misaligned: int) -> Any:
        """An array's place on the device, of exactly its size."""
        data = None if role == OUTPUT else ctypes.c_void_p(array.ctypes.data)
        size, granule = ctypes.c_size_t(array.nbytes), array.itemsize
        at = self.library.simt_allocate(name.encode(), role, size, granule, misaligned, data)
        code = cuda_memory.BFLOAT if array.dtype == ml_dtypes.bfloat16 else cuda_memory.FLOAT
        memory = cuda_memory.Memory(array.shape, code, 8 * array.itemsize, 0, at)
        return tvm_ffi.from_dlpack(memory), at

    def finish(self, program: Any, arrays: Mapping[str, Array], at: Mapping[str, int]) -> Emulated:
        """What came of the calls since `simt_begin`."""
        assert self.library.simt_finish(bytes(self.results)) == 0
        found, allocated, launched = self.results.read_text().split("---\n")
        sizes = (line.split() for line in allocated.splitlines())
        made = {
            name: np.frombuffer(ctypes.string_at(at[name], array.nbytes), array.dtype)
            for name, array in arrays.items()
        }
        return Emulated(
            {name: made[name].reshape(array.shape) for name, array in arrays.items()},
            program.findings(found),
            [self._launch(line.split()) for line in launched.splitlines()],
            {name: _words(int(size)) for name, size in sizes},
        )

    def _launch(self, words: Sequence[str]) -> Any:
        read: dict[str, Callable[[str], Any]] = {
            "a": str,
            "n": lambda text: None,
            "i": int,
            "f": float.fromhex,
        }
        together = "together:" in words
        given = [word.partition(":") for word in words[8 + together :]]
        args = [read[kind](value) for kind, _, value in given]
        sizes = list(map(int, words[1:8]))
        grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
        return self.launch(words[0], grid, block, args, sizes[6], cooperative=together)


def _words(size: int) -> tuple[tuple[int, ...], str]:
    """A workspace of so many bytes as an array: of float32, as those of the rules are."""
    return ((size // 4,), "float32") if size % 4 == 0 else ((size,), "uint8")


class Artifact:
    """An artifact built for the emulator: its kernels as they lie in its library."""

    def __init__(self, path: Path, spec: ng.NormSpec, program: Any, device: Device) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        self.path, self.spec, self.program, self.device = path, spec, program, device
        self.dtype: str = manifest["dtype"]
        self.ports: dict[str, Any] = manifest["kinds"]
        [library] = manifest["libraries"]
        self.module: Any = tvm_ffi.load_module(str(path / library["file"]))

    def call(
        self,
        kind: str,
        inputs: Mapping[str, Array],
        requests: Mapping[str, int] | None = None,
        outputs: Mapping[str, Array] | None = None,
        *,
        seed: int = 0,
        misaligned: Mapping[str, int] | None = None,
    ) -> Emulated:
        """Run a kind; requests are write by default, and null where others are given."""
        ports = self.ports[kind]
        sizes: dict[str, int] = {}
        for port in ports["inputs"]:
            sizes.update(zip(map(str, port["shape"]), inputs[port["name"]].shape, strict=True))
        request, tensors, arrays, at = 0, [], {}, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NORMGRAPH_LIBCUDA", str(self.device.emulator.library))
            self.device.library.simt_begin(seed)

            def place(name: str, role: int, array: Array) -> None:
                made, at[name] = self.device.tensor(
                    name, role, np.ascontiguousarray(array), (misaligned or {}).get(name, 0)
                )
                tensors.append(made)
                arrays[name] = array

            for port in ports["inputs"]:
                place(port["name"], INPUT, inputs[port["name"]])
            for k, port in enumerate(ports["outputs"]):
                name = port["name"]
                wanted = WRITE if requests is None else requests.get(name, NULL)
                request |= wanted << (2 * k)
                shape = tuple(sizes[d] if isinstance(d, str) else d for d in port["shape"])
                empty = np.empty(shape, numpy_type(port["dtype"]))
                role = {WRITE: OUTPUT, ADD: UPDATE, NULL: INPUT}[wanted]
                place(name, role, (outputs or {}).get(name, empty))
            self.module[kind](*tensors, request)
            return self.device.finish(self.program, arrays, at)


@pytest.fixture(scope="session")
def build_emulated(
    emulator: Any, launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Artifact]:
    """build_emulated(spec, shape, dtype="float32", kinds=None): an artifact, built once."""
    made: dict[object, Artifact] = {}
    device = Device(emulator, launch)

    def build(
        spec: ng.NormSpec,
        shape: Sequence[int | str],
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> Artifact:
        key = (spec, tuple(shape), dtype, None if kinds is None else tuple(kinds))
        if key not in made:
            folder = tmp_path_factory.mktemp("emulated")
            graphs = folder / "graphs"
            ng.graphs.export(spec, shape=tuple(shape), dtype=dtype, out=graphs, kinds=kinds)
            compiler = EmulatedCompiler(emulator)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cuda_compilers, "find", lambda: compiler)
                path = ng.compile.build(
                    graphs, target=TARGET, out=folder / "artifact", self_test=False
                )
            made[key] = Artifact(path, spec, emulator.compile(compiler.text), device)
        return made[key]

    return build


def check(artifact: Artifact, kind: str, inputs: Inputs, run: Emulated) -> None:
    """No finding, and each output within the bound that a CPU's results are held to."""
    assert not run.findings, "\n".join(
        f"{each.kind}: {each.text} (line {each.line}: {each.source})" for each in run.findings
    )
    names = [port["name"] for port in artifact.ports[kind]["inputs"]]
    want = reference.run(artifact.spec, kind, inputs.take(names))
    factor = inputs.conditions(kind).from_output
    for port in artifact.ports[kind]["outputs"]:
        name, dtype = port["name"], port["dtype"]
        share = 1e-12 if dtype == "float64" else 2e-5 if inputs.case.mean == 0.0 else 2e-4
        allowed = np.full(want[name].shape, factor * share * np.max(np.abs(want[name])))
        if dtype in ("float16", "bfloat16"):
            allowed += ulp(want[name], dtype)
        error = np.abs(run.arrays[name].astype(np.float64) - want[name])
        assert np.all(error <= allowed), (
            f"{artifact.spec.op} {artifact.dtype} {kind} {inputs.case.label} {name}: off by "
            f"{np.nanmax(error):.2e}, {np.max(allowed):.2e} allowed, {np.isnan(error).sum()} NaN"
        )


@pytest.fixture(scope="session")
def check_kind() -> Callable[..., Emulated]:
    """check_kind(artifact, kind, size, mean=0.0, seed=0): run it, and hold it to float64."""

    def run(
        artifact: Artifact,
        kind: str,
        size: tuple[int, ...],
        mean: float = 0.0,
        seed: int = 0,
        misaligned: Mapping[str, int] | None = None,
    ) -> Emulated:
        inputs = Inputs(artifact.spec, artifact.dtype, Case(size, mean), seed=seed)
        names = [port["name"] for port in artifact.ports[kind]["inputs"]]
        came = artifact.call(kind, inputs.take(names), seed=seed, misaligned=misaligned)
        check(artifact, kind, inputs, came)
        return came

    return run


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, Array]]:
    """inputs_of(artifact, kind, size): random inputs of a kind."""

    def make(artifact: Artifact, kind: str, size: tuple[int, ...]) -> dict[str, Array]:
        names = [port["name"] for port in artifact.ports[kind]["inputs"]]
        made = Inputs(artifact.spec, artifact.dtype, Case(size, 0.0), seed=1)
        return dict(made.take(names))

    return make
