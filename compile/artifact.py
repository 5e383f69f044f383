"""Writing an artifact directory so that a reader sees the old or the new one, whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normgraph.errors import CompileError

FORMAT = "normgraph-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# The versions of tvm_ffi whose C interface libraries are made for; pyproject.toml asks for the same
# range.
LOADER_RANGE = {"from": "0.1.15", "below": "0.2"}

_LOCK = ".lock"
# The names `Writer` gives files, with the hash in them, and those of files it did not finish.
_OWN = re.compile(
    r"(graph-[a-z_]+-[0-9a-f]{12}\.onnx|kernels-.+-[0-9a-f]{12}\.s?o|selftest-[0-9a-f]{12}\.npz"
    r"|\.writing-.+)"
)


class Writer:
    """Adds files under content-hashed names; `commit` makes them the artifact.

    Files are written beside what is there and never rewritten. Replacing manifest.json by one
    rename is the commit; only then the files of earlier builds that it does not name are removed. A
    build that is killed before leaves the old artifact as it was.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.named: set[str] = set()

    def add(self, stem: str, suffix: str, content: bytes) -> dict[str, Any]:
        """Write one file; returns its manifest entry (file, sha256, size)."""
        digest = hashlib.sha256(content).hexdigest()
        name = f"{stem}-{digest[:12]}{suffix}"
        self._write(name, content)
        self.named.add(name)
        return {"file": name, "sha256": digest, "size": len(content)}

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest with its digest, then clear what is stale."""
        whole = {**manifest, "digest": digest(manifest)}
        text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
        self._write(MANIFEST, text.encode("utf-8"))
        self._sync_folder()
        for file in list(self.root.iterdir()):
            if _OWN.fullmatch(file.name) and file.name not in self.named:
                file.unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=self.root)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o755 if name.endswith(".so") else 0o644)
            os.replace(temporary, self.root / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _sync_folder(self) -> None:
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def writing(root: Path) -> Iterator[Writer]:
    """A `Writer` for the directory, made if need be, with other builds into it kept out.

    Raises CompileError where the directory cannot be made or written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / _LOCK, "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Writer(root)
    except OSError as error:
        raise CompileError(
            f"{root}: the artifact cannot be written: {error.strerror or error}. Give a directory "
            "that can be made and written to, with room for it."
        ) from error


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON without its digest."""
    text = json.dumps(dict(manifest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
