"""Artifacts with digests that fit and contents made to do harm: refused, and in little memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArtifactCorrupt, ArtifactError
from normgraph.runtime import load, pack, vectors
from normgraph.runtime.files import StoredFile

Changed = Callable[..., Path]
Edit = Callable[[Any], None]


def in_little_memory(path: Path, message: str, error: type[ArtifactError] = ArtifactCorrupt) -> str:
    """The message; a process that may have 64 MiB more than before reads the artifact."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, hard))
    try:
        with pytest.raises(error, match=message) as caught:
            load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert len(str(caught.value)) < 1500
    return str(caught.value)


# The files.


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read = StoredFile.read

    def counted(self: StoredFile) -> bytes:
        names.append(self.name)
        return read(self)

    monkeypatch.setattr(StoredFile, "read", counted)
    return names


def test_a_file_that_is_named_often_is_read_once(
    changed: Changed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def edit(manifest: Any) -> None:
        manifest["libraries"] *= 900
        manifest["kinds"]["forward"]["graph"] = {
            key: manifest["libraries"][0][key] for key in ("file", "size", "sha256")
        }

    path = changed(edit)
    names = count_reads(monkeypatch)
    assert load(path).kinds
    assert len(names) == len(set(names)) == 3
    packed = pack(path, tmp_path / "x.ngz")
    names.clear()
    assert load(packed).kinds
    assert len(names) == 3


def test_a_file_that_is_named_in_two_ways(changed: Changed) -> None:
    for key, value in (("size", 1), ("sha256", "0" * 64)):

        def edit(manifest: Any, key: str = key, value: Any = value) -> None:
            manifest["libraries"].append({**manifest["libraries"][0], key: value})

        path = changed(edit)
        with pytest.raises(ArtifactCorrupt, match="with two sizes or hashes"):
            load(path)
        path.rename(path.with_name(key))


def test_files_of_a_terabyte(changed: Changed) -> None:
    """With holes in them they take no room on the disk."""

    def edit(manifest: Any) -> None:
        manifest["libraries"][0]["size"] = 2**40

    path = changed(edit)
    (library,) = path.glob("kernels-*")
    os.truncate(library, 2**40)
    in_little_memory(path, "have 10995116.* bytes by the manifest, and 1073741824 are the most")


def test_a_file_there_is_no_memory_for(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        manifest["libraries"][0]["size"] = 2**29

    path = changed(edit)
    (library,) = path.glob("kernels-*")
    os.truncate(library, 2**29)
    in_little_memory(path, "not enough memory to read 536870912 bytes", ArtifactError)


# The manifest.


def put(*place: Any) -> Edit:
    """put(key, key, ..., value)"""

    def edit(manifest: Any) -> None:
        *keys, last, value = place
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return edit


FORWARD = ("kinds", "forward")
X = (*FORWARD, "inputs", 0, "shape")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(*X, [2**62, 2**62]), "is no shape"),
        (put(*X, [2**40, 2]), "is no shape"),
        (put(*X, ["N", -3, "L"]), "is no shape"),
        (put(*X, ["N", 0, "L"]), "is no shape"),
        (put(*X, ["N", "", "L"]), "is no shape"),
        (put(*X, ["N", "a b", "L"]), "is no shape"),
        (put(*X, ["N", True, "L"]), "is no shape"),
        (put(*X, ["N", 3.0, "L"]), "is no shape"),
        (put(*X, ["N"] * 17), "is no shape"),
        (put(*X, [[]]), "is no shape"),
        (put("shape", [2**41]), "is no shape"),
        (put(*FORWARD, "outputs", 1, "shape", ["N", 2**40, 1]), "larger than every input"),
        (put(*FORWARD, "outputs", 1, "shape", ["N", 3, "N"]), "larger than every input"),
        (put(*FORWARD, "outputs", 1, "shape", [4]), "larger than every input"),
        (put(*FORWARD, "inputs", 0, "name", "class"), "not names of arguments"),
        (put(*FORWARD, "inputs", 0, "name", "_x"), "not names of arguments"),
        (put(*FORWARD, "inputs", 0, "name", "x" * 101), "not names of arguments"),
        (put(*FORWARD, "inputs", 0, "name", "ﬁ"), "not names of arguments"),
        (put(*FORWARD, "outputs", 0, "name", "None"), "not names of arguments"),
        (put(*FORWARD, "function", "__init__"), "function to have a name"),
        (put(*FORWARD, "function", "a b"), "function to have a name"),
        (lambda m: m["kinds"].update({"import": m["kinds"]["forward"]}), "the kind to have a name"),
        (lambda m: m["kinds"].update({"": m["kinds"]["forward"]}), "the kind to have a name"),
        (put("self_test", "cases", 0, "shapes", {"x": [2**20, 2**20]}), "33554432 elements"),
        (put("self_test", "cases", 0, "shapes", {"x": [1] * 17}), "self-test's 'x' has shape"),
        (put("self_test", "cases", 0, "shapes", {"x": {}}), "self-test's 'x' has shape"),
        (put("self_test", "cases", 0, "kind", "sideways"), "'sideways', which is no kind"),
        (lambda m: m["libraries"].extend([{}] * 1024), "of 1025 entries, and 1024 are the most"),
        (put("rule", "x" * 1025), "a text of 1025 characters"),
        (put("rule", "\x1b[2J"), "cannot be printed"),
        (put("rule", "\ud800"), "cannot be printed"),
        (put("rule", {"\n": 1}), "cannot be printed"),
        (put("rule", 2**63), "an integer of 64 bits"),
        (put("rule", -(2**70)), "an integer of 71 bits"),
        (put("rule", float("nan")), "NaN, which is no number of JSON"),
        (put("rule", float("-inf")), "-Infinity, which is no number of JSON"),
    ],
)
def test_fields_that_nothing_needs(changed: Changed, edit: Edit, message: str) -> None:
    path = changed(edit)
    with pytest.raises(ArtifactCorrupt, match=message) as caught:
        load(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "a", "format": "normgraph-artifact"}', "the key 'format' twice"),
        ('{"a": 1e999}', "a number that is too large"),
        ('{"a": ' + "9" * 5000 + "}", "expected JSON"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "32 levels are the most"),
        ("[" * 400_000 + "]" * 400_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" + "[]," * 300_000 + "[]]", "of 300001 entries"),
        ("", "expected JSON"),
        ("\ufeff{}", "expected JSON"),
        ("{} {}", "expected JSON"),
        ("{'a': 1}", "expected JSON"),
        ("[]", "it is none"),
        ("null", "it is none"),
    ],
)
def test_json_of_another_meaning(changed: Changed, text: str, message: str) -> None:
    path = changed()
    (path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactCorrupt, match=message) as caught:
        load(path)
    assert len(str(caught.value)) < 600


def test_long_values_are_cut_in_messages(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        target = {**manifest["libraries"][0]["target"], "features": [f"f{k}" for k in range(1000)]}
        manifest["libraries"] = [{**manifest["libraries"][0], "target": target}] * 90

    with pytest.raises(ArtifactError, match=r"CPU features f0, .* and \d+ more") as caught:
        load(changed(edit))
    assert len(str(caught.value)) < 3000


# The vectors.


@pytest.fixture
def with_member(changed: Changed) -> Callable[..., Path]:
    """with_member(content, shape): an artifact whose self-test has this file for an input's."""

    def make(content: bytes, edit: Edit = lambda manifest: None, count: int = 1) -> Path:
        path = changed(edit)
        (file,) = path.glob("selftest-*")
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, whole in members.items():
                with archive.open(name, "w", force_zip64=True) as stream:
                    if name != "forward.0.in.x.npy":
                        stream.write(whole)
                        continue
                    for _ in range(count):
                        stream.write(content)
        return restated(path, file)

    return make


def restated(path: Path, file: Path) -> Path:
    """The artifact with the size and the hash of its self-test, and the digest, as they are."""
    content = file.read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["self_test"].update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def header(text: str, version: bytes = b"\1\0") -> bytes:
    """The beginning of an .npy file."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode()


def stated(shape: object, dtype: object = "<f4") -> bytes:
    return header(f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n")


NO_ARRAY = "is no .npy file of numbers"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stated((2**20, 3, 2**14, 2**14)), "said to have shape .* and has 0 bytes"),
        (stated((2**39, 2**39)), "said to have shape"),
        (stated((2, 3, 5)) + bytes(119), "and has 119 bytes"),
        (stated((2, 3, 5)) + bytes(121), "and has 121 bytes"),
        (stated((0,)), "must have rank 3"),
        (stated((1,) * 40) + bytes(4), "must have rank 3"),
        (stated((1,) * 66) + bytes(4), "cannot be read or run"),
        (stated((2**62, 2**62)), "said to have shape"),
        (stated((-1, 3)) + bytes(12), NO_ARRAY),
        (stated((30,), "|O") + bytes(240), NO_ARRAY),
        (stated((30,), ">f4") + bytes(120), NO_ARRAY),
        (stated((30,), "<f3") + bytes(90), NO_ARRAY),
        (stated((30,), "<f1") + bytes(30), "cannot be read or run"),
        (stated((30,), "<c8") + bytes(240), NO_ARRAY),
        (stated((30,), "|S4") + bytes(120), NO_ARRAY),
        (stated((30,), "<U1") + bytes(120), NO_ARRAY),
        (stated((30,), [("a", "<f4")]) + bytes(120), NO_ARRAY),
        (stated((10**400,)), NO_ARRAY),
        (stated("x"), NO_ARRAY),
        (stated((2, 3, 5))[:40], NO_ARRAY),
        (header("{" * 60000), NO_ARRAY),
        (header("(" * 9000), NO_ARRAY),
        (header("1, " * 9000), NO_ARRAY),
        (header("__import__('os').abort()"), NO_ARRAY),
        (header(stated((30,))[10:].decode(), b"\2\0") + bytes(120), NO_ARRAY),
        (b"", NO_ARRAY),
        (b"\x93NUMPY", NO_ARRAY),
        (b"\x80\x04}.", NO_ARRAY),
    ],
)
def test_members_that_are_no_such_arrays(
    with_member: Callable[..., Path], content: bytes, message: str
) -> None:
    in_little_memory(with_member(content), message)


def test_a_member_that_grows(with_member: Callable[..., Path]) -> None:
    """A few hundred kilobytes that become 300 MB."""
    in_little_memory(with_member(bytes(2**20), count=300), "bytes, and 268500992 are the most")


def test_a_case_there_is_no_memory_for(with_member: Callable[..., Path]) -> None:
    edit = put("self_test", "cases", 0, "shapes", {"x": [5, 3, 2**20]})
    whole = io.BytesIO()
    np.save(whole, np.ones((2, 3, 5), np.float32))
    in_little_memory(with_member(whole.getvalue(), edit), "not enough memory", ArtifactError)


def test_the_same_work_again_and_again(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(manifest: Any) -> None:
        manifest["self_test"]["cases"] *= 100

    monkeypatch.setattr(vectors, "_MOST_READ", 100_000)
    with pytest.raises(ArtifactCorrupt, match="more than 100000 bytes of arrays"):
        load(changed(edit))


def test_cases_that_are_large_together(changed: Changed) -> None:
    def edit(manifest: Any) -> None:
        case = {**manifest["self_test"]["cases"][0], "shapes": {"x": [2**25]}}
        manifest["self_test"]["cases"] = [case] * 33

    in_little_memory(changed(edit), "have 1107296256 elements together, and 1073741824 are")


def test_an_output_that_is_large(changed: Changed) -> None:
    """The input of its size is said to be repeated from a single element."""

    def edit(manifest: Any) -> None:
        for role, place in (("inputs", 3), ("outputs", 3)):
            manifest["kinds"]["forward"][role][place]["shape"] = [2**40]
        manifest["self_test"]["cases"][0]["shapes"] = {"running_mean": [2**40]}

    in_little_memory(changed(edit), "'running_mean' has shape .1099511627776., and 33554432 el")


def test_vectors_that_are_no_archive_of_one_meaning(changed: Changed) -> None:
    for number, (cut, added) in enumerate(((0, b"x"), (30, b""), (2**20, b""))):
        path = changed()
        (file,) = path.glob("selftest-*")
        content = file.read_bytes()
        file.write_bytes(content[: max(0, len(content) - cut)] + added)
        with pytest.raises(ArtifactCorrupt, match="cannot be read or run"):
            load(restated(path, file))
        path.rename(path.with_name(str(number)))


# Archives.


@pytest.fixture
def packed(toy: Any, tmp_path: Path) -> Path:
    return pack(toy.artifact("float32"), tmp_path / "toy.ngz")


def test_encrypted_by_one_of_two_headers(packed: Path) -> None:
    whole = packed.read_bytes()
    for place in (whole.rindex(b"PK\1\2") + 8, whole.index(b"PK\3\4") + 6):
        content = bytearray(whole)
        content[place] |= 1
        packed.write_bytes(content)
        with pytest.raises(ArtifactCorrupt, match="is encrypted"):
            load(packed)
    content = bytearray(whole)
    content[content.index(b"PK\3\4") + 8] = 8
    packed.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="compressed in two ways"):
        load(packed)


def test_a_second_list_of_files(packed: Path) -> None:
    """The place of one, as large archives have it: the first list holds it as a comment."""
    whole = packed.read_bytes()
    end, locator = whole[-22:], struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    values = list(struct.unpack("<4s4H2LH", end))
    values[5] += len(locator)
    body = bytearray(whole[:-22] + locator)
    last = body.rindex(b"PK\1\2")
    body[last + 32 : last + 34] = struct.pack("<H", len(locator))
    packed.write_bytes(body + struct.pack("<4s4H2LH", *values))
    with pytest.raises(ArtifactCorrupt, match="a second list of files"):
        load(packed)
