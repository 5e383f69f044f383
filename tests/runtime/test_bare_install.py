"""The runtime's tests in an environment that holds numpy, apache-tvm-ffi and the wheel alone."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import venv
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

RUNTIME = ("numpy", "apache-tvm-ffi", "typing-extensions")
# What runs the tests; apart, so that nothing of ours finds more beside it than these.
HARNESS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli")
# These need no compiler once their artifacts are there.
FILES = (
    "test_artifact.py",
    "test_bad_arrays.py",
    "test_bind.py",
    "test_call.py",
    "test_dlpack_arrays.py",
    "test_empty.py",
    "test_forged.py",
    "test_library.py",
    "test_loading.py",
    "test_output_pool.py",
    "test_packed.py",
    "test_packing.py",
    "test_pooled_processes.py",
    "test_rules.py",
    "test_self_test.py",
    "test_self_test_patterns.py",
    "test_threads.py",
)
TOYS = ("float16", "bfloat16", "float32", "float64")


def link_packages(names: Sequence[str], folder: Path, *, required: bool) -> None:
    """Put what is installed under these names into `folder`."""
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if required:
                raise
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(found.locate_file(top))))


@pytest.fixture(scope="module")
def bare(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of such an environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    link_packages(RUNTIME, site, required=True)
    with zipfile.ZipFile(wheel_file) as wheel:
        wheel.extractall(site)
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def artifacts(
    toy: Any,
    build_artifact: Callable[..., Path],
    name_of_build: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with what the tests load, under the names they look for."""
    folder = tmp_path_factory.mktemp("prebuilt")
    for dtype in TOYS:
        shutil.copytree(toy.artifact(dtype), folder / "toy" / dtype)
    for arguments in runpy.run_path(str(Path(__file__).with_name("test_threads.py")))[
        "SPECS"
    ].values():
        shutil.copytree(build_artifact(*arguments), folder / name_of_build(*arguments))
    return folder


def run(python: Path, arguments: Sequence[str], **environment: str) -> str:
    """What it prints, in an environment of its own; every symbol is looked up when it loads."""
    done = subprocess.run(
        [str(python), "-s", *arguments],
        env={"PATH": os.defpath, "HOME": str(python.parents[2]), "LD_BIND_NOW": "1", **environment},
        cwd=python.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_nothing_else(bare: Path) -> None:
    listed = run(
        bare,
        [
            "-c",
            "from importlib.metadata import distributions;"
            "print(*sorted(d.metadata['Name'].lower().replace('_', '-') for d in distributions()))",
        ],
    )
    assert listed.split() == sorted((*RUNTIME, "normgraph"))


def test_no_symbol_of_tvm_stays_open(artifacts: Path) -> None:
    libraries = list(artifacts.glob("*/kernels-*.so"))
    assert libraries
    for library in libraries:
        command = ["nm", "-D", "--undefined-only", str(library)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "TVMFFI" in listed
        assert "TVMBackend" not in listed
        assert "_ZN3tvm" not in listed


def test_the_runtime_s_tests_pass(
    bare: Path, artifacts: Path, repository: Path, tmp_path: Path
) -> None:
    harness = tmp_path / "harness"
    harness.mkdir()
    link_packages(HARNESS, harness, required=False)
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    options = ["-q", "-c", str(repository / "pyproject.toml"), "-p", "no:cacheprovider"]
    out = run(
        bare,
        ["-m", "pytest", *options, f"--basetemp={tmp_path / 'tests'}", *files],
        PYTHONPATH=str(harness),
        NORMGRAPH_TEST_ARTIFACTS=str(artifacts),
    )
    last = out.strip().splitlines()[-1]
    assert int(last.split(" passed")[0].split()[-1]) > 200, last
