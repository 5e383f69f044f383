"""Hundreds of ways to damage an artifact: none may end the process or give a wrong result."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from normgraph.errors import NormGraphError
from normgraph.runtime import load, operator
from normgraph.runtime.artifact import open_artifact

Changed = Callable[..., Path]

# Damages a copy of the artifact again and again, and loads and runs it. Says each time what it is
# about to do, so that the last line tells what ended it.
_WORKER = """
import json, random, sys
from pathlib import Path
import numpy as np
import normgraph as ng

path, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
files = sorted(file for file in path.iterdir() if file.name != ".lock")
whole = {file: file.read_bytes() for file in files}
one, x = np.ones(3, np.float32), np.arange(30, dtype=np.float32).reshape(2, 3, 5)

def flip(data):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)

def flips(data):
    for _ in range(draw.randrange(2, 30)):
        flip(data)

def cut(data):
    del data[draw.randrange(len(data)):]

def cut_in_pages(data):
    del data[draw.randrange(len(data)) // 4096 * 4096:]

def append(data):
    data += draw.randbytes(draw.randrange(1, 9000))

def insert(data):
    at = draw.randrange(len(data))
    data[at:at] = draw.randbytes(draw.randrange(1, 9))

def lose(data):
    at = draw.randrange(len(data))
    del data[at:at + draw.randrange(1, 9)]

def zero(data):
    at = draw.randrange(len(data)) // 512 * 512
    size = len(data[at:at + 512])
    data[at:at + 512] = bytes(size) if any(data[at:at + 512]) else b"\\xff" * size

def repeat(data):
    data += bytes(data)

def swap(data):
    data[:] = whole[draw.choice([file for file in files if whole[file] != data])]

ways = [flip] * 8 + [flips, cut, cut_in_pages, append, insert, lose, zero, repeat, swap]
for turn in range(count):
    file, way = draw.choice(files), draw.choice(ways)
    print(turn, file.name, way.__name__, end=" ", flush=True)
    data = bytearray(whole[file])
    way(data)
    file.write_bytes(data)
    try:
        op = ng.load(path)
    except ng.errors.ArtifactError as error:
        print(type(error).__name__, flush=True)
    else:
        y = op.inference(x, one, one, one, one)
        print("right" if (y == x + 2).all() else "WRONG", flush=True)
    file.write_bytes(whole[file])
assert (ng.load(path).inference(x, one, one, one, one) == x + 2).all()
print("done")
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_damage_anywhere(changed: Changed, seed: int) -> None:
    """The build has run the self-test, so the manifest alone stands in the way."""
    path = changed(lambda manifest: manifest["self_test"].update(status="passed"))
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(path), str(seed), "300"],
        capture_output=True,
        text=True,
        check=False,
    )
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last) == (0, "done"), f"{lines[-1:]} {last} {done.stderr}"
    outcomes = [line.split()[-1] for line in lines]
    assert set(outcomes) <= {"ArtifactCorrupt", "ArtifactIncompatible", "ArtifactNotFound", "right"}
    # A manifest with other white space says the same; nothing else is taken.
    right = [line for line in lines if line.endswith("right")]
    assert all(line.split()[1] == "manifest.json" for line in right)
    assert len(right) < 10
    assert len(lines) == 300


def test_files_of_another_build(toy: Any, changed: Changed) -> None:
    """Each is sound by itself; together they are no artifact."""
    other = toy.artifact("float64")
    path = changed()
    for file in list(path.iterdir()):
        kind = file.name.partition("-")[0]
        (foreign,) = other.glob(f"{kind}*")
        content = file.read_bytes()
        if foreign.read_bytes() == content:  # the graphs of the toys are alike
            continue
        file.write_bytes(foreign.read_bytes())
        with pytest.raises(NormGraphError, match=r"sha256 differs|missing|expected .* bytes"):
            load(path)
        file.write_bytes(content)
    assert load(path).dtype == "float32"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a manifest."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


_ODD: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", "\ud800", "\0", "9" * 30, [], [[]], {},
    {"file": "x"}, "../x", ["N", "N"], ["", 3],
]  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_a_manifest_that_somebody_wrote(
    changed: Changed, digest: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With the right digest: it may be taken or refused, but not end in an error of Python's."""
    monkeypatch.setattr(operator, "load_library", lambda library: None)
    path = changed()
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    places = [place for place in _places(manifest) if place]
    draw = random.Random(seed)
    refused = 0
    for _ in range(400):
        edited: Any = copy.deepcopy(manifest)
        place = draw.choice(places)
        holder: Any = edited
        for key in place[:-1]:
            holder = holder[key]
        if draw.random() < 0.25:
            del holder[place[-1]]
        else:
            holder[place[-1]] = draw.choice(_ODD)
        edited["digest"] = digest(edited)
        file.write_text(json.dumps(edited))
        try:
            open_artifact(path).library()
        except NormGraphError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{place}: {holder}") from error
    assert refused > 150
