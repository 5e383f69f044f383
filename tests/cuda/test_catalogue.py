"""The catalogue for CUDA: what ./scripts/compile-cuda builds, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normgraph.compile import cuda_compilers, cuda_report
from normgraph.scripts import catalogue


@pytest.fixture(autouse=True)
def without_nvcc(no_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and of the compilers NVRTC alone."""
    monkeypatch.setenv(cuda_compilers.VARIABLE, "nvrtc")


def test_every_dtype_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["c", "--target", "cuda", "--out", str(tmp_path), "rms_norm"])
    assert catalogue.main() == 0
    built = sorted(path.name for path in tmp_path.iterdir())
    assert built == ["rms_norm-bfloat16", "rms_norm-float16", "rms_norm-float32"]
    for name in built:
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        (library,) = manifest["libraries"]
        assert library["target"]["name"] == "cuda"
        content = (tmp_path / name / library["file"]).read_bytes()
        # The library itself, and code for sm_80 and sm_90; then PTX.
        assert content.count(b"\x7fELF") >= 3
        assert content.count(b".target sm_90") == 1
        found = library["target"]["kernels"]
        assert set(found) == {"sm_80", "sm_90"}
        for each in found.values():
            assert each["count"] > 5
            assert each["spilling"] == []
    assert "3 artifacts" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("spilling: none")


def test_kernels_that_spill_are_named(tmp_path: Path) -> None:
    """Of all artifacts and architectures, by what the assembler said."""
    line = "{0} bytes stack frame, {0} bytes spill stores, {0} bytes spill loads\n"
    text = "".join(
        f"ptxas info : Compiling entry function '{name}' for 'sm_90'\n{line.format(nbytes)}"
        for name, nbytes in (("forward_kernel", 0), ("backward_kernel", 8))
    )
    kernels = cuda_report.assembled({"sm_90": text, "compute_90": ""})
    assert kernels == {"sm_90": {"count": 2, "spilling": ["backward_kernel"]}}
    manifest = {"libraries": [{"target": {"kernels": kernels}}, {"target": {}}]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    said = catalogue.summary([tmp_path / "a", tmp_path / "b"])
    assert said.startswith("2 artifacts, 0.0 MB; CUDA kernels: 4 for sm_90; ")
    assert said.endswith("spilling: backward_kernel of a for sm_90, backward_kernel of b for sm_90")


def test_without_a_compiler_it_ends_with_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(cuda_compilers.VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(cuda_compilers, "missing_wheels", lambda: ["nvidia-cuda-nvrtc"])
    cuda_compilers.nvrtc.cache_clear()
    monkeypatch.setattr("sys.argv", ["c", "--target", "cuda", "--out", str(tmp_path), "rms_norm"])
    try:
        assert catalogue.main() == 6
    finally:
        cuda_compilers.nvrtc.cache_clear()
    assert "normgraph[cuda]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
