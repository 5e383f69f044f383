"""The self-test in an artifact: when it runs, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph.errors import AccuracyError, ArtifactCorrupt
from normgraph.runtime import load

Changed = Callable[..., Path]


def test_self_test_runs_on_load_where_the_build_did_not(
    changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(manifest: Any) -> None:
        manifest["self_test"]["cases"][2]["tolerance"]["dgamma"] = -1.0

    path = changed(edit)
    with pytest.raises(AccuracyError, match="backward gives a wrong dgamma on this host"):
        load(path)
    file = path / "manifest.json"
    assert '"not run"' in file.read_text()


def test_self_test_is_not_repeated(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        manifest["self_test"]["status"] = "passed"
        manifest["self_test"]["cases"][2]["tolerance"]["dgamma"] = -1.0

    op = load(changed(edit))
    with pytest.raises(AccuracyError, match="wrong dgamma"):
        op.self_test()


def test_self_test_report(toy: Any) -> None:
    results = toy.operator("float32").self_test()
    assert {(item.kind, item.output) for item in results} >= {("backward", "dx"), ("forward", "y")}
    assert all(item.error <= item.tolerance for item in results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_self_test_of_other_dtypes(toy: Any, dtype: str) -> None:
    assert toy.operator(dtype).self_test()


def test_self_test_without_its_vectors(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        manifest["self_test"]["cases"][0]["prefix"] = "elsewhere.0"

    with pytest.raises(ArtifactCorrupt, match=r"cannot be read or run.*elsewhere"):
        load(changed(edit))
