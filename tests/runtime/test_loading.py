"""From checked bytes to code in the process, and nothing else: not what a file holds by then."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from normgraph.errors import ArtifactError, ArtifactIncompatible
from normgraph.runtime import Operator, load, loading
from normgraph.runtime.library import Library
from normgraph.runtime.loading import load_library

Changed = Callable[..., Path]


def right(op: Operator, toy: Any) -> bool:
    """Whether the kernel of `inference` gives what it should."""
    inputs = toy.inputs("inference", dtype=np.dtype(op.dtype))
    return bool((op.inference(*inputs) == toy.outputs("inference", inputs)["y"]).all())


def mapped() -> set[str]:
    """The libraries from memory that this process has mapped, by where in memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:normgraph-" in line}


def rename_library(path: Path, name: str, digest: Callable[[dict[str, Any]], str]) -> None:
    """Give the library of an artifact a name without a hash."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    entry = manifest["libraries"][0]
    os.rename(path / entry["file"], path / name)
    entry["file"] = name
    manifest["digest"] = digest(manifest)
    file.write_text(json.dumps(manifest))


_CHANGED_WHILE_LOADED = """
import sys
from pathlib import Path
import numpy as np
import normgraph as ng

path, how = Path(sys.argv[1]), sys.argv[2]
(library,) = path.glob("kernels-*.so")
op = ng.load(path)
one, x = np.ones(3, np.float32), np.arange(30, dtype=np.float32).reshape(2, 3, 5)
size = library.stat().st_size
with open(library, "r+b") as file:
    if how == "cut":
        file.truncate(size // 2)
    elif how == "emptied":
        file.truncate(0)
    else:
        file.write(b"\\xcc" * size)  # int3
for kind in op.kinds:
    if kind == "inference":
        assert (op.inference(x, one, one, one, one) == x + 2).all()
    else:
        op.call(kind, *(
            np.ones([{"N": 2, "L": 5}.get(dim, dim) for dim in spec.shape], spec.dtype)
            for spec in op.signature(kind).inputs
        ))
print("fine")
"""


@pytest.mark.parametrize("how", ["cut", "emptied", "rewritten"])
def test_a_library_that_is_changed_in_place_while_it_is_loaded(changed: Changed, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHANGED_WHILE_LOADED, str(changed()), how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_another_library_under_the_same_path(toy: Any, tmp_path: Path, digest: Any) -> None:
    """The system's loader takes a path it knows for the library it knows."""
    path = tmp_path / "same"
    shutil.copytree(toy.artifact("float32"), path)
    rename_library(path, "kernels.so", digest)
    old = load(path)
    shutil.rmtree(path)
    shutil.copytree(toy.artifact("float64"), path)
    rename_library(path, "kernels.so", digest)
    new = load(path)
    assert (old.dtype, new.dtype) == ("float32", "float64")
    assert right(old, toy)
    assert right(new, toy)


def test_the_code_cannot_be_changed_while_it_is_handed_over(
    changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def overwrite(path: str, form: str) -> Any:
        tried.append(path)
        with open(path, "r+b", buffering=0) as file:
            with pytest.raises(PermissionError):
                file.write(b"\0")
            with pytest.raises(PermissionError):
                file.truncate(0)
        return original(path, form)

    original = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda name: overwrite)
    path = changed()
    # A library of its own, which no other test has loaded.
    (library,) = path.glob("kernels-*")
    content = library.read_bytes() + b"\0" * 8
    assert load_library(library_of(content)).function("forward") is not None
    assert len(tried) == 1


def library_of(content: bytes) -> Library:
    """Code as an artifact would have it; its digest is only to differ from that of others."""
    return Library(
        Path("kernels-x.so"),
        "cpu",
        "llvm",
        "",
        (),
        "passed",
        sha256=content[-64:].hex(),
        content=content,
    )


def test_operators_share_their_code_and_it_goes_with_the_last(
    toy: Any, tmp_path: Path, digest: Any
) -> None:
    path = tmp_path / "own"
    shutil.copytree(toy.artifact("float32"), path)
    (library,) = path.glob("kernels-*")
    library.write_bytes(library.read_bytes() + b"made this test's own")
    with_new_hash(path, library, digest)
    gc.collect()
    before = mapped()
    first, second = load(path), load(path)
    assert len(mapped() - before) == 1
    function = second.inference
    del first, second
    gc.collect()
    assert len(mapped() - before) == 1
    inputs = toy.inputs("inference")
    assert (function(*inputs) == toy.outputs("inference", inputs)["y"]).all()
    del function
    gc.collect()
    assert mapped() == before


def with_new_hash(path: Path, library: Path, digest: Any) -> None:
    """State the library's size and sha256 as they are now."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    content = library.read_bytes()
    manifest["libraries"][0].update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest["digest"] = digest(manifest)
    file.write_text(json.dumps(manifest))


def test_many_libraries_one_after_the_other(toy: Any) -> None:
    """The number of the open file comes again each time, and the path must not."""
    libraries = [
        load_artifact_library(toy.artifact(dtype)) for dtype in ("float32", "float64", "float16")
    ]
    opened = set(os.listdir("/proc/self/fd"))
    before = len(mapped())
    for turn in range(60):
        content = libraries[turn % 3] + turn.to_bytes(8, "little")
        assert load_library(library_of(content)).function("inference") is not None
        assert len(mapped()) <= before + 1
    assert set(os.listdir("/proc/self/fd")) == opened


def load_artifact_library(path: Path) -> bytes:
    (library,) = path.glob("kernels-*")
    return library.read_bytes()


@pytest.mark.parametrize("refused", [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EMFILE])
def test_where_memory_cannot_be_run(
    toy: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: int,
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = load_artifact_library(toy.artifact("float32")) + refused.to_bytes(8, "little")
    assert load_library(library_of(content)).function("forward") is not None
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=r"cannot be handed.*TMPDIR") as caught:
        load_library(library_of(content + b"!"))
    assert not isinstance(caught.value, ArtifactIncompatible)
    assert os.strerror(refused) in str(caught.value)


def test_a_system_that_does_not_know_memory_to_run(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 6.3."""
    create = os.memfd_create
    asked: list[int] = []

    def old(name: str, flags: int) -> int:
        asked.append(flags)
        if flags & ~(os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    content = load_artifact_library(toy.artifact("float32")) + b"before 6.3"
    assert load_library(library_of(content)).function("forward") is not None
    assert len(asked) == 2


@pytest.mark.parametrize("missing", ["memory to run", "/proc"])
def test_a_folder_for_temporary_files_from_which_nothing_may_be_run(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted noexec, which the loader says in its own words."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def load_from(path: str, form: str) -> Any:
        real = os.path.realpath(path)
        what = "failed to map segment from" if os.path.exists(real) else "cannot open"
        raise RuntimeError(f"{path}: {what} shared object")

    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda name: load_from)
    if missing == "/proc":
        monkeypatch.setattr(loading, "_MEMORY", "/nothing")
    else:
        monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ArtifactError, match=r"Set TMPDIR.*not mounted noexec") as caught:
        load_library(library_of(b"a library"))
    assert not isinstance(caught.value, ArtifactIncompatible)


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + b"\2" * 4096])
def test_what_the_system_s_loader_refuses(content: bytes) -> None:
    with pytest.raises(ArtifactIncompatible, match=r"system's loader refuses.*from memory"):
        load_library(library_of(content))


_OTHER_FILES = """
import os, sys, tempfile
import tvm_ffi
import normgraph as ng

op = ng.load(sys.argv[1])
for _ in range(64):
    tempfile.mkstemp(dir=sys.argv[2])
for _ in range(3):
    try:
        tvm_ffi.get_global_func("ffi.Module.load_from_file.so")("/nowhere.so", "so")
    except RuntimeError:
        continue
    raise SystemExit("it loaded")
"""


def test_an_error_s_backtrace_opens_no_other_file(toy: Any, tmp_path: Path) -> None:
    """It opens loaded libraries by their names; empty files have their old numbers now."""
    done = subprocess.run(
        [sys.executable, "-c", _OTHER_FILES, str(toy.artifact("float32")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
