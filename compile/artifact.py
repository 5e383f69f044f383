"""Writing an artifact directory so that a reader sees the old or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normgraph.compile.locks import locked
from normgraph.errors import CompileError

FORMAT = "normgraph-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# The versions of tvm_ffi whose C interface libraries are made for; pyproject.toml asks for the same
# range.
LOADER_RANGE = {"from": "0.1.15", "below": "0.2"}

_LOCK = ".lock"
_UNFINISHED = ".writing-"
# The names `Draft` gives files, with the hash in them.
OWN_NAME = re.compile(
    r"graph-[a-z_]+-[0-9a-f]{12}\.onnx|kernels-[\w.+-]+-[0-9a-f]{12}\.s?o"
    r"|selftest-[0-9a-f]{12}\.npz",
    re.ASCII,
)


@dataclass
class Draft:
    """An artifact in memory: its files by name, and its manifest but for the digest."""

    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def add(self, stem: str, suffix: str, content: bytes) -> dict[str, Any]:
        """Add one file; returns its manifest entry (file, sha256, size)."""
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{stem}-{sha256[:12]}{suffix}"
        self.files[name] = content
        return {"file": name, "sha256": sha256, "size": len(content)}


def write(draft: Draft, root: Path) -> None:
    """Make the directory hold the artifact. Raises CompileError as `writing` does."""
    with writing(root) as writer:
        for name, content in draft.files.items():
            writer.put(name, content)
        writer.commit(draft.manifest)


class Writer:
    """Puts an artifact into a directory, while other builds are kept out of it.

    1. Every file is written under a name with a hash of its content, beside what is there, and
       reaches the disk. What is there already is not touched.
    2. `commit` has the names reach the disk, writes the manifest beside the old one and has it
       reach the disk.
    3. One rename puts it in the place of the old one. Before it readers find the old artifact,
       after it the new one.
    4. The files of earlier builds that the manifest does not name are removed. A reader that comes
       to one of them finds it missing, and that there is a new manifest.

    A build that is killed, or finds the disk full, before 3 leaves the old artifact as it was. What
    it has written is removed, at the latest by a later build.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.named: set[str] = set()
        self._fresh: list[Path] = []
        self._committing = False

    def add(self, stem: str, suffix: str, content: bytes) -> dict[str, Any]:
        """Write one file; returns its manifest entry (file, sha256, size)."""
        entry = Draft().add(stem, suffix, content)
        self.put(entry["file"], content)
        return entry

    def put(self, name: str, content: bytes) -> None:
        """Write one file under a name that a `Draft` gave it."""
        self.named.add(name)
        file = self.root / name
        with contextlib.suppress(OSError):
            if file.read_bytes() == content:
                return
        with self._unfinished(content, 0o755 if name.endswith(".so") else 0o644) as temporary:
            if not file.exists():
                self._fresh.append(file)
            os.replace(temporary, file)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest with its digest, then clear what is stale."""
        whole = {**manifest, "digest": digest(manifest)}
        text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
        _sync_folder(self.root)
        with self._unfinished(text.encode("utf-8"), 0o644) as temporary:
            # From here on nothing is discarded: an interrupt may come just after the rename.
            self._committing = True
            os.replace(temporary, self.root / MANIFEST)
        _sync_folder(self.root)
        # What cannot be removed does no harm.
        with contextlib.suppress(OSError):
            for file in list(self.root.iterdir()):
                if OWN_NAME.fullmatch(file.name) and file.name not in self.named:
                    with contextlib.suppress(OSError):
                        os.unlink(file)

    def discard(self) -> None:
        """Give back the room of what was not committed; on a full disk it is needed."""
        for file in [] if self._committing else self._fresh:
            with contextlib.suppress(OSError):
                os.unlink(file)

    @contextlib.contextmanager
    def _unfinished(self, content: bytes, mode: int) -> Iterator[str]:
        """A file with this content that has reached the disk, to be renamed or else removed."""
        handle, temporary = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.root)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            yield temporary
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def writing(root: Path) -> Iterator[Writer]:
    """A `Writer` for the directory, made if need be, with other builds into it kept out.

    Raises CompileError where the directory cannot be made or written to.
    """
    try:
        made = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        if made:
            _sync_folder(root.parent)
        with locked(root / _LOCK):
            for file in root.glob(f"{_UNFINISHED}*"):  # of builds that were killed
                file.unlink()
            writer = Writer(root)
            try:
                yield writer
            except BaseException:
                writer.discard()
                raise
    except OSError as error:
        raise CompileError(
            f"{root}: the artifact cannot be written: {error.strerror or error}. Give a directory "
            "that can be made and written to, with room for it."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON without its digest."""
    text = json.dumps(dict(manifest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
