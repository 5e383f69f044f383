"""Artifacts that are missing, damaged, too new, or for another machine: refused before loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph import cpu
from normgraph.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactIncompatible,
    ArtifactNotFound,
)
from normgraph.runtime import host, load, operator
from normgraph.runtime.manifest import manifest_digest

Changed = Callable[..., Path]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a library is about to be loaded."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(operator, "load_library", refuse)


def test_paths(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy.artifact("float32")
    monkeypatch.chdir(path.parent)
    for spelling in (path, str(path), Path(path.name), path.name, f"./{path.name}/"):
        assert load(spelling).kinds
    link = tmp_path / "link"
    link.symlink_to(path)
    assert load(link).kinds


@pytest.mark.usefixtures("no_loading")
def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactNotFound, match=r"no manifest.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactCorrupt, match="expected a packed artifact"):
        load(tmp_path / "file")


def _truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _cut_a_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n\0")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("damage", [_truncate, _cut_a_byte, _flip, _append, _empty, Path.unlink])
@pytest.mark.parametrize("pattern", ["manifest.json", "graph-*", "kernels-*", "selftest-*"])
def test_damaged_files(changed: Changed, pattern: str, damage: Callable[[Path], None]) -> None:
    path = changed()
    (file,) = path.glob(pattern)
    damage(file)
    error = ArtifactNotFound if not file.exists() and "man" in pattern else ArtifactCorrupt
    with pytest.raises(error) as caught:
        load(path)
    assert file.name in str(caught.value)
    assert caught.value.exit_code == 3


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        if to is None:
            del manifest[keys[-1]]
        else:
            manifest[keys[-1]] = to

    return edit


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (_set("format", to="zip"), ArtifactCorrupt, "format 'normgraph-artifact'"),
        (_set("format_version", to=2), ArtifactIncompatible, "version 2.*newer normgraph"),
        (_set("format_version", to=0), ArtifactCorrupt, "does not exist"),
        (_set("format_version", to="1"), ArtifactCorrupt, "'format_version' to be of type int"),
        (_set("kinds", to=None), ArtifactCorrupt, "'kinds'.*nothing"),
        (_set("kinds", to={}), ArtifactCorrupt, "holds no kinds"),
        (_set("kinds", "forward", to=[]), ArtifactCorrupt, "expected an object"),
        (_set("kinds", "forward", "function", to=None), ArtifactCorrupt, "'function'"),
        (_set("kinds", "forward", "inputs", 0, "dtype", to="int8"), ArtifactCorrupt, "'int8'"),
        (_set("kinds", "forward", "inputs", 0, "shape", to=[1.5]), ArtifactCorrupt, "no shape"),
        (_set("kinds", "forward", "outputs", to="y"), ArtifactCorrupt, "'outputs'"),
        (_set("kinds", "forward", "outputs", to=[]), ArtifactCorrupt, "gives nothing"),
        (_set("kinds", "forward", "inputs", 0, "name", to="1x"), ArtifactCorrupt, "not names"),
        (_set("kinds", "forward", "outputs", 0, "name", to="mean"), ArtifactCorrupt, "not names"),
        (
            _set("kinds", "forward", "outputs", 0, "shape", to=["M"]),
            ArtifactCorrupt,
            "no input of forward tells the extent M",
        ),
        (_set("kinds", "forward", "graph", "size", to=3), ArtifactCorrupt, "expected 3 bytes"),
        (_set("kinds", "forward", "graph", "file", to="../x"), ArtifactCorrupt, "plain file name"),
        (_set("kinds", "forward", "graph", "file", to="/x"), ArtifactCorrupt, "plain file name"),
        (_set("libraries", to=[]), ArtifactIncompatible, "it has none"),
        (_set("libraries", 0, "sha256", to="00"), ArtifactCorrupt, "sha256 differs"),
        (_set("libraries", 0, "target", to="cpu"), ArtifactCorrupt, "'target'"),
        (_set("libraries", 0, "target", "kind", to="metal"), ArtifactIncompatible, "metal devices"),
        (
            _set("libraries", 0, "target", "features", to=["amx-magic"]),
            ArtifactIncompatible,
            "CPU features amx-magic",
        ),
        (
            _set("libraries", 0, "target", "triple", to="riscv64-linux-gnu"),
            ArtifactIncompatible,
            "it is for riscv64",
        ),
        (
            _set("libraries", 0, "target", "triple", to=f"{cpu.machine()}-windows-msvc"),
            ArtifactIncompatible,
            "runs Linux",
        ),
        (_set("spec", "op", to="power_norm"), ArtifactIncompatible, "does not know the artifact's"),
        (_set("spec", "trend", to=1), ArtifactIncompatible, "unknown trend"),
        (_set("dtype", to=3), ArtifactCorrupt, "'dtype'"),
        (_set("requires", to=None), ArtifactCorrupt, "'requires'.*nothing"),
        (_set("requires", "tvm_ffi", to="0.1"), ArtifactCorrupt, "'tvm_ffi'"),
        (_set("requires", "tvm_ffi", "from", to="new"), ArtifactCorrupt, "'new'.*no version"),
        (_set("requires", "tvm_ffi", "from", to="1" * 500), ArtifactCorrupt, "no version"),
        (
            _set("requires", "tvm_ffi", "from", to="0.9"),
            ArtifactIncompatible,
            r"apache-tvm-ffi >=0\.9,<0\.2, and 0.* is installed.*pip install",
        ),
        (_set("libraries", 0, "target", "features", to=[1]), ArtifactCorrupt, "hold names"),
        (_set("kinds", "forward", "graph", "file", to="a\0b"), ArtifactCorrupt, "be printed"),
        (_set("kinds", "forward", "graph", "file", to="\ud800"), ArtifactCorrupt, "be printed"),
        (_set("kinds", "forward", "graph", "file", to="x" * 999), ArtifactCorrupt, "plain file n"),
        (_set("kinds", "forward", "graph", "size", to=-1), ArtifactCorrupt, "-1 bytes"),
        (_set("self_test", "status", to=None), ArtifactCorrupt, "'status'"),
        (_set("self_test", "cases", 0, "prefix", to=None), ArtifactCorrupt, "'prefix'"),
        (_set("self_test", "cases", 0, "tolerance", "y", to="x"), ArtifactCorrupt, "tolerance of"),
    ],
)
def test_manifest_fields(
    changed: Changed, edit: Any, error: type[ArtifactError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(changed(edit))


@pytest.mark.usefixtures("no_loading")
def test_a_manifest_that_was_edited_by_hand(changed: Changed) -> None:
    path = changed()
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"by_hand"', '"by_mouth"'))
    with pytest.raises(ArtifactCorrupt, match="its own digest"):
        load(path)
    file.write_text(json.dumps(json.loads(file.read_text())["kinds"]))
    with pytest.raises(ArtifactCorrupt, match="it is none"):
        load(path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactCorrupt, match="expected JSON"):
        load(path)


def test_a_missing_function(changed: Changed) -> None:
    edit = _set("kinds", "forward", "function", to="onward")
    with pytest.raises(ArtifactCorrupt, match="function 'onward' for forward"):
        load(changed(edit))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["manifest.json", "graph-", "kernels-", "selftest-"])
def test_what_is_no_plain_file(changed: Changed, name: str) -> None:
    """A pipe must not be waited for, nor a folder or a device be read."""
    path = changed()
    (file,) = path.glob(f"{name}*")
    for make in (os.mkfifo, os.mkdir, lambda place: os.symlink("/dev/zero", place)):
        file.unlink(missing_ok=True) if not file.is_dir() else file.rmdir()
        make(file)
        with pytest.raises(ArtifactCorrupt, match="expected a plain file"):
            load(path)


@pytest.mark.usefixtures("no_loading")
def test_a_huge_manifest_is_not_read(changed: Changed) -> None:
    path = changed()
    os.truncate(path / "manifest.json", 2**40)
    with pytest.raises(ArtifactCorrupt, match="at most 1048576 bytes, but the file has 1099511"):
        load(path)


def test_files_behind_links(changed: Changed) -> None:
    """As container volumes have them."""
    path = changed()
    for file in list(path.iterdir()):
        (path / "..data").mkdir(exist_ok=True)
        file.rename(path / "..data" / file.name)
        file.symlink_to(Path("..data", file.name))
    assert load(path).kinds


@pytest.mark.usefixtures("no_loading")
def test_a_path_no_file_can_have(tmp_path: Path) -> None:
    for path in ("a\0b", str(tmp_path / "\ud800")):
        with pytest.raises(ArtifactNotFound):
            load(path)


@pytest.mark.parametrize(
    ("installed", "runs"),
    [
        ("0.1.15", True),
        ("0.1.15.post2", True),
        ("0.1.16rc1", True),
        ("0.1.99", True),
        ("0.1.14", False),
        ("0.1", False),
        ("0.2", False),
        ("0.2.0.dev3", False),
        ("1.0", False),
        ("unknown", False),
    ],
)
def test_versions_of_the_loader(installed: str, runs: bool) -> None:
    found = host.loader_obstacle(((0, 1, 15), (0, 2)), installed)
    assert found is None if runs else f"and {installed} is installed" in str(found)


@pytest.mark.usefixtures("no_loading")
def test_a_manifest_nested_too_deeply(changed: Changed) -> None:
    path = changed()
    (path / "manifest.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ArtifactCorrupt, match="expected JSON"):
        load(path)


@pytest.mark.usefixtures("no_loading")
def test_a_kind_with_the_function_of_another(changed: Changed) -> None:
    with pytest.raises(ArtifactCorrupt, match="forward names the function of another kind"):
        load(changed(_set("kinds", "forward", "function", to="inference")))


@pytest.mark.usefixtures("no_loading")
def test_an_object_file_is_no_library(changed: Changed) -> None:
    path = changed()
    (library,) = path.glob("kernels-*")
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["libraries"][0]["file"] = library.rename(library.with_suffix(".o")).name
    manifest["digest"] = manifest_digest(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactIncompatible, match="object file"):
        load(path)


def test_the_library_with_most_features_is_chosen(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        plain = manifest["libraries"][0]
        one = plain["target"]["features"]
        two = [*one, {"x86_64": "sse3", "aarch64": "fp-armv8"}[cpu.machine()]]
        for name, features in (("more", two), ("most", [*two, "magic"])):
            target = {**plain["target"], "name": name, "features": features}
            manifest["libraries"].append({**plain, "target": target})

    assert "for more:" in repr(load(changed(edit)))


@pytest.mark.parametrize(
    ("features", "flags", "missing"),
    [
        (["avx2", "sse4.1", "lzcnt", "bmi", "+fma"], "avx2 sse4_1 abm bmi1 fma", None),
        (["avx512vnni", "avx512bw", "cx16"], "avx512_vnni avx512bw cx16", None),
        (["avx512f", "avx2"], "avx2 fma", "avx512f"),
        (["neon", "dotprod", "lse"], "fp asimd asimddp atomics", None),
        (["sve"], "fp asimd", "sve"),
    ],
)
def test_cpu_features(
    monkeypatch: pytest.MonkeyPatch, features: list[str], flags: str, missing: str | None
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset(flags.split()))
    found = host.obstacle("llvm", f"{cpu.machine()}-unknown-linux-gnu", features)
    assert found is None if missing is None else missing in str(found)


_BARE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tvm", "onnx", "onnxruntime", "torch", "ml_dtypes", "jax"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import numpy as np
import normgraph as ng

op = ng.load(sys.argv[1])
x = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
one = np.ones(3, np.float32)
for _ in range(3):
    y = op.inference(x, one, one, one, one)
assert (y == x + 2).all()
assert op.inference(x[:0], one, one, one, one).shape == (0, 3, 5)
try:
    op.inference(x[:, :2], one, one, one, one)
except ng.NormGraphError:
    pass
else:
    raise SystemExit("the wrong shape passed")
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"tvm", "onnx", "torch", "ml_dtypes"}, loaded
assert "normgraph.graphs" not in sys.modules and "normgraph.compile" not in sys.modules
print("fine")
"""


def test_numpy_and_tvm_ffi_are_enough(toy: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BARE, str(toy.artifact("float32"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


def test_the_manifest_is_left_as_it_was(toy: Any) -> None:
    op = toy.operator("float32")
    again = json.loads((toy.artifact("float32") / "manifest.json").read_text())
    assert op.manifest == again
