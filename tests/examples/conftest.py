"""Compiled example programs and a picture for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Programs:
    """The example programs, compiled with the commands in docs/c-hosts.md."""

    cc: Path
    c: Path


@pytest.fixture(scope="session")
def programs(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Both programs; fails with the name of what is missing where there is no compiler."""
    for tool, package in (("cc", "gcc"), ("c++", "g++")):
        assert shutil.which(tool), (
            f"the examples in C and C++ are tested with {tool}, which is not on the PATH"
            f" (Debian: apt-get install {package})"
        )
    root = tmp_path_factory.mktemp("programs")
    (root / "build").mkdir()
    (root / "examples").symlink_to(repository / "examples")
    (block,) = re.findall(
        r"```sh\n(.*?)```", (repository / "docs" / "c-hosts.md").read_text(), re.S
    )
    commands = [line for line in block.splitlines() if line.startswith(("ffi=", "c++ ", "cc "))]
    assert len(commands) == 3
    # tvm_ffi's own headers are not clean under -Wextra.
    strict = "ffi=$(echo $ffi | sed 's/-I/-isystem/g')' -Wall -Wextra -Werror'"
    script = "\n".join(["set -e", commands[0], strict, *commands[1:]])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=root,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Programs(root / "build" / "normalize_cc", root / "build" / "normalize_c")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph as a PPM file, 427 x 640."""
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")
    path = tmp_path_factory.mktemp("photo") / "china.ppm"
    header = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    path.write_bytes(header + pixels.tobytes())
    return path


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_program(file, *arguments): without Python, or anything else, on the PATH."""

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env={"PATH": ""},
            check=False,
        )

    return run
