"""Artifacts for CUDA whose kernels run in the emulator: all of it but the CUDA compiler is real.

In place of the compiler's machine code an artifact holds the path of the emulator's program, made
of the very text that the compiler is given; and in place of the driver the launcher opens the
emulator. So the host's code, its launches, workspaces and requests are those of a device.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tvm_ffi

import normgraph as ng
from normgraph import cuda_memory, dlpack_types
from normgraph.compile import cuda_compilers
from normgraph.compile.cuda_compilers import Image
from normgraph.graphs import reference
from normgraph.runtime import cuda_arrays
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_tolerance import allowed, numpy_dtype, ulp

Array = npt.NDArray[Any]
NULL, WRITE, ADD = 0, 1, 2
INPUT, OUTPUT, UPDATE = 0, 1, 2
TARGET = "sm_90"


class EmulatedCompiler:
    """Makes programs of the emulator; `text` is the last source it was given.

    fused: products and sums are rounded once, as a GPU does.
    """

    name, version = "emulator", (13, 0)

    def __init__(self, emulator: Any, fused: bool) -> None:
        self.emulator = emulator
        self.fused = fused
        self.text = ""
        self._one = threading.Lock()

    def compile(self, text: str, arch: str) -> Image:
        with self._one:
            self.text = text
            path = self.emulator.compile(text, fused=self.fused).path
            return Image(arch, bytes(path) + b"\0", "")


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
        self.driver = ctypes.CDLL(str(emulator.driver))
        self.driver.simt_allocate.restype = ctypes.c_uint64
        self.results = Path(emulator.folder) / "launched.out"

    def tensor(self, name: str, role: int, array: Array, misaligned: int) -> Any:
        """An array's place on the device, of exactly its size."""
        data = None if role == OUTPUT else ctypes.c_void_p(array.ctypes.data)
        size, granule = ctypes.c_size_t(array.nbytes), array.itemsize
        at = self.driver.simt_allocate(name.encode(), role, size, granule, misaligned, data)
        code = dlpack_types.BFLOAT if array.dtype == ml_dtypes.bfloat16 else dlpack_types.FLOAT
        memory = cuda_memory.Memory(array.shape, code, 8 * array.itemsize, 0, at)
        return tvm_ffi.from_dlpack(memory), at

    def finish(self, program: Any, arrays: Mapping[str, Array], at: Mapping[str, int]) -> Emulated:
        """What came of the calls since `simt_begin`."""
        assert self.driver.simt_finish(bytes(self.results)) == 0
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
        """Run a kind; requests are write by default, and null where others are given.

        outputs: what is in those that are added to. What is not asked for has no memory.
        """
        ports = self.ports[kind]
        sizes: dict[str, int] = {}
        for port in ports["inputs"]:
            sizes.update(zip(map(str, port["shape"]), inputs[port["name"]].shape, strict=True))
        request, tensors, arrays, at = 0, [], {}, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NORMGRAPH_LIBCUDA", str(self.device.emulator.driver))
            self.device.driver.simt_begin(seed)

            def place(name: str, role: int, array: Array) -> None:
                made, at[name] = self.device.tensor(
                    name, role, np.asarray(array, order="C"), (misaligned or {}).get(name, 0)
                )
                tensors.append(made)
                arrays[name] = array

            for port in ports["inputs"]:
                place(port["name"], INPUT, inputs[port["name"]])
            for k, port in enumerate(ports["outputs"]):
                name = port["name"]
                wanted = WRITE if requests is None else requests.get(name, NULL)
                request |= wanted << (2 * k)
                if wanted == NULL:
                    nothing = cuda_arrays.placeholder(len(port["shape"]), port["dtype"], 0)
                    tensors.append(nothing)
                    continue
                shape = tuple(sizes[d] if isinstance(d, str) else d for d in port["shape"])
                empty = np.empty(shape, numpy_dtype(port["dtype"]))
                place(name, UPDATE if wanted == ADD else OUTPUT, (outputs or {}).get(name, empty))
            self.module[kind](*tensors, request)
            return self.device.finish(self.program, arrays, at)


@pytest.fixture(scope="session")
def build_emulated(
    emulator: Any,
    launch: Callable[..., Any],
    make_once: Callable[..., Path],
    name_of_build: Callable[..., str],
) -> Callable[..., Artifact]:
    """build_emulated(spec, shape, dtype="float32", kinds=None, fused=False): built once."""
    made: dict[str, Artifact] = {}
    device = Device(emulator, launch)

    def build(
        spec: ng.NormSpec,
        shape: Sequence[int | str],
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
        fused: bool = False,
    ) -> Artifact:
        def make(folder: Path) -> None:
            graphs = folder / "graphs"
            ng.graphs.export(spec, shape=tuple(shape), dtype=dtype, out=graphs, kinds=kinds)
            compiler = EmulatedCompiler(emulator, fused)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cuda_compilers, "find", lambda *_: compiler)
                ng.compile.build(graphs, target=TARGET, out=folder / "artifact", self_test=False)
            (folder / "kernels.cu").write_text(compiler.text, encoding="utf-8")

        name = f"emulated{'-fused' * fused}-{name_of_build(spec, shape, dtype, kinds)}"
        if name not in made:
            folder = make_once(name, make)
            text = (folder / "kernels.cu").read_text(encoding="utf-8")
            program = emulator.compile(text, fused=fused)
            made[name] = Artifact(folder / "artifact", spec, program, device)
        return made[name]

    return build


def hold(
    artifact: Artifact,
    kind: str,
    size: tuple[int, ...],
    *,
    mean: float = 0.0,
    seed: int = 0,
    misaligned: Mapping[str, int] | None = None,
    requests: Mapping[str, int] | None = None,
    spoiled: Mapping[str, Callable[[Array], Array]] | None = None,
) -> Emulated:
    """Run a kind on random inputs of N(mean, 1), and hold its outputs to the equations in float64.

    spoiled: what is done to some inputs beforehand.
    """
    case = Case(size, mean)
    inputs = usual = Inputs(artifact.spec, artifact.dtype, case, seed=seed)
    if spoiled:
        data = {name: spoil(usual.values[name].copy()) for name, spoil in spoiled.items()}
        inputs = Inputs(artifact.spec, artifact.dtype, case, seed=seed, data=data)
    ports = artifact.ports[kind]
    given = inputs.take([port["name"] for port in ports["inputs"]])
    want = reference.run(artifact.spec, kind, given)
    before = {
        port["name"]: _drawn(want[port["name"]], port["dtype"])
        for port in ports["outputs"]
        if (requests or {}).get(port["name"]) == ADD
    }
    came = artifact.call(kind, given, requests, before, seed=seed, misaligned=misaligned)
    where = f"{artifact.spec.op} {artifact.dtype} {kind} {case.label}"
    assert not came.findings, where + "".join(
        f"\n{each.kind}: {each.text} (line {each.line}: {each.source})" for each in came.findings
    )
    for port in ports["outputs"]:
        name, dtype = port["name"], port["dtype"]
        if requests is not None and requests.get(name, NULL) == NULL:
            continue
        exact = np.where(np.isfinite(want[name]), want[name], 0.0)
        bound = allowed(name, dtype, exact, usual.conditions(kind))
        total = want[name]
        if name in before:
            total = total + before[name].astype(np.float64)
            bound = bound + ulp(np.where(np.isfinite(total), total, 0.0), dtype)
        got = came.arrays[name].astype(np.float64)
        if kind.startswith("backward"):
            # Whether sums of infinities of both signs are infinite or NaN is up to their order.
            got, total = (np.where(np.isinf(each), np.nan, each) for each in (got, total))
        _compare(got, total, bound, f"{where} {name}")
    return came


def _drawn(like: Array, dtype: str) -> Array:
    values: Array = np.random.default_rng(1).standard_normal(like.shape)
    return values.astype(numpy_dtype(dtype))


def _compare(got: Array, want: Array, bound: Array, where: str) -> None:
    """Within the bound where the answer is a number, and the same where it is none."""
    number = np.isfinite(want)
    np.testing.assert_array_equal(got[~number], want[~number], err_msg=where)
    error = np.abs(np.where(number, got, 0.0) - np.where(number, want, 0.0))
    assert np.all(error <= bound), (
        f"{where}: off by {np.nanmax(error):.2e}, {np.max(bound):.2e} allowed, "
        f"{np.isnan(error).sum()} NaN"
    )


@pytest.fixture(scope="session")
def check_kind() -> Callable[..., Emulated]:
    """check_kind(artifact, kind, size, ...): see `hold`."""
    return hold


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, Array]]:
    """inputs_of(artifact, kind, size): random inputs of a kind."""

    def make(artifact: Artifact, kind: str, size: tuple[int, ...]) -> dict[str, Array]:
        names = [port["name"] for port in artifact.ports[kind]["inputs"]]
        made = Inputs(artifact.spec, artifact.dtype, Case(size, 0.0), seed=1)
        return dict(made.take(names))

    return make


@pytest.fixture
def device(emulator: Any) -> Iterator[Callable[..., None]]:
    """device(multiprocessors, shared): what the emulator is from now on, until the test ends."""
    library = ctypes.CDLL(str(emulator.driver))

    def become(multiprocessors: int, shared: int = 228 * 1024) -> None:
        library.simt_device(multiprocessors, shared)

    yield become
    library.simt_device(0, 0)
