"""Self-tests of large tensors: inputs stored as a repeated pattern, answers as samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normgraph.errors import AccuracyError, ArtifactCorrupt
from normgraph.runtime import load
from normgraph.runtime.manifest import manifest_digest

Changed = Callable[..., Path]
SHAPE = (2, 3, 50)
AT = np.array([0, 7, 150, 299])


@pytest.fixture
def sampled(changed: Changed, toy: Any) -> Callable[..., Path]:
    """sampled(at, answers, shape): an artifact that tests inference by a pattern and samples."""

    def make(at: Any = AT, answers: Callable[[Any], Any] = lambda y: y, shape: Any = SHAPE) -> Path:
        source = toy.artifact("float32")
        (old,) = source.glob("selftest-*.npz")
        with np.load(old) as file:
            vectors = dict(file)
        pattern = np.arange(11, dtype=np.float32)
        names = ("x", "gamma", "beta", "running_mean", "running_var")
        inputs = [vectors[f"inference.0.in.{name}"] for name in names]
        inputs[0] = np.resize(pattern, SHAPE)
        y = toy.outputs("inference", inputs)["y"]
        vectors["inference.0.in.x"] = pattern
        vectors["inference.0.out.y"] = answers(np.ravel(y)[AT])
        vectors["inference.0.at.y"] = at

        def edit(manifest: Any) -> None:
            for case in manifest["self_test"]["cases"]:
                if case["kind"] == "inference":
                    case["shapes"] = {"x": list(shape) if isinstance(shape, tuple) else shape}

        path = changed(edit)
        np.savez(path / old.name, **vectors)
        content = (path / old.name).read_bytes()
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        return _with_self_test(path, entry)

    return make


def _with_self_test(path: Path, entry: dict[str, Any]) -> Path:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["self_test"].update(entry)
    manifest["digest"] = manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_pattern_is_repeated_and_samples_compared(sampled: Callable[..., Path]) -> None:
    results = load(sampled()).self_test()
    assert [r.output for r in results if r.kind == "inference"] == ["y"]


def test_a_wrong_sample_is_found(sampled: Callable[..., Path]) -> None:
    def last_is_wrong(y: Any) -> Any:
        return y + np.array([0, 0, 0, 1])

    with pytest.raises(AccuracyError, match="inference gives a wrong y"):
        load(sampled(answers=last_is_wrong))


@pytest.mark.parametrize("at", [np.array([0, 7, 150, 300]), np.array([0, 7]), np.array([0.5])])
def test_samples_that_are_not_there(at: Any, sampled: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactCorrupt, match="cannot be read or run"):
        load(sampled(at=at))


@pytest.mark.parametrize("shape", [(2, -3, 50), (2, 3.0, 50), "2,3,50", (2, True, 50)])
def test_a_shape_that_is_none(shape: Any, sampled: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactCorrupt, match="shape"):
        load(sampled(shape=shape))
