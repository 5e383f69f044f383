"""Fixtures for every test: artifacts built once a session, golden files, the repository's root.

With the environment variable NORMGRAPH_TEST_ARTIFACTS, artifacts are in that folder beforehand, and
nothing is compiled.
"""

from __future__ import annotations

import hashlib
import itertools
import os
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
def wheel_file(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    script = repository / "scripts" / "build-wheel"
    subprocess.run([script, sys.executable, out], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
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
    tmp_path_factory: pytest.TempPathFactory,
    prebuilt: Path | None,
    name_of_build: Callable[..., str],
) -> Callable[..., Path]:
    """Build an artifact for this host, once for each set of arguments: see `build` for them."""
    root = tmp_path_factory.mktemp("artifacts")
    built: dict[str, Path] = {}
    folders = itertools.count()  # a folder a try, so that one that failed is not met again

    def build(
        spec: ng.NormSpec,
        shape: Shape,
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> Path:
        key = name_of_build(spec, shape, dtype, kinds)
        if prebuilt is not None:
            return prebuilt / key
        if key not in built:
            folder = root / str(next(folders))
            ng.graphs.export(
                spec, shape=tuple(shape), dtype=dtype, out=folder / "graphs", kinds=kinds
            )
            built[key] = ng.compile.build(folder / "graphs", target="cpu", out=folder / "artifact")
        return built[key]

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
