"""Artifacts in one file: the same as their directories, and archives made to do harm."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normgraph.errors import (
    ArgumentError,
    ArtifactCorrupt,
    ArtifactError,
    ArtifactIncompatible,
    ArtifactNotFound,
)
from normgraph.runtime import load, pack, unpack

Edit = Callable[[dict[str, bytes]], list[tuple[zipfile.ZipInfo | str, bytes]]]


@pytest.fixture
def packed(toy: Any, tmp_path: Path) -> Path:
    """The float32 artifact in one file."""
    return pack(toy.artifact("float32"), tmp_path / "toy.ngz")


@pytest.fixture
def files(packed: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(packed) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(path: Path, files: Any, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these (name, content) pairs, as an ordinary tool writes it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def start_of_list(path: Path) -> int:
    """Where the list of an archive's files begins; a file in it may be an archive itself."""
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


def check(op: Any, toy: Any) -> None:
    for kind in op.kinds:
        inputs = toy.inputs(kind)
        found = op.call(kind, *inputs)
        found = found if isinstance(found, tuple) else (found,)
        for got, answer in zip(found, toy.outputs(kind, inputs).values(), strict=True):
            np.testing.assert_array_equal(got, answer)


def test_it_is_the_same_operator(toy: Any, packed: Path) -> None:
    op, other = load(str(packed)), load(toy.artifact("float32"))
    assert op.manifest == other.manifest
    assert op.self_test() == other.self_test()
    packed.unlink()
    check(op, toy)


def test_nothing_is_extracted(
    toy: Any, packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the folder of the file nor the one for temporary files can be written to."""
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    tmp_path.chmod(0o555)
    try:
        check(load(packed), toy)
    finally:
        tmp_path.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_artifact_gives_the_same_bytes(toy: Any, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for file in sorted(toy.artifact("float32").iterdir(), reverse=True):
        copy.mkdir(exist_ok=True)
        shutil.copyfile(file, copy / file.name)
        os.utime(copy / file.name, (1e9, 1e9))
    (copy / "notes.txt").write_text("no part of it")
    assert pack(copy, tmp_path / "other.ngz").read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        assert "notes.txt" not in archive.namelist()


def test_unpacked_and_packed_again(toy: Any, packed: Path, tmp_path: Path) -> None:
    folder = unpack(packed, tmp_path / "folder")
    check(load(folder), toy)
    assert pack(folder, tmp_path / "again.ngz").read_bytes() == packed.read_bytes()
    assert pack(packed, packed).read_bytes() == (tmp_path / "again.ngz").read_bytes()
    for there in (folder, packed):
        with pytest.raises(ArgumentError, match="new or empty"):
            unpack(packed, there)


def test_an_ordinary_archive(toy: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    """Compressed, in any order, with a file that is no part of the artifact."""
    pairs = [(".lock", b""), *reversed(list(files.items()))]
    with pytest.raises(ArtifactCorrupt, match=r"'\.lock' is no plain file name"):
        load(archive_of(tmp_path / "a.ngz", pairs, zipfile.ZIP_DEFLATED))
    pairs[0] = ("notes.txt", b"")
    check(load(archive_of(tmp_path / "b.ngz", pairs, zipfile.ZIP_DEFLATED)), toy)


@pytest.mark.parametrize(
    "name",
    ["../out", "/tmp/out", "a/b", "a/", "a\\b", "..\\out", ".", "..", "C:out", "a\nb", " a", "ä"],
)
def test_names_that_lead_elsewhere(files: dict[str, bytes], tmp_path: Path, name: str) -> None:
    path = archive_of(tmp_path / "bad.ngz", [*files.items(), (name, b"x")])
    with pytest.raises(ArtifactCorrupt, match="is no plain file name"):
        load(path)
    with pytest.raises(ArtifactCorrupt):
        unpack(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ngz", "toy.ngz"]


def test_a_name_that_ends_early(files: dict[str, bytes], tmp_path: Path) -> None:
    path = archive_of(tmp_path / "bad.ngz", [*files.items(), ("graph.onnx+../x", b"x")])
    path.write_bytes(path.read_bytes().replace(b"graph.onnx+../x", b"graph.onnx\0../x"))
    with pytest.raises(ArtifactCorrupt, match="no plain file name"):
        load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_twice(files: dict[str, bytes], tmp_path: Path) -> None:
    path = archive_of(tmp_path / "bad.ngz", [*files.items(), ("manifest.json", b"{}")])
    with pytest.raises(ArtifactCorrupt, match=r"manifest.json is in it twice"):
        load(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_what_is_no_plain_file(files: dict[str, bytes], tmp_path: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("link")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    path = archive_of(tmp_path / "bad.ngz", [*files.items(), (entry, b"/etc/passwd")])
    with pytest.raises(ArtifactCorrupt, match="link is no plain file"):
        load(path)


def test_other_methods_and_encryption(
    packed: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    path = archive_of(tmp_path / "bad.ngz", files.items(), zipfile.ZIP_BZIP2)
    with pytest.raises(ArtifactCorrupt, match="compressed by method 12"):
        load(path)
    content = bytearray(packed.read_bytes())
    for header, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.rindex(header) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="is encrypted"):
        load(path)


def refused_in_little_memory(path: Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactCorrupt, match=message):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_bomb(files: dict[str, bytes], tmp_path: Path) -> None:
    pairs = [*files.items(), ("bomb", bytes(2**25))]
    path = archive_of(tmp_path / "bad.ngz", pairs, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    refused_in_little_memory(path, "bytes would become")


def test_a_bomb_that_states_another_size(files: dict[str, bytes], tmp_path: Path) -> None:
    """The manifest unpacks to 32 MB of what it holds and then blanks; the list says 64 KB."""
    blown = files["manifest.json"] + b" " * 2**25
    pairs = {**files, "manifest.json": blown}.items()
    path = archive_of(tmp_path / "bad.ngz", pairs, zipfile.ZIP_DEFLATED)
    content = path.read_bytes().replace(struct.pack("<L", len(blown)), struct.pack("<L", 2**16))
    path.write_bytes(content)
    refused_in_little_memory(path, "expected a packed artifact")


def test_files_that_share_bytes(packed: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """Two entries of the list point to one file."""
    content = bytearray(packed.read_bytes())
    first = start_of_list(packed)
    second = content.index(b"PK\1\2", first + 4)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path = tmp_path / "bad.ngz"
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="shares bytes with another"):
        load(path)


def test_too_many_files(files: dict[str, bytes], tmp_path: Path) -> None:
    many = [*files.items(), *((f"f{k}", b"") for k in range(300))]
    with pytest.raises(ArtifactCorrupt, match=r"lists 30\d files"):
        load(archive_of(tmp_path / "bad.ngz", many))
    with zipfile.ZipFile(tmp_path / "none.ngz", "w"):
        pass
    with pytest.raises(ArtifactNotFound, match=r"manifest.json"):
        load(tmp_path / "none.ngz")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b"x",
        lambda content: b"x" + content,
        lambda content: content[:-22],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: b"PK\5\6",
        lambda content: content[:-2] + b"\5\0" + b"hello",
        lambda content: content[:-22] + b"PK\5\6" + b"\xff" * 18,
        lambda content: bytes(len(content)),
        lambda content: zlib.compress(content),
    ],
)
def test_what_is_no_such_archive(
    packed: Path, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "bad.ngz"
    path.write_bytes(change(packed.read_bytes()))
    with pytest.raises(ArtifactCorrupt, match="expected a packed artifact"):
        load(path)


def test_cut_anywhere(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    path = tmp_path / "bad.ngz"
    for length in [*range(0, len(content), max(1, len(content) // 150)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactCorrupt):
            load(path)


def test_a_byte_changed_anywhere(toy: Any, packed: Path, tmp_path: Path) -> None:
    """It is refused, or it was a byte that says nothing, such as of a time."""
    random = np.random.default_rng(0)
    content = packed.read_bytes()
    end = start_of_list(packed)
    path = tmp_path / "bad.ngz"
    refused = 0
    places = [*random.integers(len(content), size=100), *random.integers(end, len(content), 200)]
    for place in map(int, places):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            op = load(path)
        except (ArtifactCorrupt, ArtifactNotFound, ArtifactIncompatible):
            refused += 1
        else:
            check(op, toy)
    assert refused > 200


def test_a_file_that_is_missing(files: dict[str, bytes], tmp_path: Path) -> None:
    for name in files:
        rest = [(other, content) for other, content in files.items() if other != name]
        with pytest.raises((ArtifactCorrupt, ArtifactNotFound), match=name):
            load(archive_of(tmp_path / "bad.ngz", rest))


def test_in_threads_and_after_a_fork(toy: Any, packed: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                check(load(packed), toy)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    code = (
        "import os, sys; sys.modules['torch'] = None; import normgraph as ng\n"
        "ng.load(sys.argv[1]); child = os.fork()\n"
        "if child == 0: os._exit(0 if ng.load(sys.argv[1]).self_test() else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code, packed], check=True, timeout=60)


def test_replaced_while_it_is_loaded(toy: Any, tmp_path: Path) -> None:
    sources = [toy.artifact("float32"), toy.artifact("float64")]
    ready = [pack(source, tmp_path / f"{source.name}.ngz") for source in sources]
    path = tmp_path / "busy.ngz"
    shutil.copy(ready[0], path)
    stop = threading.Event()

    def replace() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            shutil.copy(ready[turn % 2], tmp_path / "next.ngz")
            os.replace(tmp_path / "next.ngz", path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        end = time.monotonic() + 1
        seen = {load(path).dtype}
        while time.monotonic() < end or len(seen) < 2:
            seen.add(load(path).dtype)
    finally:
        stop.set()
        writer.join()
    assert seen == {"float32", "float64"}


def test_what_cannot_be_packed(toy: Any, changed: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound):
        pack(tmp_path / "nothing", tmp_path / "x.ngz")
    with pytest.raises(ArgumentError, match="this is a directory"):
        pack(toy.artifact("float32"), tmp_path)
    with pytest.raises(ArtifactError, match="cannot be written"):
        pack(toy.artifact("float32"), tmp_path / "nowhere" / "x.ngz")
    with pytest.raises(ArtifactError, match="cannot be written"):
        unpack(toy.artifact("float32"), "/proc/nothing")
    broken = changed()
    next(broken.glob("*.so")).write_bytes(b"")
    with pytest.raises(ArtifactCorrupt):
        pack(broken, tmp_path / "x.ngz")
    assert not (tmp_path / "x.ngz").exists()


def test_a_full_disk(toy: Any, packed: Path, tmp_path: Path) -> None:
    """The file that was there stays, and nothing else is left."""
    before = packed.read_bytes()
    code = (
        "import resource, signal, sys; sys.modules['torch'] = None\n"
        "from normgraph.errors import ArtifactError\n"
        "from normgraph.runtime import pack, unpack\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "for write, out in ((pack, sys.argv[2]), (unpack, sys.argv[3])):\n"
        "    try: write(sys.argv[1], out)\n"
        "    except ArtifactError as error: assert 'cannot be written: File too' in str(error)\n"
        "    else: sys.exit('no error')\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, toy.artifact("float32"), packed, out]
    subprocess.run(command, check=True, timeout=60)
    assert packed.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "toy.ngz"]
    with pytest.raises(ArtifactNotFound):
        load(out)
