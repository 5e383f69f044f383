"""normgraph cache: what it shows, and what it removes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is on, in this folder."""
    monkeypatch.setenv("NORMGRAPH_CACHE", "on")
    monkeypatch.setenv("NORMGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_show_and_clear(cli: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    code, out, err = cli("cache", "--json")
    assert (code, err) == (0, "")
    empty = {"on": True, "folder": str(folder), "entries": 0, "bytes": 0}
    assert json.loads(out) == {**empty, "limit": 2**28, "removed": 0}
    assert not folder.exists()
    graphs = tmp_path / "graphs"
    export = ("export", "rms_norm", "--shape", "N,5", "--kinds", "inference", "-o", graphs)
    assert cli(*export).code == 0
    first = cli("compile", graphs, "-o", tmp_path / "a")
    assert (first.code, "compile cache" in first.err) == (0, False)
    second = cli("compile", graphs, "-o", tmp_path / "b")
    assert (second.code, "taken from the compile cache" in second.err) == (0, True)
    (entry,) = folder.glob("*.built")
    code, out, _ = cli("cache")
    assert code == 0
    assert str(folder) in out
    assert f"{entry.stat().st_size} " in out
    code, out, _ = cli("cache", "--clear")
    assert code == 0
    assert "removed 1 entries" in out
    assert not entry.exists()
    assert json.loads(cli("cache", "--json", "--clear").out)["removed"] == 0


def test_off(cli: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMGRAPH_CACHE", "off")
    code, out, _ = cli("cache", "--clear")
    assert code == 0
    assert "is off" in out
    assert json.loads(cli("cache", "--json").out)["on"] is False
    monkeypatch.setenv("NORMGRAPH_CACHE", "of")
    code, out, err = cli("cache")
    assert (code, out) == (2, "")
    assert "must be on or off" in err
