"""Rows of docs/reliability.md: artifacts that are damaged, foreign, replaced or not finished."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ArtifactCorrupt, ArtifactIncompatible, NormGraphError, ToolMissing
from normgraph.runtime import host, pack
from normgraph.runtime.manifest import MANIFEST, manifest_digest

Row = Callable[[object], None]


@pytest.fixture
def copies(norm_artifact: Path, tmp_path: Path) -> Callable[[], Path]:
    """A fresh copy of the artifact at each call, at the same path."""

    def copy() -> Path:
        path = tmp_path / "artifact"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(norm_artifact, path)
        return path

    return copy


def refused(path: Path) -> NormGraphError:
    with pytest.raises(ArtifactCorrupt) as caught:
        ng.load(path)
    return caught.value


def damaged(copies: Callable[[], Path], change: Callable[[bytes], bytes]) -> NormGraphError:
    """The library's error, after every other file was refused too."""
    names = sorted(file.name for file in copies().iterdir() if file.stat().st_size)
    errors = {}
    for name in names:
        path = copies()
        (path / name).write_bytes(change((path / name).read_bytes()))
        errors[name] = refused(path)
    assert len(errors) == 5
    return next(error for name, error in errors.items() if name.endswith(".so"))


def test_half_a_file(copies: Any, row: Row) -> None:
    """a file cut to half"""
    row(damaged(copies, lambda content: content[: len(content) // 2]))


def test_nine_tenths_of_a_file(copies: Any, row: Row) -> None:
    """a file cut by a tenth"""
    row(damaged(copies, lambda content: content[: len(content) * 9 // 10]))


def test_garbage_behind(copies: Any, row: Row) -> None:
    """256 bytes appended to a file"""
    row(damaged(copies, lambda content: content + bytes(range(256))))


def test_flipped_bits(copies: Any, row: Row) -> None:
    """a bit flipped somewhere, 200 times"""
    random = np.random.default_rng(0)
    path = copies()
    files = sorted(file for file in path.iterdir() if file.stat().st_size)
    for turn in range(200):
        file = files[turn % len(files)]
        content = bytearray(file.read_bytes())
        content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
        good = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises((ArtifactCorrupt, ArtifactIncompatible)):
            ng.load(path)
        file.write_bytes(good)
    assert ng.load(path).kinds
    row("of 200: 200 refused")


def test_other_cpu(copies: Any, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """a library for a CPU with more instructions than this one"""
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"lm", "fpu"}))
    with pytest.raises(ArtifactIncompatible) as caught:
        ng.load(copies())
    assert "lacks" in str(caught.value)
    row(f"`{caught.typename}`, which names the instructions that are missing")


def test_other_machine(copies: Any, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """a library for another machine (aarch64 on x86-64)"""
    monkeypatch.setattr(host, "machine", lambda: "riscv64")
    with pytest.raises(ArtifactIncompatible, match=r"it is for .*this host is riscv64") as caught:
        ng.load(copies())
    row(f"`{caught.typename}`, which names both machines")


def test_overwritten_in_use(run_python: Callable[..., str], copies: Any, row: Row) -> None:
    """another file copied over the one in use"""
    said = run_python(
        """
from pathlib import Path
op = ng.load(sys.argv[2])
x = data(8, 1000)
for file in Path(sys.argv[2]).iterdir():
    file.write_bytes(b"something else")
print("right" if right(op, x) else "wrong")
""",
        str(copies()),
    )
    row(said.strip())


def test_replaced_in_use(
    build_artifact: Callable[..., Path], norm: Any, norm_of: Any, copies: Any, row: Row
) -> None:
    """another file in the place of one in use, loaded from there"""
    path = copies()
    old = norm_of(ng.load(path))
    other = build_artifact(
        ng.NormSpec("instance_norm", eps=3.0), ("N", 8, "L"), kinds=("forward", "backward")
    )
    shutil.rmtree(path)
    shutil.copytree(other, path)
    new = ng.load(path)
    x = norm.x()
    old.check(x)
    inv_std = new.forward(x, norm.gamma, norm.beta).inv_std
    answer = 1 / np.sqrt(x.astype(np.float64).var(2, keepdims=True) + 3)
    np.testing.assert_allclose(inv_std, answer, rtol=1e-5)
    row("right")


def test_replaced_while_loading(
    build_artifact: Callable[..., Path], norm: Any, copies: Any, row: Row
) -> None:
    """a file that is replaced again and again while it is loaded"""
    path = copies()
    kinds = ("forward", "backward")
    other = build_artifact(ng.NormSpec("instance_norm", eps=3.0), ("N", 8, "L"), kinds=kinds)
    manifests = [(folder / "manifest.json").read_bytes() for folder in (path, other)]
    shutil.copytree(other, path, dirs_exist_ok=True)
    x = norm.x().astype(np.float64)
    answers = {eps: 1 / np.sqrt(x.var(2, keepdims=True) + eps) for eps in (1e-5, 3.0)}
    stop = threading.Event()

    def replace() -> None:
        turn = 0
        while not stop.is_set():
            (path / ".next").write_bytes(manifests[turn % 2])
            os.replace(path / ".next", path / "manifest.json")
            turn += 1

    writer = threading.Thread(target=replace)
    writer.start()
    seen: set[float] = set()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end or len(seen) < 2:
            op = ng.load(path)
            inv_std = op.forward(norm.x(), norm.gamma, norm.beta).inv_std
            np.testing.assert_allclose(inv_std, answers[op.spec.eps or 0], rtol=1e-5)
            seen.add(op.spec.eps or 0)
    finally:
        stop.set()
        writer.join()
    row("right: the old one or the new one")


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The artifact with another manifest and a digest that fits it."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["digest"] = manifest_digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_newer_format(copies: Any, row: Row) -> None:
    """a file in a format of the future"""
    with pytest.raises(ArtifactIncompatible) as caught:
        ng.load(changed(copies(), lambda manifest: manifest.update(format_version=2)))
    row(caught.value)


def test_other_loader(copies: Any, row: Row) -> None:
    """a library for another binary interface (another apache-tvm-ffi)"""
    later = {"tvm_ffi": {"from": "99.0", "below": "100.0"}}
    with pytest.raises(ArtifactIncompatible, match=r"99\.0") as caught:
        ng.load(changed(copies(), lambda manifest: manifest.update(requires=later)))
    row(f"`{caught.typename}`, which names both versions")


def test_leads_out(norm_artifact: Path, tmp_path: Path, row: Row) -> None:
    """an archive with a file ../manifest.json in it"""
    path = pack(norm_artifact, tmp_path / "norm.ngz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../manifest.json", b"{}")
    error = refused(path)
    assert not (tmp_path.parent / "manifest.json").exists()
    row(error)


def test_bomb(norm_artifact: Path, tmp_path: Path, row: Row) -> None:
    """an archive that grows a thousandfold"""
    path = pack(norm_artifact, tmp_path / "norm.ngz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(2**25))
    row(refused(path))


def test_relative_path(
    copies: Any, norm_of: Any, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """a relative path"""
    path = copies()
    monkeypatch.chdir(path.parent)
    norm = norm_of(ng.load(path.name))
    monkeypatch.chdir("/")
    norm.check(norm.x())
    row("right")


def test_full_disk(run_python: Callable[..., str], tmp_path: Path, row: Row) -> None:
    """a disk that is full while the file is written"""
    said = run_python(
        """
import resource, signal
from pathlib import Path
from normgraph.compile.artifact import Writer, writing
from normgraph.errors import ArtifactNotFound, CompileError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
out = Path(sys.argv[2])

def build():
    with writing(out) as writer:
        for file in Path(sys.argv[1]).glob("*-*"):
            stem, _, suffix = file.name.rpartition("-")
            writer.add(stem, "." + suffix.partition(".")[2], file.read_bytes())
        writer.commit({})

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
try:
    build()
except CompileError as error:
    failed = f"`{type(error).__name__}`"
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
left = [file.name for file in out.iterdir() if file.stat().st_size > 4095]
try:
    ng.load(out)
except ArtifactNotFound:
    print(f"{failed}; {left or 'nothing is left'} that loads")
""",
        str(tmp_path / "out"),
    )
    row(said.strip())


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """no compiler on the PATH"""
    ng.graphs.export(
        ng.NormSpec("instance_norm"), shape=("N", 8, "L"), out=tmp_path / "in", kinds=("forward",)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ToolMissing) as caught:
        ng.compile.build(tmp_path / "in", out=tmp_path / "out")
    row(caught.value)
