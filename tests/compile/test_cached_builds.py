"""Builds with the compile cache: the same bytes as without, and a key that misses nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.target import codegen

import normgraph as ng
from normgraph.compile import build, cache_key, graph_files, pipeline, resolve_all
from normgraph.errors import ArgumentError, CompileError
from normgraph.graphs import export

SPEC = ng.NormSpec("rms_norm")


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """One small graph."""
    export(SPEC, shape=("N", 5), out=tmp_path / "graphs", kinds=("inference",))
    return tmp_path / "graphs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is on, in this folder."""
    monkeypatch.setenv("NORMGRAPH_CACHE", "on")
    monkeypatch.setenv("NORMGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def test_the_tests_have_no_cache(graphs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """But for those that ask for one."""
    monkeypatch.setenv("NORMGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    build(graphs, out=tmp_path / "a")
    assert not (tmp_path / "cache").exists()


def test_the_second_build_compiles_nothing_and_is_the_same(
    graphs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    build(graphs, out=tmp_path / "a")
    (entry,) = folder.glob("*.built")
    monkeypatch.setattr(pipeline, "schedule", None)
    build(graphs, out=tmp_path / "b", progress=said.append)
    assert said == [f"taken from the compile cache in {folder}", f"wrote {tmp_path / 'b'}"]
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    op = ng.load(tmp_path / "b")
    x = np.array([[3, -4, 0, 0, 0]], np.float32)
    got = op.inference(x, np.ones(5, np.float32))
    np.testing.assert_allclose(got, x / np.sqrt(5 + 1e-5), rtol=1e-6)
    monkeypatch.undo()
    monkeypatch.setenv("NORMGRAPH_CACHE", "off")
    build(graphs, out=tmp_path / "c")
    assert snapshot(tmp_path / "c") == snapshot(tmp_path / "a")
    assert list(folder.glob("*.built")) == [entry]


def test_a_damaged_entry_is_built_anew(graphs: Path, folder: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a")
    (entry,) = folder.glob("*.built")
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    said: list[str] = []
    build(graphs, out=tmp_path / "b", progress=said.append)
    assert "is damaged" in said[0]
    assert "generate code for cpu and link" in said
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "a")
    assert entry.read_bytes() != content


def test_a_dump_is_of_a_build(graphs: Path, folder: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a")
    build(graphs, out=tmp_path / "b", debug_dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "all.7-generate.ll").exists()


def test_a_build_that_is_to_be_one(graphs: Path, folder: Path, tmp_path: Path) -> None:
    build(graphs, out=tmp_path / "a", cache=False)
    assert not folder.exists()


def test_a_build_that_fails_is_not_kept(
    graphs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("normgraph.compile.self_test.run", failing)
        with pytest.raises(CompileError, match="gives a wrong y"):
            build(graphs, out=tmp_path / "a")
    assert not list(folder.glob("*.built"))
    build(graphs, out=tmp_path / "a")
    assert len(list(folder.glob("*.built"))) == 1


def failing(*_: Any) -> None:
    raise CompileError("gives a wrong y")


def test_without_a_place_for_it(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMGRAPH_CACHE", "on")
    monkeypatch.setenv("NORMGRAPH_CACHE_DIR", "/dev/null/none")
    assert ng.load(build(graphs, out=tmp_path / "a")).spec == SPEC.resolve("float32")
    monkeypatch.setenv("NORMGRAPH_CACHE", "maybe")
    with pytest.raises(ArgumentError, match="must be on or off"):
        build(graphs, out=tmp_path / "a")


# The key.


@pytest.fixture
def key(graphs: Path) -> Callable[..., str]:
    """key(target, self_test): of the graphs as they are."""

    def get(target: str = "cpu", self_test: bool = True) -> str:
        found = cache_key.build_key(graph_files.read(graphs), resolve_all(target), self_test)
        assert found is not None
        return found

    return get


def test_the_key_is_the_same_for_the_same(key: Callable[..., str]) -> None:
    assert key() == key()
    assert len(key()) == 64


def test_the_key_of_other_graphs_and_targets(key: Callable[..., str], graphs: Path) -> None:
    keys = {
        key(),
        key(self_test=False),
        key("x86-64-v2"),
        key("x86-64-v3"),
        key("x86-64-levels"),
        key("aarch64"),
    }
    for spec, shape in ((SPEC, ("N", 6)), (dataclasses.replace(SPEC, eps=0.5), ("N", 5))):
        export(spec, shape=shape, out=graphs, kinds=("inference",))
        keys.add(key())
    export(SPEC, shape=("N", 5), out=graphs, kinds=("inference", "forward"))
    keys.add(key())
    assert len(keys) == 9


def change(monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path) -> None:
    """Another version of something, as far as the key can see."""
    if what == "TVM's settings":
        monkeypatch.setenv("TVM_LOG_DEBUG", "1")
    elif what == "the linker's folders":
        monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    elif what == "the compiler":
        tool = tmp_path / "cc"
        tool.write_text('#!/bin/sh\nexec cc -pipe "$@"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("CC", str(tool))
    elif what == "LLVM":
        monkeypatch.setattr(codegen, "llvm_version_major", lambda: 99)
    elif what == "the version of normgraph":
        monkeypatch.setattr(ng, "__version__", "99")
    else:
        original = importlib.metadata.version
        other = {"a package": "onnx", "tvm": "apache-tvm"}[what]
        monkeypatch.setattr(
            cache_key, "version", lambda name: "99" if name == other else original(name)
        )


@pytest.mark.parametrize(
    "what",
    [
        "TVM's settings",
        "the linker's folders",
        "the compiler",
        "LLVM",
        "the version of normgraph",
        "a package",
        "tvm",
    ],
)
def test_the_key_with_other_tools(
    key: Callable[..., str], monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path
) -> None:
    before = key()
    change(monkeypatch, what, tmp_path)
    assert key() != before


@pytest.mark.parametrize("file", ["slice_rule.py", "thread_pool.c", "reference.py", "spec.py"])
def test_a_changed_source_changes_the_digest(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same version of normgraph."""
    copies = []
    for package in (ng, ng.graphs, ng.compile):
        folder = Path(str(package.__file__)).parent
        copies.append(tmp_path / folder.name)
        shutil.copytree(folder, copies[-1], ignore=shutil.ignore_patterns("__pycache__"))
    before = cache_key.sources_digest()
    monkeypatch.setattr(cache_key, "_source_folders", lambda: tuple(copies))
    assert cache_key.sources_digest() == before
    (source,) = (copy / file for copy in copies if (copy / file).exists())
    content = source.read_bytes()
    source.write_bytes(content + b"\n")
    assert cache_key.sources_digest() != before
    source.write_bytes(content)
    (copies[-1] / "another.py").touch()
    assert cache_key.sources_digest() != before


def test_sources_that_changed_since_they_were_imported(
    graphs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is not what is in the files, so nothing is taken or kept."""
    monkeypatch.setattr(cache_key, "sources_digest", lambda: "edited")
    for name in ("a", "b"):
        said: list[str] = []
        build(graphs, out=tmp_path / name, progress=said.append)
        assert "generate code for cpu and link" in said
    assert not folder.exists()


def test_a_compiler_that_does_not_say_what_it_is(
    graphs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "cc"
    tool.write_text('#!/bin/sh\ncase "$1" in --version) exit 1 ;; esac\nexec cc "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CC", str(tool))
    build(graphs, out=tmp_path / "a")
    assert not folder.exists()
