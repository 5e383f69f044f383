"""Fixtures for the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import normgraph as ng
from normgraph.__main__ import main
from normgraph.runtime.manifest import MANIFEST, manifest_digest


class Outcome(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def artifact(build_artifact: Callable[..., Path]) -> Path:
    """A small instance norm with all its kinds. Do not change it: copy it."""
    return build_artifact(ng.NormSpec("instance_norm"), ("N", 4, "L"))


@pytest.fixture
def rewrite_manifest() -> Callable[..., None]:
    """Change an artifact's manifest and give it a digest that fits, as a build would have."""

    def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        change(manifest)
        manifest["digest"] = manifest_digest(manifest)
        (path / MANIFEST).write_text(json.dumps(manifest))

    return rewrite
