"""The C++ and the C example: right on a photograph, and they notice and report what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph import NormSpec, cpu

OUTPUTS = ["y", "mean", "inv_std", "dx", "dgamma", "dbeta"]
SHAPE = ("N", 3, "H", "W")
KINDS = ("forward", "backward")


@pytest.fixture
def artifact(build_artifact: Callable[..., Path]) -> Path:
    return build_artifact(NormSpec("instance_norm"), SHAPE, kinds=KINDS)


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the artifact whose manifest a function has changed."""

    def copy(change: Callable[[dict[str, Any]], None]) -> Path:
        path = tmp_path / "artifact"
        shutil.copytree(artifact, path)
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return copy


def library(artifact: Path) -> Path:
    (path,) = artifact.glob("kernels-*.so")
    return path


def verdicts(text: str) -> dict[str, str]:
    """By output, what the program said of it."""
    lines = [line for line in text.splitlines() if " error " in line]
    return {line.split()[0]: line.rpartition(": ")[2] for line in lines}


def test_from_cpp(artifact: Path, programs: Any, photo: Path, run_program: Any) -> None:
    done = run_program(programs.cc, artifact, photo)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done.stdout) == dict.fromkeys(OUTPUTS, "ok")


def test_from_c(artifact: Path, programs: Any, photo: Path, run_program: Any) -> None:
    done = run_program(programs.c, library(artifact), photo)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done.stdout) == dict.fromkeys(OUTPUTS, "ok")


def test_a_wrong_result_is_noticed(
    build_artifact: Callable[..., Path],
    copied: Callable[..., Path],
    programs: Any,
    photo: Path,
    run_program: Any,
) -> None:
    """Kernels with another eps than the answers: of that of the picture, the variance is 1e3."""
    other = build_artifact(NormSpec("instance_norm", eps=0.5), SHAPE, kinds=KINDS)
    told = copied(lambda manifest: manifest["spec"].update(eps=0.5))
    for command in ((programs.c, library(other)), (programs.cc, told)):
        done = run_program(*command, photo)
        assert done.returncode == 1, done.stdout + done.stderr
        found = verdicts(done.stdout)
        assert found["mean"] == "ok"
        assert found["inv_std"] == found["y"] == found["dx"] == "WRONG"


def test_an_error_of_a_kernel_is_reported(
    build_artifact: Callable[..., Path], programs: Any, photo: Path, run_program: Any
) -> None:
    """A library over four channels refuses a picture of three."""
    four = build_artifact(NormSpec("instance_norm"), ("N", 4, "H", "W"), kinds=KINDS)
    for command, code in (((programs.c, library(four)), 1), ((programs.cc, four), 3)):
        done = run_program(*command, photo)
        assert done.returncode == code
        assert "x.shape[1]" in done.stderr
        assert not verdicts(done.stdout)


def test_no_library_for_this_cpu(
    copied: Callable[..., Path], programs: Any, photo: Path, run_program: Any
) -> None:
    def ask_for_more(manifest: dict[str, Any]) -> None:
        manifest["libraries"][0]["target"]["features"].append("one-of-the-future")

    done = run_program(programs.cc, copied(ask_for_more), photo)
    assert done.returncode == 3
    assert "no library of the artifact runs on this CPU" in done.stderr


def test_the_names_of_features_are_the_runtimes(repository: Path) -> None:
    """The example knows a CPU by the same names, also those that this machine has not."""
    source = (repository / "examples" / "cpp" / "normalize.cc").read_text()
    table = source.partition("kLinuxNames = {")[2].partition("};")[0]
    pairs = re.findall(r'\{"([^"]+)", "([^"]+)"\}', table)
    assert dict(pairs) == cpu.LINUX_NAMES
    assert len(pairs) == len(cpu.LINUX_NAMES)


def test_the_best_library_of_several_is_taken(
    copied: Callable[..., Path], programs: Any, photo: Path, run_program: Any
) -> None:
    """One for less of the CPU, one for another machine and an object file are passed over."""

    def add(manifest: dict[str, Any]) -> None:
        (best,) = manifest["libraries"]
        target = best["target"]
        machine = "aarch64" if target["triple"].startswith("x86_64") else "x86_64"
        plain = {**best, "file": "plain.so", "target": {**target, "features": []}}
        foreign = {**target, "triple": f"{machine}-linux-gnu"}
        others = [{**best, "file": "foreign.so", "target": foreign}]
        others += [{**best, "file": "object.o", "form": "object"}, plain]
        manifest["libraries"] = [*others, best, plain]

    done = run_program(programs.cc, copied(add), photo)
    assert done.returncode == 0, done.stderr


def test_bad_arguments(
    artifact: Path, programs: Any, photo: Path, run_program: Any, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.ppm"
    cut.write_bytes(photo.read_bytes()[:-1])
    for picture in (cut, tmp_path / "none.ppm", library(artifact)):
        for command in ((programs.cc, artifact), (programs.c, library(artifact))):
            done = run_program(*command, picture)
            assert (done.returncode, done.stdout) == (2, "")
            assert str(picture) in done.stderr
    for command in ((programs.cc, tmp_path), (programs.c, photo)):
        done = run_program(*command, photo)
        assert done.returncode == 3
        assert done.stderr
    assert run_program(programs.cc).returncode == run_program(programs.c).returncode == 2
