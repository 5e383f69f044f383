"""CUDA targets: their names, what their libraries hold, and what this machine says of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph import cuda
from normgraph.__main__ import main
from normgraph.compile import cuda_compilers, resolve, resolve_all
from normgraph.errors import TargetError, ToolMissing
from normgraph.scripts import cli_doctor


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("cuda", ("sm_80", "sm_90", "compute_90")),
        ("sm_80", ("sm_80", "compute_80")),
        ("sm_90", ("sm_90", "compute_90")),
        ("sm_100", ("sm_100", "compute_100")),
    ],
)
def test_what_each_target_holds(name: str, images: tuple[str, ...]) -> None:
    target = resolve(name)
    assert (target.kind, target.images, target.vector_bytes) == ("cuda", images, 16)
    assert target.to_tvm().kind.name == "cuda"
    assert target.to_tvm().host.kind.name == "llvm"
    assert target.features == ()


def test_cpu_targets_hold_no_images() -> None:
    assert resolve("cpu").images == ()
    assert resolve("cpu").kind == "llvm"


def test_an_artifact_is_for_one_kind_of_device() -> None:
    with pytest.raises(TargetError, match="Build one artifact for each"):
        resolve_all(("cpu", "cuda"))
    assert [each.name for each in resolve_all(("sm_80", "sm_90"))] == ["sm_80", "sm_90"]


def test_which_image_a_device_runs() -> None:
    images = ("sm_80", "sm_90", "compute_90")
    runs = {(7, 5): None, (8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (12, 1): "compute_90"}
    assert {capability: cuda.image_for(capability, images) for capability in runs} == runs
    assert cuda.image_for((8, 0), ("sm_86", "compute_80")) == "compute_80"
    assert cuda.image_for((9, 0), ("compute_80", "compute_90", "nonsense")) == "compute_90"
    assert cuda.capability_of("sm_100") == (10, 0)


def test_targets_run_where_a_device_does(driver: Any) -> None:
    assert [resolve(n).runs_here for n in ("sm_80", "sm_90", "sm_100")] == [True, True, False]
    driver.devices(75, 80)
    assert [resolve(n).runs_here for n in ("cuda", "sm_90")] == [True, False]
    assert [resolve(n).device for n in ("cuda", "sm_90")] == [1, None]
    driver.devices(100, 90)
    assert [resolve(n).device for n in ("sm_90", "sm_80", "sm_100")] == [1, 0, 0]


def test_targets_of_a_later_cuda_do_not_run(driver: Any) -> None:
    driver.version(12, 4)
    assert resolve("sm_90").runs_here
    assert resolve("sm_90").obstacle((12, 8)) is None
    assert "the driver supports CUDA 12.4" in (resolve("sm_90").obstacle((13, 0)) or "")
    assert resolve("cpu").obstacle((13, 0)) is None


def test_targets_without_a_driver(no_driver: None) -> None:
    assert not resolve("cuda").runs_here
    assert resolve("cuda").device is None


def test_doctor_tells_of_devices(driver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    driver.devices(80, 90)
    cli_doctor.doctor(argparse.Namespace(json=True))
    found = {e["name"]: e["found"] for e in json.loads(capsys.readouterr().out)}
    assert found["driver"] == "supports CUDA 13.0"
    assert (found["device 0"], found["device 1"]) == ("Fake 0, sm_80", "Fake 1, sm_90")


def test_doctor_without_a_driver(no_driver: None, capsys: pytest.CaptureFixture[str]) -> None:
    cli_doctor.doctor(argparse.Namespace(json=True))
    (line,) = [e for e in json.loads(capsys.readouterr().out) if e["topic"] == "cuda"]
    assert "there is no CUDA driver" in line["found"]
    assert line["status"] == "ok"


@pytest.fixture
def nvcc_of(tmp_path: Path, no_nvcc: None) -> Callable[[str], None]:
    """nvcc_of("11.5"): the nvcc on the PATH is of that CUDA."""

    def put(version: str) -> None:
        tool = tmp_path / "nvcc"
        tool.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}'\n"
        )
        tool.chmod(0o755)
        cuda_compilers.nvcc.cache_clear()

    return put


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without the CUDA toolkit."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv(cuda_compilers.VARIABLE, raising=False)


def test_without_a_compiler_the_extra_is_named(
    no_nvcc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_compilers, "WHEELS", ("nvidia-cuda-none",))
    cuda_compilers.nvrtc.cache_clear()
    try:
        with pytest.raises(ToolMissing, match=r"pip install 'normgraph\[cuda\]'") as caught:
            cuda_compilers.find()
        assert caught.value.exit_code == 6
        assert "nvidia-cuda-none" in str(caught.value)
        assert "nvcc is not on the PATH" in str(caught.value)
    finally:
        cuda_compilers.nvrtc.cache_clear()


def test_the_command_line_exits_with_6(
    no_nvcc: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cuda_compilers, "missing_wheels", lambda: ["nvidia-cuda-nvrtc"])
    cuda_compilers.nvrtc.cache_clear()
    spec = ng.NormSpec("rms_norm")
    ng.graphs.export(spec, shape=("N", 4), dtype="float32", out=tmp_path / "g", kinds=("forward",))
    code = main(["compile", str(tmp_path / "g"), "--target", "cuda", "-o", str(tmp_path / "a")])
    assert code == 6
    assert "normgraph[cuda]" in capsys.readouterr().err
    assert not (tmp_path / "a" / "manifest.json").exists()
    cuda_compilers.nvrtc.cache_clear()


def test_the_compiler_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, nvcc_of: Callable[[str], None]
) -> None:
    nvcc_of("12.9")
    found = cuda_compilers.find()
    assert (found.name, found.version) == ("nvcc", (12, 9))
    monkeypatch.setenv(cuda_compilers.VARIABLE, "nvrtc")
    assert cuda_compilers.find().name == "nvrtc"
    monkeypatch.setenv(cuda_compilers.VARIABLE, "clang")
    with pytest.raises(ToolMissing, match="expected nvcc or nvrtc"):
        cuda_compilers.find()


@pytest.mark.parametrize(
    ("target", "first", "before"),
    [
        ("sm_80", "11.0", "10.2"),
        ("sm_90", "11.8", "11.7"),
        ("cuda", "11.8", "11.0"),
        ("sm_100", "12.8", "12.6"),
    ],
)
def test_an_nvcc_that_does_not_know_an_architecture_is_passed_over(
    target: str, first: str, before: str, nvcc_of: Callable[[str], None]
) -> None:
    archs = resolve(target).archs
    nvcc_of(first)
    assert cuda_compilers.find(archs).name == "nvcc"
    nvcc_of(before)
    assert cuda_compilers.find(archs).name == "nvrtc"


def test_without_a_compiler_that_knows_the_architecture_both_are_told(
    monkeypatch: pytest.MonkeyPatch, nvcc_of: Callable[[str], None]
) -> None:
    nvcc_of("11.5")
    monkeypatch.setattr(cuda_compilers, "nvrtc", lambda: None)
    with pytest.raises(
        ToolMissing, match=r"sm_80, sm_90 needs .* of CUDA 11\.8 or later"
    ) as caught:
        cuda_compilers.find(resolve("cuda").archs)
    assert "the nvcc that is here is of CUDA 11.5, and NVRTC is not" in str(caught.value)
    monkeypatch.setenv(cuda_compilers.VARIABLE, "nvcc")
    with pytest.raises(ToolMissing, match=r"nvcc that is here is of CUDA 11\.5\. pip install"):
        cuda_compilers.find(("sm_90",))


def test_nvcc_beside_cuda_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_nvcc: None
) -> None:
    tool = tmp_path / "toolkit" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert cuda_compilers.find().version == (13, 0)
