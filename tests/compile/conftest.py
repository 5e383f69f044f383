"""Kernels called as they lie in a library, without the runtime, and their float64 answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tvm
import tvm_ffi
from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

import normgraph as ng
from normgraph.compile import importing, link, pipeline, resolve
from normgraph.compile.tensor_program import TensorProgram, read

# Kernels for aarch64 are tested where they can be linked and run.
_EMULATOR = ("qemu-aarch64", "aarch64-linux-gnu-gcc")
collect_ignore = [] if all(map(shutil.which, _EMULATOR)) else ["test_aarch64.py"]

Array = npt.NDArray[Any]
NULL, WRITE, ADD = 0, 1, 2
UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class Ports:
    """What the functions of one artifact take and give; inputs for them, and the answers."""

    def __init__(self, spec: ng.NormSpec, ports: Mapping[str, Any]) -> None:
        self.spec = spec
        self.ports = ports
        self.kinds = tuple(ports)

    def inputs(
        self, kind: str, sizes: Mapping[str, int] | None = None, *, seed: int = 0, mean: float = 0.0
    ) -> dict[str, Array]:
        """N(mean, 1) input; statistics and y are those of a forward call on it."""
        rng = np.random.default_rng(seed)
        drawn: dict[str, Array] = {}
        wanted = self.ports[kind]["inputs"]
        for port in wanted:
            shape = tuple(d if isinstance(d, int) else (sizes or {})[d] for d in port["shape"])
            values: Array = rng.standard_normal(shape)
            if port["name"] in ("x", "running_mean"):
                values = values + mean
            if port["name"] in ("gamma", "running_var", "inv_std"):
                values = 0.5 + np.abs(values)
            if port["name"] == "momentum":
                values = np.asarray(0.3)
            drawn[port["name"]] = np.asarray(values).astype(dtype_of(port["dtype"]))
        if any(port["name"] in ("mean", "inv_std") for port in wanted):
            plain = replace(
                self.spec,
                weight="gamma" in drawn,
                bias="beta" in drawn,
                track_running_stats=False,
                momentum=0.1,
                convention="torch",
            )
            given = {n: drawn[n] for n in drawn if n in ("gamma", "beta")}
            given["x"] = drawn["x"] if "x" in drawn else drawn["y"]
            made = ng.graphs.reference.run(plain, "forward", given)
            for port in wanted:
                if port["name"] in ("mean", "inv_std", "y"):
                    drawn[port["name"]] = made[port["name"]].astype(dtype_of(port["dtype"]))
        return drawn

    def answers(self, kind: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        graph = kind.rpartition("__")[2]
        made = ng.graphs.reference.run(self.spec, graph, inputs, debug=True)
        return {port["name"]: made[port["name"]] for port in self.ports[kind]["outputs"]}

    def shapes(self, kind: str, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        """The shape of each output for these inputs."""
        sizes: dict[str, int] = {}
        for port in self.ports[kind]["inputs"]:
            sizes.update(zip(map(str, port["shape"]), inputs[port["name"]].shape, strict=True))
        return {
            port["name"]: tuple(sizes[d] if isinstance(d, str) else d for d in port["shape"])
            for port in self.ports[kind]["outputs"]
        }

    def empty(self, kind: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Each output full of NaN, which marks what a kernel leaves unwritten."""
        shapes = self.shapes(kind, inputs)
        return {
            port["name"]: np.full(shapes[port["name"]], np.nan, dtype_of(port["dtype"]))
            for port in self.ports[kind]["outputs"]
        }

    def compare(
        self, kind: str, inputs: Mapping[str, Array], got: Mapping[str, Array], bound: float = 2e-5
    ) -> None:
        """Every output within `bound` of its largest value in float32, and as `close` says."""
        want = self.answers(kind, inputs)
        for port in self.ports[kind]["outputs"]:
            name = port["name"]
            growth, terms = self.growth(inputs), self.terms(name, inputs)
            close(got[name], want[name], port["dtype"], bound * growth, f"{kind} {name}", terms)

    @staticmethod
    def terms(name: str, inputs: Mapping[str, Array]) -> float:
        """The size of the terms an output is the difference of, where they cancel.

        dx of few elements is a small difference of gamma * inv_std * dy; delta is rounding alone. A
        sum of many terms of either sign has the size of sqrt(count) of them, unless it cancels.
        """
        size = {n: float(np.max(np.abs(v.astype(np.float64)))) for n, v in inputs.items()}
        if name == "delta":
            return max(size.get("x", 0.0), size.get("y", 0.0))
        if name in ("dx", "dvar", "dmean"):
            return size.get("gamma", 1.0) * size.get("inv_std", 0.0) * size["dy"]
        if name in ("dgamma", "dbeta") and "gamma" in inputs:
            dy = inputs["dy"].astype(np.float64)
            return float(np.linalg.norm(dy.ravel()) / np.sqrt(inputs["gamma"].size))
        return 0.0

    @staticmethod
    def growth(inputs: Mapping[str, Array]) -> float:
        """How much x_hat = (y - beta) / gamma enlarges a rounding error."""
        if "y" not in inputs or "gamma" not in inputs:
            return 1.0
        largest = np.max(np.abs(inputs["y"].astype(np.float64)))
        return float(1 + largest / np.min(np.abs(inputs["gamma"].astype(np.float64))))


class Kernels(Ports):
    """The packed functions of one artifact (or of graphs compiled in place) and their ports."""

    def __init__(self, path: Path, spec: ng.NormSpec, ports: Mapping[str, Any]) -> None:
        super().__init__(spec, ports)
        self.path = path
        self.module: Any = tvm_ffi.load_module(str(path))

    def call(
        self,
        kind: str,
        inputs: Mapping[str, Array],
        requests: Mapping[str, int] | None = None,
        outputs: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run a kernel into copies of `outputs` (NaN by default); `requests` are write by default.

        A missing request is null where `requests` is given.
        """
        starts = {**self.empty(kind, inputs), **(outputs or {})}
        names = [port["name"] for port in self.ports[kind]["outputs"]]
        req = 0
        for k, name in enumerate(names):
            req |= (WRITE if requests is None else requests.get(name, NULL)) << (2 * k)
        made = [tensor(starts[name]) for name in names]
        self.module[kind](*(tensor(inputs[p["name"]]) for p in self.ports[kind]["inputs"]),
                          *made, req)  # fmt: skip
        return {name: out.numpy() for name, out in zip(names, made, strict=True)}

    def check(self, kind: str, inputs: Mapping[str, Array], bound: float = 2e-5) -> None:
        """Run a kernel and hold every output to its bound: see `compare`."""
        self.compare(kind, inputs, self.call(kind, inputs), bound)


def tensor(values: Array) -> Any:
    return tvm.runtime.tensor(np.array(values, order="C"))


def close(
    got: Array, want: Array, dtype: str, bound: float, message: str = "", terms: float = 0.0
) -> None:
    """|got - want| <= bound * max|want|, or of its terms where they are larger and cancel.

    One unit in the last place on top for half types; 5e-8 of the bound for float64.
    """
    assert got.shape == want.shape, message
    largest = max(float(np.max(np.abs(want), initial=0.0)), terms) + 1e-3
    if dtype == "float64":
        bound *= 5e-8
    error = np.abs(got.astype(np.float64) - want)
    allowed = bound * largest + UNIT.get(dtype, 0.0) * np.abs(want)
    worst = np.max(error - allowed, initial=-1.0)
    at = np.unravel_index(int(np.argmax(error)), error.shape) if error.size else ()
    assert worst <= 0, f"{message}: off by {error.max():.3g} at {at}, largest {largest:.3g}"


def ports_of(model: onnx.ModelProto) -> dict[str, Any]:
    """The inputs and outputs of a graph as a manifest lists them."""
    names = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}

    def entry(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind = value.type.tensor_type
        shape = [d.dim_param if d.dim_param else int(d.dim_value) for d in kind.shape.dim]
        return {"name": value.name, "dtype": names[kind.elem_type], "shape": shape}

    graph = model.graph
    return {"inputs": [entry(v) for v in graph.input], "outputs": [entry(v) for v in graph.output]}


# The artifacts of tests/accuracy, so that the whole suite builds them once.
ROWS: dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]] = {
    "batch_norm": (ng.NormSpec("batch_norm"), ("N", 6, "H", "W")),
    "instance_norm": (ng.NormSpec("instance_norm", track_running_stats=True), ("N", 6, "H", "W")),
    "group_norm": (ng.NormSpec("group_norm", groups=2), ("N", 6, "H", "W")),
    "layer_norm": (ng.NormSpec("layer_norm"), ("N", "T", 37)),
    "rms_norm": (ng.NormSpec("rms_norm"), ("N", "T", 37)),
}


@pytest.fixture(scope="session")
def kernels(build_artifact: Callable[..., Path]) -> Callable[..., Kernels]:
    """kernels(spec, shape, dtype, kinds): the kernels of an artifact for this host, built once."""
    made: dict[Path, Kernels] = {}

    def get(*args: Any, **options: Any) -> Kernels:
        path = build_artifact(*args, **options)
        if path not in made:
            made[path] = opened(path)
        return made[path]

    return get


@pytest.fixture(scope="session")
def rows() -> dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]]:
    """By operator: the usual options, and the shape of x."""
    return ROWS


@pytest.fixture(scope="session")
def ports_only() -> type[Ports]:
    """ports_only(spec, ports): inputs and answers for kernels that do not run in this process."""
    return Ports


@pytest.fixture(scope="session")
def shapes() -> dict[str, tuple[int | str, ...]]:
    """The shape of x each operator of `row` is compiled for."""
    return {op: shape for op, (_, shape) in ROWS.items()}


@pytest.fixture(scope="session")
def row(kernels: Callable[..., Kernels]) -> Callable[..., Kernels]:
    """row(op, dtype): the kernels of one operator with its usual options."""
    return lambda op, dtype="float32": kernels(*ROWS[op], dtype)


def opened(path: Path) -> Kernels:
    """The kernels of the artifact directory `path`."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    library = path / manifest["libraries"][0]["file"]
    return Kernels(library, ng.NormSpec.from_dict(manifest["spec"]), manifest["kinds"])


@pytest.fixture(scope="session")
def open_kernels() -> Callable[[Path], Kernels]:
    """open_kernels(path): see `opened`."""
    return opened


@pytest.fixture(scope="session")
def compile_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Kernels]:
    """compile_models(spec, models, rule=None, target="cpu"): kernels without an artifact.

    models: ONNX graphs by the name their function gets, `<anything>__<kind>` or just the kind.
    rule: a schedule rule to use by itself.
    """

    def make(
        spec: ng.NormSpec,
        models: Mapping[str, onnx.ModelProto],
        rule: Any = None,
        target: str = "cpu",
    ) -> Kernels:
        goal = resolve(target)
        dump = pipeline.Dump(None)
        scheduled = {}
        for name, model in models.items():
            if rule is None:
                scheduled[name] = pipeline.schedule(name, model, goal, dump, lambda line: None)
                continue
            func = fused(model)
            names = [output.name for output in model.graph.output]
            made = rule.apply(func, names, goal)
            scheduled[name] = pipeline.Scheduled(made, rule.NAME)
        folder = tmp_path_factory.mktemp("kernels")
        pipeline.generate(scheduled, goal, folder / "k.o", dump)
        assert link.link(folder / "k.o", folder / "k.so", goal)
        return Kernels(
            folder / "k.so", spec, {name: ports_of(model) for name, model in models.items()}
        )

    return make


def fused(model: onnx.ModelProto) -> Any:
    """The graph as one unscheduled PrimFunc."""
    func = importing.fuse(importing.legalize(importing.to_relax(model)))
    return importing.with_every_input(func, model)


@pytest.fixture(scope="session")
def program() -> Callable[..., TensorProgram]:
    """program(spec, kind, shape, dtype): what is read from one graph."""
    return lambda *args, **options: read(fused(ng.graphs.build(*args, **options)))


@pytest.fixture(scope="session")
def within() -> Callable[..., None]:
    """within(got, want, dtype, bound, message): see `close`."""
    return close


@pytest.fixture(scope="session")
def probe_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """probe.c as a library, linked as kernels are."""
    folder = tmp_path_factory.mktemp("probe")
    goal = resolve("cpu")
    source = Path(__file__).with_name("probe.c")
    command = [str(link.compiler(goal)), "-std=gnu11", "-O1", "-fPIC", "-c", str(source)]
    for folder_ in (Path(link.__file__).parent, find_include_path(), find_dlpack_include_path()):
        command.append(f"-I{folder_}")
    subprocess.run([*command, "-o", str(folder / "probe.o")], check=True)
    assert link.link(folder / "probe.o", folder / "probe.so", goal)
    return folder / "probe.so"
