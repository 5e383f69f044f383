"""CUDA without a GPU: a driver that notes its calls, and kernels compiled for the host."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir.prim.expr import IntImm

import normgraph as ng
from normgraph.compile import (
    cuda_codegen,
    cuda_compilers,
    cuda_link,
    cuda_plain_rule,
    link,
    pipeline,
    resolve,
)
from normgraph.compile.cuda_codegen import CudaSource
from normgraph.compile.cuda_compilers import Image
from normgraph.compile.targets import Target
from normgraph.runtime import cuda_arrays, loading

HERE = Path(__file__).parent
HOST_KERNELS = "libkernels.so"
C_TYPES = {"p": "void*", "l": "int64_t", "i": "int", "b": "bool", "f": "float", "d": "double"}

Array = npt.NDArray[Any]


class Driver:
    """The fake driver: what it pretends to have, and what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fake_log.restype = ctypes.c_char_p

    def reset(self) -> None:
        self._library.fake_reset()

    def version(self, major: int, minor: int) -> None:
        self._library.fake_version(1000 * major + 10 * minor)

    def devices(self, *capabilities: int) -> None:
        self._library.fake_devices(len(capabilities))
        for device, capability in enumerate(capabilities):
            self._library.fake_capability(device, capability)

    def attribute(self, number: int, value: int) -> None:
        """What every device answers for an attribute; 1 by default."""
        self._library.fake_attribute(number, value)

    def fail(self, name: str, status: int, after: int = 0) -> None:
        """Calls of this function fail from now on, but for the first `after` of them."""
        self._library.fake_fail(name.encode(), status, after)

    def room(self, occupancy: int, multiprocessors: int = 0) -> None:
        """How many blocks stand on a multiprocessor; of how many a stream has, 0 for all."""
        self._library.fake_room(occupancy, multiprocessors)

    @contextlib.contextmanager
    def late(self) -> Iterator[None]:
        """A stream does its work when somebody waits for it, and no other stream waits."""
        self._library.fake_late(1)
        try:
            yield
        finally:
            self._library.fake_late(0)

    def kernels(self, path: Path) -> None:
        """Kernels compiled for the host, which launches run from now on."""
        assert self._library.fake_kernels(str(path).encode())

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """A graph is captured: what may wait for the device is refused and noted."""
        self._library.fake_capture(1)
        try:
            yield
        finally:
            self._library.fake_capture(0)

    def take(self, *words: str) -> list[str]:
        """The lines of the log that begin with one of these words, all by default; then clear it.

        A stream's address is as C prints it.
        """
        lines = (self._library.fake_log() or b"").decode().splitlines()
        self._library.fake_clear_log()
        return [line for line in lines if not words or line.split()[0] in words]

    @property
    def live(self) -> int:
        """Pieces of device memory that were not given back."""
        return int(self._library.fake_live())


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver as a library; nothing is made to use it."""
    path = tmp_path_factory.mktemp("driver") / "libfakecuda.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(path)]
    subprocess.run([*command, str(HERE / "fake_driver.c"), "-ldl", "-lpthread"], check=True)
    return path


@pytest.fixture
def driver(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The fake driver in place of this machine's: one sm_90 device, CUDA 13.0."""
    monkeypatch.setenv("NORMGRAPH_LIBCUDA", str(fake_driver))
    made = Driver(fake_driver)
    made.reset()
    return made


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a CUDA driver."""
    monkeypatch.setenv("NORMGRAPH_LIBCUDA", str(tmp_path / "libcuda.so.1"))


@dataclass
class FakeCompiler:
    """Makes images that say what they are; `texts` are the sources it was given."""

    name: str = "fake"
    version: tuple[int, int] = (13, 0)
    texts: list[str] = field(default_factory=list)

    def identity(self) -> list[object]:
        return [self.name]

    def compile(self, text: str, arch: str) -> Image:
        self.texts.append(text)
        return Image(arch, f"image of {arch}\0".encode(), "")


def compile_for_host(source: CudaSource, folder: Path) -> Path:
    """The kernels as a library: `run_<kernel>(arguments, sizes, shared)` runs every thread."""
    # From the first kernel on; what TVM prints before it is CUDA's own.
    text = source.text[source.text.index('extern "C" __global__') :]
    parts = ['#include "host_cuda.h"', text]
    for kernel in source.kernels:
        types = [C_TYPES[letter] for letter in kernel.params]
        given = ", ".join(f"*({each}*)args[{k}]" for k, each in enumerate(types))
        parts.append(
            f'extern "C" void run_{kernel.name}(void** args, const unsigned* n, unsigned) {{\n'
            f"  auto kernel = (void (*)({', '.join(types)})){kernel.name};\n"
            "  for (blockIdx.z = 0; blockIdx.z < n[2]; ++blockIdx.z)\n"
            "  for (blockIdx.y = 0; blockIdx.y < n[1]; ++blockIdx.y)\n"
            "  for (blockIdx.x = 0; blockIdx.x < n[0]; ++blockIdx.x)\n"
            "  for (threadIdx.z = 0; threadIdx.z < n[5]; ++threadIdx.z)\n"
            "  for (threadIdx.y = 0; threadIdx.y < n[4]; ++threadIdx.y)\n"
            "  for (threadIdx.x = 0; threadIdx.x < n[3]; ++threadIdx.x)\n"
            f"    kernel({given});\n}}\n"
            f'extern "C" const int count_{kernel.name} = {len(types)};'
        )
    file = folder / "kernels.cc"
    file.write_text("\n".join(parts), encoding="utf-8")
    library = folder / HOST_KERNELS
    flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-w", "-fpermissive", f"-I{HERE}"]
    subprocess.run(["c++", *flags, "-o", str(library), str(file)], check=True)
    return library


@dataclass(frozen=True)
class Built:
    """A CUDA artifact whose kernels also run on the host."""

    path: Path
    host_kernels: Path


@contextlib.contextmanager
def plainly(compiler: FakeCompiler) -> Iterator[None]:
    """Builds with this compiler, by the plain rule, whose kernels have no barriers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_compilers, "find", lambda *_: compiler)
        patch.setitem(pipeline.RULES, "cuda", (cuda_plain_rule,))
        patch.setenv("NORMGRAPH_LIBCUDA", str(HERE / "libcuda.so.1"))  # no device while building
        yield


@pytest.fixture(scope="session")
def build_plain(
    make_once: Callable[..., Path], name_of_build: Callable[..., str]
) -> Callable[..., Built]:
    """build_plain(spec, shape, kinds, target="cuda"): a float32 artifact, built once."""

    def build(
        spec: ng.NormSpec,
        shape: Sequence[int | str],
        kinds: Sequence[str] | None = None,
        target: str | Sequence[str] = "cuda",
    ) -> Built:
        def make(folder: Path) -> None:
            ng.graphs.export(
                spec, shape=tuple(shape), dtype="float32", out=folder / "graphs", kinds=kinds
            )
            compiler = FakeCompiler()
            with plainly(compiler):
                ng.compile.build(folder / "graphs", target=target, out=folder / "artifact",
                                 cache=False)  # fmt: skip
            dump = pipeline.Dump(None)
            functions = {}
            for file in sorted((folder / "graphs").glob("*.onnx")):
                with plainly(compiler):
                    functions[file.stem] = pipeline.schedule(
                        file.stem, onnx.load(file), resolve("cuda"), dump, lambda line: None
                    ).func
            source = cuda_codegen.cuda_source(functions, resolve("cuda"))
            assert source.text == compiler.texts[0]
            compile_for_host(source, folder)

        targets = "-".join([target] if isinstance(target, str) else target)
        name = f"plain-{targets}-{name_of_build(spec, shape, 'float32', kinds)}"
        folder = make_once(name, make)
        return Built(folder / "artifact", folder / HOST_KERNELS)

    return build


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    """Builds of the test use it, and the plain rule."""
    made = FakeCompiler()
    monkeypatch.setattr(cuda_compilers, "find", lambda *_: made)
    monkeypatch.setitem(pipeline.RULES, "cuda", (cuda_plain_rule,))
    return made


@pytest.fixture
def instance_norm(build_plain: Callable[..., Built], driver: Driver, tmp_path: Path) -> Path:
    """An artifact of its own for a test, whose kernels the fake driver runs."""
    spec = ng.NormSpec("instance_norm", track_running_stats=True)
    built = build_plain(spec, ("N", 6, 4, 5))
    loading.kept.clear()
    gc.collect()  # a library that is still loaded is not loaded again
    driver.kernels(built.host_kernels)
    copied = tmp_path / "artifact"
    shutil.copytree(built.path, copied)
    return copied


@pytest.fixture
def torch_on_host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name; TorchOnHost(torch) is a torch whose CUDA device is the host."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("torch_on_host")


@pytest.fixture
def on_device() -> Callable[..., Any]:
    """on_device(array, device=0): a tvm_ffi.Tensor with a float32 array's values."""
    return lambda array, device=0: cuda_arrays.tensor_of(
        np.asarray(array, np.float32), "float32", device
    )


@pytest.fixture
def operator(instance_norm: Path) -> Any:
    """That artifact, loaded."""
    return ng.load(instance_norm)


@pytest.fixture
def given(on_device: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """given(device=0, **replaced): the inputs of a backward call of it, x (2, 6, 4, 5)."""

    def make(device: int = 0, **replaced: Any) -> dict[str, Any]:
        rng = np.random.default_rng(5)
        whole, stat = (2, 6, 4, 5), (2, 6, 1, 1)
        shapes = {"dy": whole, "x": whole, "gamma": (6,), "mean": stat}
        values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        values["inv_std"] = np.abs(rng.standard_normal(stat)) + 0.5
        return {**{n: on_device(v, device) for n, v in values.items()}, **replaced}

    return make


@pytest.fixture
def on_host() -> Callable[[Any], Array]:
    """on_host(tensor): the values of a float32 tensor."""
    return lambda tensor: cuda_arrays.memory_view(tensor, "float32")


def launched(tags: Mapping[str, Any], body: Callable[..., Any]) -> Any:
    """A kernel: `body` takes the index of each axis in `tags`, which says the extents."""
    axes = []
    for tag, extent in tags.items():
        dtype = str(extent.ty.dtype)
        first = IntImm(dtype, 0)
        axes.append(tirx.IterVar(tvm.ir.Range(first, extent), tirx.Var(tag, dtype), 1, tag))
    made = body(*(axis.var for axis in axes))
    for axis in reversed(axes):
        made = tirx.AttrStmt(axis, "thread_extent", axis.dom.extent, made)
    return made


@pytest.fixture(scope="session")
def launch() -> Callable[..., Any]:
    """launch(tags, body): see `launched`."""
    return launched


@dataclass(frozen=True)
class Library:
    """Functions compiled for the fake driver. `module` holds them, packed."""

    module: Any
    source: CudaSource
    folder: Path

    @property
    def host_kernels(self) -> Path:
        """The kernels compiled for the host."""
        return compile_for_host(self.source, self.folder)


@pytest.fixture
def link_library(tmp_path: Path) -> Callable[..., Library]:
    """link_library(functions, archs=("sm_80", "sm_90", "compute_90")): loaded, on its own state."""
    numbers = itertools.count()

    def make(
        functions: Mapping[str, Any], archs: Sequence[str] = ("sm_80", "sm_90", "compute_90")
    ) -> Library:
        folder = tmp_path / f"library{next(numbers)}"
        folder.mkdir()
        target: Target = resolve("cuda")
        parts = cuda_codegen.split(functions, target)
        source = CudaSource(cuda_codegen.source_of(parts, target), parts.kernels)
        compiler = FakeCompiler()
        images = [compiler.compile(source.text, arch) for arch in archs]
        cuda_codegen.host_module(parts, target).write_to_file(str(folder / "k.o"), "o")
        sources = cuda_link.write(folder, parts.kernels, images)
        assert link.link(folder / "k.o", folder / "k.so", target, sources)
        module = tvm_ffi.load_module(str(folder / "k.so"))
        return Library(module, source, folder)

    return make
