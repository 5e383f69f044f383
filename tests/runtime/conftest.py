"""A small artifact made by hand: plain kernels with simple arithmetic, one per kind but one.

x is (N, 3, L), instance_norm with running statistics and momentum as an input; backward_frozen is
left out. The kernels compute what is easy to predict (`ToyAnswers`), not instance_norm.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph
from normgraph.cpu import machine
from normgraph.runtime import Operator, load
from normgraph.spec import NormSpec

# By machine the oldest CPU, so that every host that runs the tests can load it, and what it has.
OLDEST = {"x86_64": ("x86-64", "sse2"), "aarch64": ("generic", "neon")}
X = ["N", 3, "L"]
STAT = ["N", 3, 1]
PARAM = [3]
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "forward": (
        ["x", "gamma", "beta", "running_mean", "running_var", "momentum"],
        ["y", "mean", "inv_std", "new_running_mean", "new_running_var"],
    ),
    "inference": (["x", "gamma", "beta", "running_mean", "running_var"], ["y"]),
    "backward": (["dy", "x", "gamma", "mean", "inv_std"], ["dx", "dgamma", "dbeta"]),
    "backward_from_output": (["dy", "y", "gamma", "beta", "inv_std"], ["dx", "dgamma", "dbeta"]),
}
SHAPES: dict[str, list[Any]] = {
    **dict.fromkeys(("x", "y", "dy", "dx"), X),
    **dict.fromkeys(("mean", "inv_std"), STAT),
    "momentum": [],
}
STATISTICS = ("mean", "inv_std", "running_mean", "running_var", "momentum")


def tensor_entry(name: str, dtype: str) -> dict[str, Any]:
    core = "float64" if dtype == "float64" else "float32"
    statistic = name.removeprefix("new_") in STATISTICS
    return {
        "name": name,
        "dtype": core if statistic else dtype,
        "shape": SHAPES.get(name, PARAM),
    }


def kernels(dtype: str) -> dict[str, Any]:
    """The kernels; `core` is the type of the statistics."""
    from tvm.script import tirx as T

    core = "float64" if dtype == "float64" else "float32"

    @T.prim_func  # type: ignore[untyped-decorator]
    def forward(
        x_: T.handle,
        g_: T.handle,
        b_: T.handle,
        rm_: T.handle,
        rv_: T.handle,
        mo_: T.handle,
        y_: T.handle,
        m_: T.handle,
        i_: T.handle,
        nm_: T.handle,
        nv_: T.handle,
        req: T.int64,
    ) -> None:
        T.func_attr({"global_symbol": "forward", "tirx.noalias": False})
        N = T.int64()
        L = T.int64()
        a = T.int64()
        b = T.int64()
        c = T.int64()
        d = T.int64()
        e = T.int64()
        f = T.int64()
        g = T.int64()
        h = T.int64()
        i = T.int64()
        j = T.int64()
        k = T.int64()
        X = T.match_buffer(x_, (N, 3, L), dtype, align=2)
        G = T.match_buffer(g_, (3,), dtype, align=2)
        B = T.match_buffer(b_, (3,), dtype, align=2)
        RM = T.match_buffer(rm_, (3,), core, align=4)
        RV = T.match_buffer(rv_, (3,), core, align=4)
        MO = T.match_buffer(mo_, (), core, align=4)
        Y = T.match_buffer(y_, (a, b, c), dtype, align=2)
        M = T.match_buffer(m_, (d, e, f), core, align=4)
        S = T.match_buffer(i_, (g, h, i), core, align=4)
        NM = T.match_buffer(nm_, (j,), core, align=4)
        NV = T.match_buffer(nv_, (k,), core, align=4)
        if (req & 3) != 0:
            for n in range(N):
                for ch in range(3):
                    for t in range(L):
                        if (req & 3) == 1:
                            Y[n, ch, t] = X[n, ch, t] * G[ch] + B[ch]
                        else:
                            Y[n, ch, t] = Y[n, ch, t] + X[n, ch, t] * G[ch] + B[ch]
        if ((req >> 2) & 3) != 0:
            for n in range(N):
                for ch in range(3):
                    M[n, ch, 0] = T.Cast(core, X[n, ch, 0])
        if ((req >> 4) & 3) != 0:
            for n in range(N):
                for ch in range(3):
                    S[n, ch, 0] = T.Cast(core, X[n, ch, L - 1])
        if ((req >> 6) & 3) != 0:
            for ch in range(3):
                NM[ch] = RM[ch] + MO[()]
        if ((req >> 8) & 3) != 0:
            for ch in range(3):
                NV[ch] = RV[ch] * MO[()]

    @T.prim_func  # type: ignore[untyped-decorator]
    def inference(
        x_: T.handle,
        g_: T.handle,
        b_: T.handle,
        rm_: T.handle,
        rv_: T.handle,
        y_: T.handle,
        req: T.int64,
    ) -> None:
        T.func_attr({"global_symbol": "inference", "tirx.noalias": False})
        N = T.int64()
        L = T.int64()
        a = T.int64()
        b = T.int64()
        c = T.int64()
        X = T.match_buffer(x_, (N, 3, L), dtype, align=2)
        G = T.match_buffer(g_, (3,), dtype, align=2)
        B = T.match_buffer(b_, (3,), dtype, align=2)
        RM = T.match_buffer(rm_, (3,), core, align=4)
        RV = T.match_buffer(rv_, (3,), core, align=4)
        Y = T.match_buffer(y_, (a, b, c), dtype, align=2)
        for n in range(N):
            for ch in range(3):
                for t in range(L):
                    if (req & 3) == 1:
                        Y[n, ch, t] = T.Cast(dtype, 0)
                    Y[n, ch, t] = (
                        Y[n, ch, t] + X[n, ch, t] * G[ch] + B[ch] + T.Cast(dtype, RM[ch] * RV[ch])
                    )

    @T.prim_func  # type: ignore[untyped-decorator]
    def backward(
        dy_: T.handle,
        x_: T.handle,
        g_: T.handle,
        unused_: T.handle,
        i_: T.handle,
        dx_: T.handle,
        dg_: T.handle,
        db_: T.handle,
        req: T.int64,
    ) -> None:
        T.func_attr({"global_symbol": "backward", "tirx.noalias": False})
        N = T.int64()
        L = T.int64()
        a = T.int64()
        b = T.int64()
        c = T.int64()
        d = T.int64()
        e = T.int64()
        DY = T.match_buffer(dy_, (N, 3, L), dtype, align=2)
        X = T.match_buffer(x_, (N, 3, L), dtype, align=2)
        G = T.match_buffer(g_, (3,), dtype, align=2)
        S = T.match_buffer(i_, (N, 3, 1), core, align=4)
        DX = T.match_buffer(dx_, (a, b, c), dtype, align=2)
        DG = T.match_buffer(dg_, (d,), dtype, align=2)
        DB = T.match_buffer(db_, (e,), dtype, align=2)
        if (req & 3) != 0:
            for n in range(N):
                for ch in range(3):
                    for t in range(L):
                        if (req & 3) == 1:
                            DX[n, ch, t] = DY[n, ch, t] * G[ch]
                        else:
                            DX[n, ch, t] = DX[n, ch, t] + DY[n, ch, t] * G[ch]
        if ((req >> 2) & 3) != 0:
            for ch in range(3):
                if ((req >> 2) & 3) == 1:
                    DG[ch] = T.Cast(dtype, 0)
                for n in range(N):
                    for t in range(L):
                        DG[ch] = DG[ch] + T.Cast(dtype, T.Cast(core, X[n, ch, t]) * S[n, ch, 0])
        if ((req >> 4) & 3) != 0:
            for ch in range(3):
                if ((req >> 4) & 3) == 1:
                    DB[ch] = T.Cast(dtype, 0)
                for n in range(N):
                    for t in range(L):
                        DB[ch] = DB[ch] + DY[n, ch, t]

    return {
        "forward": forward,
        "inference": inference,
        "backward": backward,
        "backward_from_output": backward.with_attr("global_symbol", "backward_from_output"),
    }


class ToyAnswers:
    """The kernels' arithmetic in NumPy, float64."""

    @staticmethod
    def inputs(kind: str, n: int = 2, length: int = 5, dtype: Any = np.float32) -> list[Any]:
        """Small integers, which every dtype holds exactly."""
        rng = np.random.default_rng(7)
        core = np.float64 if dtype == np.float64 else np.float32
        sizes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("x", "y", "dy"), (n, 3, length)),
            **dict.fromkeys(("mean", "inv_std"), (n, 3, 1)),
            "momentum": (),
        }
        return [
            np.asarray(
                rng.integers(1, 4, sizes.get(name, (3,))), core if name in STATISTICS else dtype
            )
            for name in KINDS[kind][0]
        ]

    @staticmethod
    def outputs(kind: str, inputs: list[Any]) -> dict[str, Any]:
        a, b, c, d, e, *rest = (np.asarray(array).astype(np.float64) for array in inputs)
        if kind == "inference":
            return {"y": a * b[:, None] + c[:, None] + (d * e)[:, None]}
        if kind == "forward":
            return {
                "y": a * b[:, None] + c[:, None],
                "mean": a[:, :, :1],
                "inv_std": a[:, :, -1:],
                "new_running_mean": d + rest[0],
                "new_running_var": e * rest[0],
            }
        return {
            "dx": a * c[:, None],
            "dgamma": (b * e).sum((0, 2)),
            "dbeta": a.sum((0, 2)),
        }


def manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _described(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }


def _named(root: Path, stem: str, suffix: str, content: bytes) -> Path:
    file = root / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    file.write_bytes(content)
    return file


def write_artifact(root: Path, dtype: str) -> None:
    import tvm  # by need: where it is missing, artifacts are prebuilt

    functions = kernels(dtype)
    module = tvm.IRModule(
        {kind: function.with_attr("global_symbol", kind) for kind, function in functions.items()}
    )
    mcpu, feature = OLDEST[machine()]
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    made = root / "made.so"
    tvm.compile(module, target=target).export_library(str(made))
    library = made.rename(_named(root, "kernels-cpu", ".so", made.read_bytes()))
    graph = _named(root, "graph", ".onnx", b"no kernel needs it")
    vectors: dict[str, Any] = {}
    cases = []
    for kind in KINDS:
        inputs = ToyAnswers.inputs(kind)
        for name, array in zip(KINDS[kind][0], inputs, strict=True):
            stored = tensor_entry(name, dtype)["dtype"]
            if stored == "bfloat16":
                array, stored = array.view(np.uint32) >> 16, "uint16"
            vectors[f"{kind}.0.in.{name}"] = array.astype(stored)
        answers = ToyAnswers.outputs(kind, inputs)
        vectors.update({f"{kind}.0.out.{name}": value for name, value in answers.items()})
        cases.append(
            {"kind": kind, "prefix": f"{kind}.0", "tolerance": dict.fromkeys(answers, 1e-3)}
        )
    made = root / "made.npz"
    np.savez(made, **vectors)
    test = made.rename(_named(root, "selftest", ".npz", made.read_bytes()))
    spec = NormSpec("instance_norm", track_running_stats=True, momentum=None).resolve(dtype)
    manifest = {
        "format": "normgraph-artifact",
        "format_version": 1,
        "normgraph_version": normgraph.__version__,
        "spec": spec.to_dict(),
        "shape": X,
        "dtype": dtype,
        "kinds": {
            kind: {
                "function": kind,
                "graph": _described(graph),
                "inputs": [tensor_entry(name, dtype) for name in inputs_],
                "outputs": [tensor_entry(name, dtype) for name in outputs_],
                "rule": "by_hand",
            }
            for kind, (inputs_, outputs_) in KINDS.items()
        },
        "libraries": [
            {
                **_described(library),
                "target": {
                    "name": "cpu",
                    "kind": "llvm",
                    "triple": f"{machine()}-linux-gnu",
                    "mcpu": mcpu,
                    "features": [feature],
                },
            }
        ],
        "self_test": {**_described(test), "status": "not run", "cases": cases},
        "requires": {"tvm_ffi": {"from": "0.1.15", "below": "0.2"}},
        "versions": {"tvm": "0", "tvm_ffi": "0", "onnx": "0"},
    }
    manifest["digest"] = manifest_digest(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


@dataclass(frozen=True)
class Toy:
    """What a test needs of the hand-made artifacts."""

    artifact: Callable[[str], Path]
    operator: Callable[[str], Operator]
    inputs: Callable[..., list[Any]]
    outputs: Callable[[str, list[Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def toy(make_once: Callable[..., Path], prebuilt: Path | None) -> Toy:
    operators: dict[str, Operator] = {}

    def artifact(dtype: str = "float32") -> Path:
        if prebuilt is not None:
            return prebuilt / "toy" / dtype
        return make_once(f"toy-{dtype}", lambda folder: write_artifact(folder, dtype))

    def operator(dtype: str = "float32") -> Operator:
        return operators.get(dtype) or operators.setdefault(dtype, load(artifact(dtype)))

    return Toy(artifact, operator, ToyAnswers.inputs, ToyAnswers.outputs)


@pytest.fixture
def op(toy: Toy) -> Operator:
    """The float32 operator, which no test has called before."""
    return load(toy.artifact("float32"))


@pytest.fixture
def digest() -> Callable[[dict[str, Any]], str]:
    """What a manifest's digest must be."""
    return manifest_digest


@pytest.fixture
def changed(toy: Toy, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the float32 artifact whose manifest a function has changed, with a right digest."""

    def change(edit: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
        path = tmp_path / "changed"
        shutil.copytree(toy.artifact("float32"), path)
        file = path / "manifest.json"
        manifest = json.loads(file.read_text())
        edit(manifest)
        manifest["digest"] = manifest_digest(manifest)
        file.write_text(json.dumps(manifest))
        return path

    return change
