"""Builds on a machine with a device: when the self-test is run, what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.__main__ import main
from normgraph.errors import DeviceError


@pytest.fixture
def graphs(tmp_path: Path, fake_compiler: Any, driver: Any) -> Path:
    """Exported graphs, to be built on a machine with one sm_90 device."""
    del fake_compiler, driver
    ng.graphs.export(
        ng.NormSpec("rms_norm"), shape=(4, 8), dtype="float32", out=tmp_path / "g",
        kinds=("inference",),
    )  # fmt: skip
    return tmp_path / "g"


@pytest.fixture
def build(graphs: Path) -> Callable[..., list[str]]:
    """build(target="sm_90"): what is said while an artifact is built beside the graphs."""

    def run(target: str = "sm_90") -> list[str]:
        said: list[str] = []
        ng.compile.build(
            graphs, target, graphs.parent / "a", progress=said.append, cache=False
        )  # fmt: skip
        return said

    return run


def status(graphs: Path) -> str:
    manifest = json.loads((graphs.parent / "a" / "manifest.json").read_text())
    return str(manifest["libraries"][0]["self_test"])


def test_a_driver_older_than_the_compiler_only_leaves_the_self_test_out(
    build: Callable[..., list[str]], graphs: Path, driver: Any
) -> None:
    driver.version(12, 4)
    (line,) = [line for line in build() if "self-test" in line]
    assert line.startswith(
        "self-test of sm_90 not run: it was compiled with CUDA 13.0, and the dri"
    )
    assert status(graphs) == "not run"
    assert driver.take("load", "launch", "alloc") == []


def test_ptx_of_a_later_cuda_only_leaves_the_self_test_out(
    build: Callable[..., list[str]], fake_compiler: Any, driver: Any
) -> None:
    fake_compiler.version = (13, 2)
    driver.devices(100)
    (line,) = [line for line in build() if "self-test" in line]
    assert "not run: its PTX is of CUDA 13.2" in line
    assert driver.take("load") == []


@pytest.mark.parametrize(
    ("call", "code"),
    [("cuModuleLoadDataEx", 209), ("cuMemAlloc_v2", 2), ("cuLaunchKernel", 700),
     ("cuMemcpyDtoHAsync_v2", 700)],
)  # fmt: skip
def test_a_device_that_refuses_the_self_test_is_a_device_error(
    call: str, code: int, build: Callable[..., list[str]], graphs: Path, driver: Any
) -> None:
    driver.fail(call, code)
    with pytest.raises(DeviceError, match=r"self-test cannot be run on cuda:0: .*CUDA_ERROR"):
        build()
    assert not (graphs.parent / "a").exists()


def test_what_is_not_of_the_device_is_a_compile_error(
    build: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("an undefined symbol")

    monkeypatch.setattr("tvm_ffi.load_module", load)
    with pytest.raises(ng.errors.CompileError, match="an undefined symbol"):
        build()


def test_the_command_line_exits_with_4(
    graphs: Path, driver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.fail("cuModuleLoadDataEx", 209)
    out = str(graphs.parent / "a")
    assert main(["compile", str(graphs), "--target", "sm_90", "-o", out]) == 4
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


def test_wrong_results_are_still_a_compile_error(
    build: Callable[..., list[str]], driver: Any
) -> None:
    with pytest.raises(ng.errors.CompileError, match="gives a wrong y"):
        build()  # nothing runs the kernels
    assert driver.take("launch")
