"""Fixtures for every test: artifacts built once a session, golden files, the repository's root.

With the environment variable NORMGRAPH_TEST_ARTIFACTS, artifacts are in that folder beforehand, and
nothing is compiled.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import normgraph as ng

if TYPE_CHECKING:
    from normgraph.runtime import Operator

Shape = Sequence[int | str]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--update-golden: write the golden files instead of comparing with them.

    --every-level: test every operator in every dtype at each target level.
    --stress-seconds: how long eight threads use one operator.
    """
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files anew, then look at them",
    )
    parser.addoption(
        "--every-level",
        action="store_true",
        help="test every operator in every dtype at each target level, in minutes",
    )
    parser.addoption(
        "--stress-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="how long eight threads use one operator (60)",
    )


@pytest.fixture(scope="session")
def stress_seconds(request: pytest.FixtureRequest) -> float:
    """How long eight threads use one operator."""
    return float(request.config.getoption("--stress-seconds"))


def pytest_configure() -> None:
    """No test, nor what it starts, may be given what was compiled before."""
    os.environ["NORMGRAPH_CACHE"] = "off"


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to write golden files instead of comparing."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def repository(request: pytest.FixtureRequest) -> Path:
    """The root of the checkout the tests run from."""
    return request.config.rootpath


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_once(name, make): the folder `name`, which make(folder) fills, once a session.

    Of several workers one does, and the others wait for it. Nobody may change what it holds.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root /= "made"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def wheel_file(repository: Path, make_once: Callable[..., Path]) -> Path:
    """The wheel of this checkout."""
    script = repository / "scripts" / "build-wheel"

    def make(folder: Path) -> None:
        subprocess.run([script, sys.executable, folder], check=True, capture_output=True)

    (path,) = make_once("wheel", make).glob("*.whl")
    return path


@pytest.fixture(scope="session")
def prebuilt() -> Path | None:
    """The folder of NORMGRAPH_TEST_ARTIFACTS."""
    folder = os.environ.get("NORMGRAPH_TEST_ARTIFACTS")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def name_of_build() -> Callable[..., str]:
    """What an artifact with these arguments of `build_artifact` is called among prebuilt ones."""

    def name(
        spec: ng.NormSpec,
        shape: Shape,
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> str:
        key = (spec, tuple(shape), dtype, None if kinds is None else tuple(kinds))
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    return name


@pytest.fixture(scope="session")
def build_artifact(
    prebuilt: Path | None,
    name_of_build: Callable[..., str],
    make_once: Callable[..., Path],
) -> Callable[..., Path]:
    """Build an artifact for this host, once for each set of arguments: see `build` for them."""

    def build(
        spec: ng.NormSpec,
        shape: Shape,
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> Path:
        key = name_of_build(spec, shape, dtype, kinds)
        if prebuilt is not None:
            return prebuilt / key

        def make(folder: Path) -> None:
            ng.graphs.export(
                spec, shape=tuple(shape), dtype=dtype, out=folder / "graphs", kinds=kinds
            )
            ng.compile.build(folder / "graphs", target="cpu", out=folder / "artifact")

        return make_once(key, make) / "artifact"

    return build


@pytest.fixture(scope="session")
def build_operator(build_artifact: Callable[..., Path]) -> Callable[..., Operator]:
    """Build and load an operator, once for each set of arguments: see `build` for them."""
    loaded: dict[Path, Operator] = {}

    def build(
        spec: ng.NormSpec,
        shape: Shape,
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> Operator:
        path = build_artifact(spec, shape, dtype, kinds)
        if path not in loaded:
            loaded[path] = ng.load(path)
        return loaded[path]

    return build
