"""The shell scripts: they parse, stop at the first error, and say what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = (
    ".ci/run",
    "scripts/build-wheel",
    "scripts/compile-cpu",
    "scripts/compile-cuda",
    "scripts/gpu_check",
    "scripts/demo",
    "scripts/lint",
    "scripts/lock",
    "scripts/setup-env",
    "scripts/test",
)
# What setup-env uses before it looks for compilers.
TOOLS = ("sh", "dirname", "uname")


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder for PATH with a Python and nothing that compiles."""
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    (tmp_path / "python3").symlink_to(sys.executable)
    return tmp_path


def setup(
    repository: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run scripts/setup-env with this environment on top of an almost empty one."""
    return subprocess.run(
        ["/bin/sh", str(repository / "scripts" / "setup-env"), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_parses_and_stops_at_the_first_error(name: str, repository: Path) -> None:
    path = repository / name
    assert path.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", path], check=True)
    code = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert code[0] == "set -e"


def test_every_shell_script_is_listed(repository: Path) -> None:
    found = {
        f"scripts/{path.name}"
        for path in (repository / "scripts").iterdir()
        if path.is_file() and not path.suffix
    }
    assert found | {".ci/run"} == set(SCRIPTS)


def test_an_environment_that_is_given_is_used(repository: Path) -> None:
    done = setup(repository, "dev", NORMGRAPH_PYTHON="/some/python")
    assert (done.returncode, done.stdout) == (0, "/some/python\n")


def test_an_unknown_environment_is_refused(repository: Path) -> None:
    done = setup(repository, "house")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'house'" in done.stderr


def test_a_missing_compiler_is_named(repository: Path, bare_path: Path) -> None:
    done = setup(repository, "demo", PATH=str(bare_path))
    assert (done.returncode, done.stdout) == (6, "")
    assert "install gcc" in done.stderr


def test_a_missing_python_is_named(repository: Path, bare_path: Path) -> None:
    (bare_path / "python3").unlink()
    done = setup(repository, "demo", PATH=str(bare_path))
    assert (done.returncode, done.stdout) == (6, "")
    assert "no Python 3.10 to 3.13 found" in done.stderr
