"""`normgraph.build`: export, compile and load in one call."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import CompileError

SPEC = ng.NormSpec("rms_norm")


def test_one_call_exports_compiles_and_loads(tmp_path: Path) -> None:
    op = ng.build(SPEC, shape=("N", 5), kinds=("inference",), out=tmp_path / "a")
    assert op.kinds == ("inference",)
    assert (tmp_path / "a" / "manifest.json").is_file()


def test_without_out_the_artifact_goes_with_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    op = ng.build(SPEC, shape=("N", 5), kinds=("inference",))
    x = np.ones((2, 5), np.float32)
    np.testing.assert_allclose(op.inference(x, np.ones(5, np.float32)), 1, atol=1e-4)
    assert len(os.listdir(tmp_path)) == 1
    del op
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(CompileError):
        ng.build(SPEC, shape=("N", 5))
    assert os.listdir(tmp_path) == []
