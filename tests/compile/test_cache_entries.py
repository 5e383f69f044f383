"""Entries of the compile cache that were not made by it, with a sha256 that fits: built anew."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from normgraph.compile.artifact import Draft
from normgraph.compile.cache import Cache

NAME = "selftest-0123456789ab.npz"
SIZES: list[Any] = [-1, 2, 4, 10**30, 3.0, True, "3", None, [], {}]


def made() -> Draft:
    draft = Draft(manifest={"label": "made"})
    draft.add("selftest", ".npz", b"content")
    return draft


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 2**20)


def entry(head: Any, rest: bytes = b"", version: bytes = b"2") -> bytes:
    """An entry with this head, which may be its text."""
    body = (head if isinstance(head, bytes) else json.dumps(head).encode()) + b"\n" + rest
    hashed = hashlib.sha256(body).hexdigest().encode()
    return b"normgraph-cache-" + version + b" " + hashed + b"\n" + body


def head(**changes: Any) -> dict[str, Any]:
    return {"key": "k", "manifest": {}, "files": [[NAME, 3]], **changes}


def test_an_entry_as_the_cache_makes_it(kept: Cache) -> None:
    """What the cases below differ from."""
    kept.folder.mkdir(mode=0o700)
    (kept.folder / "k.built").write_bytes(entry(head(), b"abc"))
    os.chmod(kept.folder / "k.built", 0o600)
    assert kept.fetch("k", made) == Draft({NAME: b"abc"}, {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        entry(head(), b"abc", b"1"),
        entry(head(key="other"), b"abc"),
        entry({"manifest": {}, "files": []}),
        entry({"key": "k", "files": []}),
        entry({"key": "k", "manifest": {}}),
        entry(head(manifest=[])),
        entry(head(files={NAME: 3}), b"abc"),
        entry(head(files=[NAME]), b"abc"),
        entry(head(files=[[NAME]]), b"abc"),
        entry(head(files=[[NAME, 3, 3]]), b"abc"),
        entry(head(files=[[NAME, 3], [NAME, 0]]), b"abc"),
        entry(head(files=[[None, 3]]), b"abc"),
        *(
            entry(head(files=[[name, 3]]), b"abc")
            for name in (
                "",
                "manifest.json",
                "../" + NAME,
                "/tmp/" + NAME,
                "kernels-/../../x-0123456789ab.so",
                NAME + "\n",
                NAME + "\0",
                "kernels-\ud800-0123456789ab.so",
            )
        ),
        *(entry(head(files=[[NAME, size]]), b"abc") for size in SIZES),
        *(
            entry(text)
            for text in (b"", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"key":' * 99_999)
        ),
    ],
)
def test_an_entry_of_another_structure(kept: Cache, content: bytes) -> None:
    kept.folder.mkdir(mode=0o700)
    file = kept.folder / "k.built"
    file.write_bytes(content)
    file.chmod(0o600)
    said: list[str] = []
    assert kept.fetch("k", made, said.append) == made()
    assert "k.built is damaged" in said[0]
    assert all(len(line) < 500 for line in said)
    said.clear()
    assert kept.fetch("k", made, said.append) == made()
    assert said == [f"taken from the compile cache in {kept.folder}"]


def test_an_entry_under_the_key_of_another(kept: Cache) -> None:
    """Whoever may rename files in the folder may not choose what is built."""
    kept.fetch("a", lambda: Draft(manifest={"label": "a"}))
    os.rename(kept.folder / "a.built", kept.folder / "k.built")
    said: list[str] = []
    assert kept.fetch("k", made, said.append) == made()
    assert "(it is of another build)" in said[0]


def test_an_entry_of_a_terabyte(kept: Cache) -> None:
    kept.fetch("k", made)
    os.truncate(kept.folder / "k.built", 2**40)
    said: list[str] = []
    assert kept.fetch("k", made, said.append) == made()
    assert "k.built is too large" in said[0]
    assert (kept.folder / "k.built").stat().st_size < 1000
