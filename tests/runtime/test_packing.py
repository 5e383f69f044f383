"""Where `pack` and `unpack` write to, and where they refuse to."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from normgraph.errors import ArgumentError, ArtifactCorrupt, ArtifactError
from normgraph.runtime import load, pack, packing, unpack


@pytest.fixture
def source(toy: Any) -> Path:
    """An artifact that nothing may be written into."""
    path: Path = toy.artifact("float32")
    return path


def test_a_device_stays_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename would put a file in its place."""
    monkeypatch.chdir(tmp_path)  # the address of a socket has at most 107 bytes
    pipe, link, end = tmp_path / "pipe", tmp_path / "link", tmp_path / "socket"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    before = os.stat("/dev/null").st_rdev
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(end.name)
        for place in ("/dev/null", pipe, link, end):
            with pytest.raises(ArgumentError, match=r"expected a plain file to write.*device"):
                pack(source, place)
    assert os.stat("/dev/null").st_rdev == before
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "socket"]


def test_a_place_that_becomes_a_pipe_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = packing.artifact_files

    def replaced(artifact: Any) -> Any:
        os.mkfifo(tmp_path / "out.ngz")
        return files(artifact)

    monkeypatch.setattr(packing, "artifact_files", replaced)
    with pytest.raises(ArgumentError, match="a device, a pipe"):
        pack(source, tmp_path / "out.ngz")
    assert [path.name for path in tmp_path.iterdir()] == ["out.ngz"]
    assert (tmp_path / "out.ngz").is_fifo()


def test_a_link_to_a_file_stays_a_link(source: Path, tmp_path: Path) -> None:
    """As with cp: what it leads to is written, also where that is not there yet."""
    (tmp_path / "releases").mkdir()
    link = tmp_path / "latest.ngz"
    link.symlink_to("releases/1.ngz")
    for _ in range(2):
        assert pack(source, link) == link
        assert link.is_symlink()
        assert load(tmp_path / "releases" / "1.ngz").kinds == load(link).kinds
    assert os.listdir(tmp_path / "releases") == ["1.ngz"]


def test_a_link_to_itself(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(ArgumentError, match="a link that leads nowhere"):
        pack(source, link)
    with pytest.raises(ArtifactError, match="cannot be written"):
        pack(source, link / "x.ngz")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(link)


def test_a_place_in_the_artifact_itself(changed: Any, tmp_path: Path) -> None:
    path = changed()
    (path / "inner").mkdir()
    for name in ("door", "hatch.ngz"):
        (tmp_path / name).symlink_to(path if name == "door" else path / "manifest.json")
    before = sorted(file.name for file in path.iterdir())
    for out in (
        path / "x.ngz",
        path / "manifest.json",
        path / "inner" / "x.ngz",
        tmp_path / "door" / "x.ngz",
        tmp_path / "hatch.ngz",
        path / ".." / path.name / "x.ngz",
    ):
        for way in (path, tmp_path / "door"):
            with pytest.raises(ArgumentError, match="outside of the artifact"):
                pack(way, out)
    assert sorted(file.name for file in path.iterdir()) == before
    assert load(path).kinds
    assert load(pack(path, path.with_name("changed.ngz"))).kinds  # beside it is not in it


def test_paths_no_file_can_have(source: Path, tmp_path: Path) -> None:
    for write in (pack, unpack):
        for out in ("a\0b", tmp_path / "\ud800"):
            with pytest.raises(ArgumentError, match=r"Check the path"):
                write(source, out)
        with pytest.raises(ArtifactError, match="cannot be written: File name too long"):
            write(source, tmp_path / ("x" * 300))


class _Bytes:
    """A path object that gives bytes, which the protocol allows."""

    def __init__(self, path: Path) -> None:
        self._path = bytes(path)

    def __fspath__(self) -> bytes:
        return self._path


def test_paths_that_are_bytes(source: Path, tmp_path: Path) -> None:
    out: Any = _Bytes(tmp_path / "x.ngz")
    pack(source, out)
    assert load(out).kinds
    folder: Any = _Bytes(tmp_path / "folder")
    assert load(unpack(out, folder)).kinds


def test_a_folder_that_cannot_be_listed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop root, so the system's answer is made up."""

    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ArtifactError, match="cannot be written: Permission denied"):
        unpack(source, tmp_path)


def test_a_pipe_is_no_artifact(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match="neither a directory nor a plain file"):
            load(path)
    (tmp_path / "empty").touch()
    with pytest.raises(ArtifactCorrupt, match="does not end as an archive"):
        load(tmp_path / "empty")
