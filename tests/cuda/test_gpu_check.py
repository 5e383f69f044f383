"""The GPU check as far as a machine without a GPU can tell: what is packed, and how it starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import CompileError
from normgraph.scripts import gpu_check, gpu_pack, gpu_torch
from normgraph.scripts.gpu_cases import ARCHIVE, cases
from normgraph.scripts.gpu_jobs import jobs
from normgraph.scripts.gpu_process import Late


def fake_build(size: int) -> Any:
    def build(graphs: str, target: str, out: Path) -> Path:
        assert target == "cuda"
        kinds = {file.stem for file in Path(graphs).glob("*.onnx")}
        assert {"forward", "inference", "backward", "backward_from_output"} <= kinds
        out.mkdir(parents=True)
        (out / "manifest.json").write_bytes(np.random.default_rng(0).bytes(size))
        return out

    return build


def fake_wheels(repository: Path, target: Path) -> None:
    (target / "normgraph.whl").write_text("ours")


def test_a_pack_holds_artifacts_wheels_and_the_script(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ng.compile, "build", fake_build(10))
    chosen = cases()[:3]
    said: list[str] = []
    out = gpu_pack.pack(
        tmp_path / "p", repository, chosen=chosen, wheels=fake_wheels, progress=said.append
    )
    names = {case.name for case in chosen}
    for _ in range(2):  # unpacked once
        assert {path.name for path in gpu_check.unpacked(out).iterdir()} == names
    assert len(list(out.glob("artifacts-*"))) == 1
    manifest = gpu_check.unpacked(out) / chosen[0].name / "manifest.json"
    assert manifest.read_bytes() == np.random.default_rng(0).bytes(10)
    assert (out / "wheels" / "normgraph.whl").exists()
    assert os.access(out / "gpu_check", os.X_OK)
    about = json.loads((out / "pack.json").read_text())
    assert set(about["names"]) == names
    assert gpu_check.unpacked(out).name == f"artifacts-{about['digest']}"
    assert said[-1].startswith("packed 0.0 MB")
    (out / "stale").write_text("")
    gpu_pack.pack(out, repository, chosen=chosen, wheels=fake_wheels, progress=said.append)
    assert not (out / "stale").exists()


def test_a_pack_copied_over_another_is_unpacked_anew(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = tmp_path / "carried"
    holds: dict[str, str] = {}

    def wheels(repository: Path, target: Path) -> None:
        (target / "our.whl").write_text(holds["wheel"])

    for size, text in ((10, "a"), (20, "a"), (20, "b")):
        holds["wheel"] = text
        monkeypatch.setattr(ng.compile, "build", fake_build(size))
        made = gpu_pack.pack(
            tmp_path / "made",
            repository,
            chosen=cases()[:1],
            wheels=wheels,
            progress=lambda line: None,
        )
        shutil.copytree(made, carried, dirs_exist_ok=True)
        (found,) = gpu_check.unpacked(carried).glob("*/manifest.json")
        assert found.read_bytes() == np.random.default_rng(0).bytes(size)
        (folder,) = carried.glob("artifacts-*")
        assert folder.name.endswith(json.loads((carried / "pack.json").read_text())["digest"])
    (carried / "pack.json").unlink()
    assert gpu_check.unpacked(carried) == carried / "artifacts"


def test_a_pack_that_is_too_large_is_refused(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_pack.MOST_BYTES == 60e6
    monkeypatch.setattr(gpu_pack, "MOST_BYTES", 10**6)
    monkeypatch.setattr(ng.compile, "build", fake_build(10**6))
    with pytest.raises(CompileError, match=r"1\.0 MB, and at most 1 MB"):
        gpu_pack.pack(
            tmp_path, repository, chosen=cases()[:1], wheels=fake_wheels, progress=lambda line: None
        )


def test_without_a_device_it_says_so(
    no_driver: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 4
    assert "there is no CUDA driver" in capsys.readouterr().err


def test_it_starts_with_nothing_but_python(no_driver: None) -> None:
    """Where NumPy and tvm_ffi are missing too, it gets as far as to say that no device is here."""
    code = (
        "import sys\n"
        "for name in ('numpy', 'tvm_ffi', 'torch', 'onnx', 'tvm', 'ml_dtypes'):\n"
        "    sys.modules[name] = None\n"
        "from normgraph.scripts import gpu_check\n"
        "sys.exit(gpu_check.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "there is no CUDA driver" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_torch_without_cuda_is_told(
    driver: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 6
    assert "cannot use the CUDA device" in capsys.readouterr().err


def test_a_choice_of_no_case_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--only", "sum_norm"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "sum_norm" in capsys.readouterr().err


def test_a_digest_is_of_the_archive_and_every_wheel(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    contents = {ARCHIVE: "a", "wheels/ours.whl": "b", "wheels/theirs.whl": "c"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    digest = gpu_pack._digest(tmp_path)
    assert gpu_pack._digest(tmp_path) == digest
    for name, text in contents.items():
        (tmp_path / name).write_text("d")
        assert gpu_pack._digest(tmp_path) != digest
        (tmp_path / name).write_text(text)


def write_about(folder: Path, digest: str) -> None:
    """A pack.json as `pack` writes it."""
    about = {"normgraph": "0.1", "tvm_ffi": "0.2", "digest": digest, "names": [cases()[0].name]}
    (folder / "pack.json").write_text(json.dumps(about, indent=1) + "\n")


def test_the_script_runs_from_the_folder_alone(
    tmp_path: Path, repository: Path, no_driver: None
) -> None:
    shutil.copy(repository / "scripts" / "gpu_check", tmp_path)
    (tmp_path / "wheels").mkdir()
    write_about(tmp_path, "1")
    (tmp_path / "site-1").mkdir()
    done = subprocess.run(
        [str(tmp_path / "gpu_check"), "--accuracy"],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "gpu_check needs a CUDA device" in done.stderr


def test_an_install_that_broke_off_is_done_again(tmp_path: Path, repository: Path) -> None:
    """site is there as a whole or not at all, and of this pack."""
    shutil.copy(repository / "scripts" / "gpu_check", tmp_path)
    (tmp_path / "wheels").mkdir()
    write_about(tmp_path, "1")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "$@" >>"$0.log"\n'
        'while [ "$1" ] && [ "$1" != --target ]; do shift; done\n'
        '[ "$1" ] || exit 0\n'
        'mkdir "$2" && [ -e "$0.works" ]\n'
    )
    python.chmod(0o755)

    def run() -> int:
        env = {**os.environ, "PYTHON": str(python)}
        return subprocess.run([str(tmp_path / "gpu_check")], env=env, check=False).returncode

    def sites() -> list[str]:
        return [path.name for path in tmp_path.glob("site*")]

    assert run() != 0
    assert sites() == ["site-1.part"]
    (tmp_path / "python.works").touch()
    for digest in ("1", "1", "2"):
        write_about(tmp_path, digest)
        assert run() == 0
        assert sites() == [f"site-{digest}"]
    calls = (tmp_path / "python.log").read_text().splitlines()
    kinds = ["install" if " install " in call else "run" for call in calls]
    assert kinds == ["install", "install", "run", "run", "install", "run"]
    assert calls[0].endswith(" normgraph==0.1 apache-tvm-ffi==0.2")
    (tmp_path / "pack.json").write_text("{}")
    assert run() != 0


READY = """
import json, sys
device = {"name": "H", "arch": "sm_90", "processors": 1, "l2_bytes": 1048576, "driver": "13.0"}
print(json.dumps({"device": device, "versions": {"torch": "2"}}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_with(
    tmp_path: Path, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], int]:
    """Check with a worker of this code, within so many seconds; the exit code."""

    def run(code: str, budget: str) -> int:
        monkeypatch.setattr(gpu_torch, "usable", lambda: None)
        monkeypatch.setattr(gpu_check, "command_of", lambda folder: [sys.executable, "-c", code])
        arguments = ["gpu_check", "--folder", str(tmp_path), "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [*arguments, "--budget", budget])
        return gpu_check.main()

    return run


def test_a_budget_in_which_no_worker_starts_is_told(
    run_with: Callable[[str, str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check, "_GRACE_SECONDS", 0.1)
    assert run_with("import time; time.sleep(600)", "0.1") == 4
    assert "give --budget more seconds" in capsys.readouterr().err


def test_a_budget_that_ends_in_the_limits_leaves_all_jobs(
    tmp_path: Path, run_with: Callable[[str, str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(worker: Any) -> Any:
        raise Late

    monkeypatch.setattr(gpu_check, "_limits", late)
    assert run_with(READY, "500") == 0
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["left"] == len(jobs())
    assert report["done"] == {}


@pytest.mark.parametrize("budget", ["0", "-3", "nan"])
def test_a_budget_of_nothing_is_refused(
    budget: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--budget", budget])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "more than 0 seconds" in capsys.readouterr().err
