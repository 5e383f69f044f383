"""verify passes a sound artifact and fails a wrong kernel, a wrong graph and a wrong spec."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import normgraph
from normgraph import NormSpec
from normgraph.errors import ArgumentError, ArtifactNotFound, CompileError, ToolMissing
from normgraph.scripts.verify import verify, verify_data
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_report import FAILED, NOT_RUN, PASSED, Report

SHAPE = ("N", 6, "H", "W")


@pytest.fixture(scope="session")
def artifact(build_artifact: Callable[..., Path]) -> Path:
    return build_artifact(NormSpec("batch_norm"), SHAPE)


@pytest.fixture(scope="session")
def report(artifact: Path) -> Report:
    return verify(artifact)


def _failed(report: Report) -> set[tuple[str, str, str, str]]:
    return {
        (row.kind, row.output, row.subject, row.against)
        for row in report.rows
        if row.status == FAILED
    }


def _rewrite(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its digest fit again, so that it loads."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["digest"]
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def test_a_sound_artifact_passes(report: Report) -> None:
    assert report.ok, report.to_text()
    assert json.loads(report.to_json())["ok"] is True


def test_every_output_of_every_kind_is_compared_with_everything(report: Report) -> None:
    spec = NormSpec("batch_norm")
    rows = {(row.kind, row.output, row.subject, row.against) for row in report.rows}
    for kind in normgraph.graphs.kinds(spec):
        model = normgraph.graphs.build(spec, kind, SHAPE)
        for output in (each.name for each in model.graph.output):
            for pair in (
                ("kernel", "float64"),
                ("onnxruntime", "float64"),
                ("kernel", "onnxruntime"),
            ):
                assert (kind, output, *pair) in rows
            if kind.startswith("backward"):
                assert (kind, output, "reference", "differences") in rows
    for kind in ("backward", "backward_from_output"):
        for output in ("dvar", "dmean", "dx"):
            for subject in ("kernel", "onnxruntime"):
                assert (f"{kind} (debug)", output, subject, "float64") in rows
    assert {row.status for row in report.rows} == {PASSED}
    assert len({row.case for row in report.rows}) == 6


def test_one_shape_is_checked_where_one_is_given(artifact: Path) -> None:
    told: list[str] = []
    report = verify(artifact, (2, 6, 3, 11), seed=4, progress=told.append)
    assert report.ok, report.to_text()
    assert {row.case for row in report.rows} == {"2x6x3x11 N(0,1)", "2x6x3x11 N(100,1)"}
    assert report.command == f"normgraph verify {artifact} --shape 2,6,3,11 --seed 4"
    assert told


def test_given_data_is_checked(artifact: Path) -> None:
    inputs = Inputs(NormSpec("batch_norm"), "float32", Case((2, 6, 5, 5), 1.0), seed=1)
    report = verify_data(artifact, inputs.take(["x", "dy"]), "some pictures")
    assert report.ok, report.to_text()
    assert {row.case for row in report.rows} == {"2x6x5x5 some pictures"}
    assert report.worst("backward", "dx") is not None


def test_a_kernel_with_a_flipped_sign_fails(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = normgraph.load
    sound = load(artifact)

    class Flipped:
        spec, shape, dtype = sound.spec, sound.shape, sound.dtype
        kinds, manifest = sound.kinds, sound.manifest
        target, signature = sound.target, sound.signature

        def call(self, kind: str, *arguments: Any) -> Any:
            found = sound.call(kind, *arguments)
            return found._replace(dx=-found.dx) if kind == "backward" else found

    monkeypatch.setattr(
        normgraph, "load", lambda path: Flipped() if path == artifact else load(path)
    )
    report = verify(artifact, (2, 6, 3, 11))
    assert not report.ok
    bad = {each for each in _failed(report) if "(debug)" not in each[0]}
    assert bad == {
        ("backward", "dx", "kernel", "float64"),
        ("backward", "dx", "kernel", "onnxruntime"),
        ("backward", "dx", "kernel", "differences"),
    }
    assert "FAILED backward dx, kernel against differences" in report.to_text()


def test_a_graph_with_a_flipped_sign_fails(artifact: Path, tmp_path: Path) -> None:
    """Another graph beside sound kernels: onnxruntime's results are out, the kernel's are not."""
    wrong = tmp_path / "artifact"
    shutil.copytree(artifact, wrong)

    def flip(manifest: dict[str, Any]) -> None:
        entry = manifest["kinds"]["backward"]["graph"]
        model = onnx.load(wrong / entry["file"])
        for node in model.graph.node:
            node.output[:] = ["dx_before" if name == "dx" else name for name in node.output]
            node.input[:] = ["dx_before" if name == "dx" else name for name in node.input]
        model.graph.node.append(onnx.helper.make_node("Neg", ["dx_before"], ["dx"]))
        content = model.SerializeToString()
        (wrong / entry["file"]).unlink()
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {
            "file": f"graph-backward-{sha256[:12]}.onnx",
            "sha256": sha256,
            "size": len(content),
        }
        (wrong / entry["file"]).write_bytes(content)

    _rewrite(wrong, flip)
    report = verify(wrong, (2, 6, 3, 11))
    assert not report.ok
    assert _failed(report) == {
        ("backward", "dx", "onnxruntime", "float64"),
        ("backward", "dx", "kernel", "onnxruntime"),
    }


def test_a_graph_that_onnxruntime_cannot_run_fails(artifact: Path, tmp_path: Path) -> None:
    """A node of a domain that nobody has: not for onnxruntime to leave out."""
    wrong = tmp_path / "artifact"
    shutil.copytree(artifact, wrong)

    def rename(manifest: dict[str, Any]) -> None:
        entry = manifest["kinds"]["backward"]["graph"]
        model = onnx.load(wrong / entry["file"])
        model.graph.node[0].op_type = "NoSuchNode"
        content = model.SerializeToString()
        (wrong / entry["file"]).write_bytes(content)
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}

    _rewrite(wrong, rename)
    report = verify(wrong, (2, 6, 3, 11))
    assert not report.ok
    assert _failed(report) == {
        ("backward", output, "onnxruntime", "float64") for output in ("dx", "dgamma", "dbeta")
    }
    assert "NoSuchNode" in report.to_text()


@pytest.mark.parametrize(
    ("op", "built", "given", "refused"),
    [
        ("batch_norm", (1, 3, 1, 1), None, {"forward"}),
        ("instance_norm", ("N", 4, "L"), (1, 4, 1), {"forward", "inference"}),
    ],
)
def test_one_value_a_statistic(
    op: str,
    built: tuple[int | str, ...],
    given: tuple[int, ...] | None,
    refused: set[str],
    build_artifact: Callable[..., Path],
) -> None:
    report = verify(build_artifact(NormSpec(op), built), given)
    assert report.ok, report.to_text()
    assert {row.kind for row in report.rows if row.status == NOT_RUN} == refused
    assert not refused & {row.kind for row in report.rows if row.status == PASSED}
    assert "Expected more than 1" in report.to_text()
    assert "backward" in {row.kind for row in report.rows if row.status == PASSED}


def test_the_target_is_that_of_the_library_that_runs(artifact: Path, tmp_path: Path) -> None:
    several = tmp_path / "artifact"
    shutil.copytree(artifact, several)

    def add(manifest: dict[str, Any]) -> None:
        own = manifest["libraries"][0]
        other = {**own["target"], "name": "future", "features": ["time-travel"]}
        manifest["libraries"].insert(0, {**own, "target": other})

    _rewrite(several, add)
    inputs = Inputs(NormSpec("batch_norm"), "float32", Case((2, 6, 5), 1.0), seed=1)
    x = inputs.take(["x"])["x"].reshape(2, 6, 5, 1)
    assert verify_data(several, {"x": x}, "some pictures").target == "cpu"


def test_kernels_for_another_spec_fail(artifact: Path, tmp_path: Path) -> None:
    """A manifest that says another eps than the kernels and graphs were made with."""
    wrong = tmp_path / "artifact"
    shutil.copytree(artifact, wrong)
    _rewrite(wrong, lambda manifest: manifest["spec"].update(eps=0.1))
    report = verify(wrong, (2, 6, 3, 11))
    assert not report.ok
    assert ("forward", "y", "kernel", "float64") in _failed(report)
    assert ("backward_frozen", "dx", "kernel", "differences") in _failed(report)


@pytest.mark.parametrize(
    ("error", "ok"), [(ToolMissing("no C compiler"), True), (CompileError("a wrong dx"), False)]
)
def test_a_debug_build_that_cannot_be_made_is_said(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, ok: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(normgraph.compile, "build", fail)
    report = verify(artifact, (2, 6, 3, 11))
    assert report.ok == ok
    rows = [row for row in report.rows if "(debug)" in row.kind]
    assert {row.status for row in rows if row.subject == "onnxruntime"} == {PASSED}
    assert NOT_RUN in {row.status for row in rows if row.subject == "kernel"}
    assert str(error) in report.to_text()


def test_bad_requests_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="N,6,H,W"):
        verify(artifact, (2, 7, 3, 3))
    with pytest.raises(ArtifactNotFound):
        verify(tmp_path / "nothing")
