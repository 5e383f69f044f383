"""Artifacts that another build replaces while they are opened, loaded or used."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from normgraph.compile.artifact import writing
from normgraph.errors import ArtifactNotFound
from normgraph.runtime import artifact, load

Changed = Callable[..., Path]


def publish(path: Path, source: Path) -> None:
    """Replace the artifact at `path` by the one at `source`, as a build does."""
    manifest = json.loads((source / "manifest.json").read_text())
    with writing(path) as writer:

        def add(stem: str, entry: dict[str, Any]) -> None:
            file = source / entry["file"]
            entry |= writer.add(stem, file.suffix, file.read_bytes())

        for kind, entry in manifest["kinds"].items():
            add(f"graph-{kind}", entry["graph"])
        add("kernels-cpu", manifest["libraries"][0])
        add("selftest", manifest["self_test"])
        del manifest["digest"]
        writer.commit(manifest)


def name_a_stale_graph(manifest: dict[str, Any]) -> None:
    manifest["kinds"]["forward"]["graph"]["file"] = "graph-stale.onnx"


def test_a_build_that_replaces_the_artifact_while_it_is_opened(
    changed: Changed, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old manifest was read, then it and its files were replaced: the new one is opened."""
    path = changed(name_a_stale_graph)

    def replace(file: Any, *rest: Any) -> Any:
        if Path(file).name == "graph-stale.onnx":
            shutil.copy(toy.artifact("float32") / "manifest.json", path / "manifest.json")
        return open(file, *rest)

    monkeypatch.setattr(artifact, "open", replace, raising=False)
    assert load(path).kinds


def test_a_build_that_replaces_the_library_before_it_is_loaded(
    changed: Changed, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed()
    publish(path, toy.artifact("float32"))
    load_module = tvm_ffi.load_module

    def replaced(library: Path) -> Any:
        if library.parent == path and library.exists() and not done:
            done.append(library)
            publish(path, toy.artifact("float64"))
        return load_module(library)

    done: list[Path] = []
    monkeypatch.setattr(tvm_ffi, "load_module", replaced)
    assert load(path).dtype == "float64"
    assert not done[0].exists()


def test_loading_while_builds_replace_the_artifact(toy: Any, tmp_path: Path) -> None:
    sources = [toy.artifact("float32"), toy.artifact("float64")]
    path = tmp_path / "busy"
    publish(path, sources[0])
    stop = threading.Event()
    published: list[Path] = []

    def build() -> None:
        while not stop.is_set():
            published.append(sources[len(published) % 2])
            publish(path, published[-1])

    builder = threading.Thread(target=build)
    builder.start()
    try:
        end = time.monotonic() + 1.5
        seen = [load(path).dtype]
        while time.monotonic() < end:
            seen.append(load(path).dtype)
    finally:
        stop.set()
        builder.join()
    assert set(seen) == {"float32", "float64"}
    assert len(published) > 4


def test_a_self_test_after_the_artifact_was_replaced(toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "replaced"
    publish(path, toy.artifact("float32"))
    op = load(path)
    assert op.self_test()
    publish(path, toy.artifact("float64"))
    with pytest.raises(ArtifactNotFound, match=r"replaced or removed.*Load it again"):
        op.self_test()
