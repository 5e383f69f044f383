"""The catalogue: what ./scripts/compile-cpu builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.scripts import catalogue, demo
from normgraph.spec import OPERATORS


def test_it_holds_every_operator() -> None:
    assert sorted(entry.spec.op for entry in catalogue.ENTRIES) == sorted(OPERATORS)


def test_it_builds_one_artifact_a_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compile", "--out", str(tmp_path), "rms_norm"])
    assert catalogue.main() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        str(tmp_path / "rms_norm-float32"),
        str(tmp_path / "rms_norm-float16"),
    ]
    assert "2/2 rms_norm-float16" in err
    for line in out.splitlines():
        assert set(ng.load(line).kinds) == set(ng.graphs.kinds(ng.NormSpec("rms_norm")))


def test_it_builds_for_several_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "DTYPES", ("float16",))
    monkeypatch.setattr(
        "sys.argv", ["compile", "--out", str(tmp_path), "--target", "cpu,x86-64-v2", "rms_norm"]
    )
    assert catalogue.main() == 0
    manifest = ng.load(tmp_path / "rms_norm-float16").manifest
    assert [library["target"]["name"] for library in manifest["libraries"]] == ["cpu", "x86-64-v2"]


def test_every_operator_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "DTYPES", ("float16",))
    monkeypatch.setattr("sys.argv", ["compile", "--out", str(tmp_path)])
    assert catalogue.main() == 0
    for entry in catalogue.ENTRIES:
        operator = ng.load(tmp_path / f"{entry.spec.op}-float16")
        assert operator.kinds == ng.graphs.kinds(entry.spec)
        assert operator.dtype == "float16"


def test_a_mistake_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compile", "--out", str(tmp_path), "--target", "z80"])
    assert catalogue.main() == 2
    assert "z80" in capsys.readouterr().err


@pytest.mark.parametrize("module", [catalogue, demo])
def test_a_folder_that_cannot_be_made(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--out", "/proc/nowhere"])
    assert module.main() in (2, 5)
    err = capsys.readouterr().err
    assert "/proc/nowhere" in err
    assert "Traceback" not in err


def test_an_operator_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compile", "--out", str(tmp_path), "sum_norm"])
    with pytest.raises(SystemExit) as stop:
        catalogue.main()
    assert stop.value.code == 2
    assert "sum_norm" in capsys.readouterr().err


def test_for_cuda_it_has_bfloat16_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []

    def build(graphs: str, target: object, out: Path) -> Path:
        asked.append((out.name, target))
        return out

    monkeypatch.setattr(ng.compile, "build", build)
    catalogue.build_catalogue(tmp_path, ("sm_80", "sm_90"), operators=("rms_norm",))
    assert asked == [
        (f"rms_norm-{dtype}", ("sm_80", "sm_90")) for dtype in ("float32", "float16", "bfloat16")
    ]
