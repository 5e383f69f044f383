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

from normgraph.compile.artifact import writing
from normgraph.errors import ArtifactCorrupt, ArtifactNotFound
from normgraph.runtime import load, operator
from normgraph.runtime.files import Folder
from normgraph.runtime.loading import load_library

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
    read = Folder.read

    def replace(self: Folder, name: str, most: int) -> Any:
        if name == "graph-stale.onnx":
            shutil.copy(toy.artifact("float32") / "manifest.json", path / "manifest.json")
        return read(self, name, most)

    monkeypatch.setattr(Folder, "read", replace)
    assert load(path).kinds


def test_an_artifact_that_is_as_incomplete_when_it_is_read_again(changed: Changed) -> None:
    with pytest.raises(ArtifactCorrupt, match=r"graph-stale\.onnx.*missing"):
        load(changed(name_a_stale_graph))


@pytest.mark.parametrize("damage", ["replaced", "removed", "truncated", "rewritten"])
def test_what_happens_to_the_files_between_the_check_and_the_loading(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What was checked is loaded: the old artifact, whole."""
    path = tmp_path / "unlucky"
    publish(path, toy.artifact("float32"))

    def strike(library: Any) -> Any:
        if damage == "replaced":
            publish(path, toy.artifact("float64"))
            assert not library.path.exists()
        elif damage == "removed":
            shutil.rmtree(path)
        else:
            content = b"" if damage == "truncated" else b"\0" * len(library.content)
            library.path.write_bytes(content)
        return load_library(library)

    monkeypatch.setattr(operator, "load_library", strike)
    op = load(path)
    assert op.dtype == "float32"
    inputs = toy.inputs("inference")
    assert (op.inference(*inputs) == toy.outputs("inference", inputs)["y"]).all()


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


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_self_test_whose_vectors_were_damaged(
    toy: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "damaged"
    publish(path, toy.artifact("float32"))
    op = load(path)
    (vectors,) = path.glob("selftest-*")
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content is None else content)
    with pytest.raises(ArtifactCorrupt, match=vectors.name):
        op.self_test()
