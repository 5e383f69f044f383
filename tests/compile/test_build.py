"""From a directory of graphs to an artifact: what is written, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import normgraph as ng
from normgraph.compile import build
from normgraph.errors import ArtifactNotFound, CompileError, ToolMissing
from normgraph.graphs import export, kinds

SPEC = ng.NormSpec("rms_norm")
KINDS = ("forward", "inference")


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """Two small graphs."""
    export(SPEC, shape=("N", 5), out=tmp_path / "graphs", kinds=KINDS)
    return tmp_path / "graphs"


@pytest.fixture(scope="module")
def whole(row: Callable[..., Any]) -> Path:
    """An artifact of all kinds."""
    return Path(row("batch_norm").path.parent)


def _manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "manifest.json").read_text(encoding="utf-8")))


def _snapshot(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != ".lock"}


# What is written.


def test_manifest_has_every_field(whole: Path) -> None:
    manifest = _manifest(whole)
    assert set(manifest) == {
        "format", "format_version", "normgraph_version", "spec", "shape", "dtype", "kinds",
        "libraries", "self_test", "requires", "versions", "digest",
    }  # fmt: skip
    assert manifest["format"] == "normgraph-artifact"
    assert manifest["format_version"] == 1
    assert manifest["normgraph_version"] == ng.__version__
    assert manifest["shape"] == ["N", 6, "H", "W"]
    assert manifest["dtype"] == "float32"
    spec = ng.NormSpec.from_dict(manifest["spec"])
    assert spec == ng.NormSpec("batch_norm").resolve("float32")
    assert set(manifest["kinds"]) == set(kinds(spec))
    backward = manifest["kinds"]["backward"]
    assert set(backward) == {"function", "graph", "inputs", "outputs", "rule"}
    assert backward["inputs"][0] == {
        "name": "dy",
        "dtype": "float32",
        "shape": ["N", 6, "H", "W"],
    }
    assert [entry["name"] for entry in backward["outputs"]] == ["dx", "dgamma", "dbeta"]
    (library,) = manifest["libraries"]
    assert set(library) == {"file", "sha256", "size", "form", "self_test", "target"}
    assert set(library["target"]) == {"name", "kind", "triple", "mcpu", "features"}
    assert set(manifest["versions"]) == {"tvm", "tvm_ffi", "onnx"}
    assert manifest["requires"] == {"tvm_ffi": {"from": "0.1.15", "below": "0.2"}}
    test = manifest["self_test"]
    assert test["status"] == "passed"
    assert {case["kind"] for case in test["cases"]} == set(kinds(spec))
    for case in test["cases"]:
        outputs = manifest["kinds"][case["kind"]]["outputs"]
        assert set(case["tolerance"]) == {entry["name"] for entry in outputs}
        inputs = manifest["kinds"][case["kind"]]["inputs"]
        assert set(case["shapes"]) == {entry["name"] for entry in inputs}


def test_every_file_is_named_by_its_content(whole: Path) -> None:
    manifest = _manifest(whole)
    entries = [
        *(kind["graph"] for kind in manifest["kinds"].values()),
        *manifest["libraries"],
        manifest["self_test"],
    ]
    for entry in entries:
        content = (whole / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["size"]
        assert entry["sha256"][:12] in entry["file"]
    named = {entry["file"] for entry in entries} | {"manifest.json", ".lock"}
    assert {file.name for file in whole.iterdir()} == named


def test_the_digest_is_that_of_the_canonical_json(whole: Path) -> None:
    manifest = _manifest(whole)
    digest = manifest.pop("digest")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_graphs_are_the_exported_ones_byte_for_byte(graphs: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a")
    manifest = _manifest(tmp_path / "a")
    for kind in KINDS:
        stored = tmp_path / "a" / manifest["kinds"][kind]["graph"]["file"]
        assert stored.read_bytes() == (graphs / f"{kind}.onnx").read_bytes()


def test_the_same_input_gives_the_same_bytes(graphs: Path, tmp_path: Path) -> None:
    """Graphs, self-test and kernels, hence the manifest and all file names."""
    build(graphs, out=tmp_path / "a")
    build(graphs, out=tmp_path / "b")
    assert _snapshot(tmp_path / "a") == _snapshot(tmp_path / "b")


def test_stale_files_go_and_foreign_ones_stay(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    build(graphs, out=out)
    before = set(_snapshot(out))
    (out / "notes.txt").write_text("mine")
    mine = {"model.onnx", "graph-mine.onnx", "kernels-mine.so", "selftest-x.npz"}
    for name in mine:
        (out / name).write_text("mine too")
    (out / "kernels-old-000000000000.so").write_text("left by a build that was killed")
    (out / ".writing-abc").write_text("half")
    export(ng.NormSpec("rms_norm", eps=0.5), shape=("N", 5), out=graphs, kinds=KINDS)
    build(graphs, out=out)
    after = set(_snapshot(out))
    assert {"notes.txt", "manifest.json", *mine} <= after
    assert not {"kernels-old-000000000000.so", ".writing-abc"} & after
    assert len(after) == len(before) + 1 + len(mine)
    assert ng.load(out).spec.eps == 0.5


def test_progress_says_each_step(graphs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    build(graphs, out=tmp_path / "a", progress=said.append)
    assert said == [
        "forward: schedule for cpu",
        "inference: schedule for cpu",
        "generate code for cpu and link",
        "self-test of cpu",
        f"wrote {tmp_path / 'a'}",
    ]


def test_debug_dump_has_one_file_a_step_and_kind(graphs: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a", debug_dump=tmp_path / "d" / "ump")
    found = {file.name for file in (tmp_path / "d" / "ump").iterdir()}
    steps = ("1-read.onnx.txt", "2-import.relax.py", "3-legalise.relax.py", "4-fuse.tir.py",
             "5-schedule-slices.tir.py")  # fmt: skip
    wanted = {f"{kind}.{step}" for kind in KINDS for step in steps}
    assert found - wanted == {"all.6-lower.tir.py", "all.7-generate.ll", "all.7-generate.s"}
    assert wanted <= found
    assert all((tmp_path / "d" / "ump" / name).stat().st_size > 100 for name in found)


def test_without_self_test_there_are_no_vectors(graphs: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a", self_test=False)
    test = _manifest(tmp_path / "a")["self_test"]
    assert (test["status"], test["cases"]) == ("not run", [])
    assert ng.load(tmp_path / "a").self_test() == ()


def test_the_self_test_reaches_serial_and_parallel_loops(whole: Path) -> None:
    """Kernels do small inputs in the calling thread; each kind is tested below and above that."""
    sizes: dict[str, list[int]] = {}
    for case in _manifest(whole)["self_test"]["cases"]:
        largest = max(int(np.prod(shape)) for shape in case["shapes"].values())
        sizes.setdefault(case["kind"], []).append(largest)
    assert set(sizes) == set(_manifest(whole)["kinds"])
    for large, small in sizes.values():
        assert small < 1000
        assert 32768 < large < 400_000
    assert _manifest(whole)["self_test"]["size"] < 1_000_000


def test_large_static_shapes_keep_the_self_test_small(tmp_path: Path) -> None:
    """Of 1.6 million elements a tensor, a repeated pattern and samples are stored."""
    spec = ng.NormSpec("instance_norm")
    export(spec, shape=(8, 64, 56, 56), out=tmp_path / "g", kinds=("backward",))
    out = build(tmp_path / "g", out=tmp_path / "a")
    manifest = _manifest(out)
    assert manifest["self_test"]["size"] < 200_000
    case, _ = manifest["self_test"]["cases"]
    assert case["shapes"]["x"] == [8, 64, 56, 56]
    with np.load(out / manifest["self_test"]["file"]) as stored:
        prefix = case["prefix"]
        at = stored[f"{prefix}.at.dx"]
        assert stored[f"{prefix}.in.x"].size == stored[f"{prefix}.out.dx"].size == at.size
        assert at.min() >= 0
        assert at.max() < 8 * 64 * 56 * 56
        assert f"{prefix}.at.dgamma" not in stored
        assert stored[f"{prefix}.out.dgamma"].shape == (64,)
    results = ng.load(out).self_test()
    assert [r.output for r in results] == 2 * ["dx", "dgamma", "dbeta"]
    assert all(0 < r.error <= r.tolerance for r in results)


def test_debug_graphs_compile_with_their_extra_outputs(tmp_path: Path) -> None:
    spec = ng.NormSpec("layer_norm")
    (tmp_path / "g").mkdir()
    for kind in kinds(spec):
        model = ng.graphs.build(spec, kind, ("N", 9), debug=True)
        onnx.save(model, tmp_path / "g" / f"{kind}.onnx")
    manifest = _manifest(build(tmp_path / "g", out=tmp_path / "a"))
    outputs = [entry["name"] for entry in manifest["kinds"]["backward"]["outputs"]]
    assert outputs == ["dx", "dgamma", "dbeta", "dvar", "dmean", "delta"]
    assert manifest["self_test"]["status"] == "passed"


# What is refused.


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_no_graphs(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "forward.txt").write_text("no graph")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ArtifactNotFound, match=r"expected a directory with <kind>\.onnx") as caught:
        build(tmp_path / name, out=tmp_path / "a")
    assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("other", "shape", "dtype", "key"),
    [
        (ng.NormSpec("rms_norm", eps=0.1), ("N", 5), "float32", "spec"),
        (SPEC, ("N", 6), "float32", "shape"),
        (SPEC, ("N", 5), "float64", "dtype|spec"),
    ],
)
def test_graphs_of_two_exports(
    other: ng.NormSpec, shape: tuple[Any, ...], dtype: str, key: str, graphs: Path
) -> None:
    export(other, shape=shape, dtype=dtype, out=graphs, kinds=("inference",))
    with pytest.raises(CompileError, match=rf"differ in normgraph\.({key})"):
        build(graphs, out=graphs.parent / "a")


def test_two_graphs_of_one_kind(graphs: Path) -> None:
    (graphs / "copy.onnx").write_bytes((graphs / "forward.onnx").read_bytes())
    with pytest.raises(CompileError, match=r"forward"):
        build(graphs, out=graphs.parent / "a")


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_broken_graph(content: bytes | None, graphs: Path) -> None:
    file = graphs / "forward.onnx"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(CompileError, match=r"forward\.onnx"):
        build(graphs, out=graphs.parent / "a")
    assert not (graphs.parent / "a").exists()


def _foreign() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [value("x", TensorProto.FLOAT, ["N"])],
        [value("y", TensorProto.FLOAT, ["N"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_graph_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    onnx.save(_foreign(), tmp_path / "g" / "relu.onnx")
    with pytest.raises(CompileError, match=r"metadata lacks normgraph\.spec"):
        build(tmp_path / "g", out=tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normgraph.spec", "{}"),
        ("normgraph.spec", "not json"),
        ("normgraph.spec", '{"op": "instant_norm"}'),
        ("normgraph.kind", "sideways"),
        ("normgraph.kind", "../forward"),
        ("normgraph.shape", "not json"),
        ("normgraph.dtype", "int8"),
    ],
)
def test_metadata_that_is_not_ours(key: str, value: str, tmp_path: Path) -> None:
    model = ng.graphs.build(SPEC, "forward", ("N", 5))
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
    (tmp_path / "g").mkdir()
    onnx.save(model, tmp_path / "g" / "forward.onnx")
    with pytest.raises(CompileError, match=r"forward\.onnx"):
        build(tmp_path / "g", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_ports_that_are_not_the_specs(tmp_path: Path) -> None:
    """The metadata of an export on another graph: refused by its inputs and outputs."""
    model = _foreign()
    for entry in ng.graphs.build(SPEC, "forward", ("N", 5)).metadata_props:
        model.metadata_props.add().CopyFrom(entry)
    (tmp_path / "g").mkdir()
    onnx.save(model, tmp_path / "g" / "forward.onnx")
    with pytest.raises(CompileError, match=r"inputs and outputs of forward of rms_norm, x float32"):
        build(tmp_path / "g", out=tmp_path / "a")


def test_an_operator_the_importer_does_not_take(tmp_path: Path) -> None:
    model = ng.graphs.build(SPEC, "inference", ("N", 5))
    node = next(node for node in model.graph.node if node.op_type == "Sqrt")
    node.op_type = "Bernoulli"
    (tmp_path / "g").mkdir()
    onnx.save(model, tmp_path / "g" / "inference.onnx")
    with pytest.raises(CompileError, match="inference: this graph does not compile for cpu"):
        build(tmp_path / "g", out=tmp_path / "a")


def test_a_tampered_graph_fails_the_self_test_and_leaves_the_old_artifact(
    graphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    build(graphs, out=out)
    before = _snapshot(out)
    model = onnx.load(graphs / "forward.onnx")
    node = next(n for n in model.graph.node if n.op_type == "Add")
    node.op_type = "Sub"
    onnx.save(model, graphs / "forward.onnx")
    with pytest.raises(CompileError, match=r"compiled forward gives a wrong"):
        build(graphs, out=out)
    assert _snapshot(out) == before
    with pytest.raises(CompileError, match=r"compiled forward gives a wrong"):
        build(graphs, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_out_is_a_file(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CompileError, match="expected a directory"):
        build(graphs, out=tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_out_cannot_be_made(graphs: Path) -> None:
    with pytest.raises(CompileError, match=r"cannot be written"):
        build(graphs, out="/proc/normgraph/a")


def test_no_c_compiler(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ToolMissing, match="C compiler"):
        build(graphs, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failing_c_compiler(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(CompileError, match="linking failed with status 1"):
        build(graphs, out=tmp_path / "a")


def test_a_build_leaves_no_temporary_files(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    build(graphs, out=tmp_path / "a")
    assert os.listdir(own) == []
