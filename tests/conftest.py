"""Fixtures for every test: artifacts built once a session, golden files, the repository's root."""

from __future__ import annotations

import itertools
import os
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
        default=3.0,
        metavar="S",
        help="how long eight threads use one operator (3; 60 before a release)",
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
def build_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build an artifact for this host, once for each set of arguments: see `build` for them."""
    root = tmp_path_factory.mktemp("artifacts")
    built: dict[object, Path] = {}
    folders = itertools.count()  # a folder a try, so that one that failed is not met again

    def build(
        spec: ng.NormSpec,
        shape: Shape,
        dtype: str = "float32",
        kinds: Sequence[str] | None = None,
    ) -> Path:
        key = (spec, tuple(shape), dtype, None if kinds is None else tuple(kinds))
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
