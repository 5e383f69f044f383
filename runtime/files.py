"""Reading the files of an artifact: each once, whole, so that what was checked is what is used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normgraph.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound

REBUILD = "Build the artifact again."

# What an artifact's files may be called: nothing that leads to another folder or is hidden.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")

# All files of an artifact together; libraries have some hundred kilobytes.
_MOST_BYTES = 2**30

# Which file it was that was read: its inode, and when it was last changed.
Mark = tuple[int, int]


def short(value: object, most: int = 60) -> str:
    """A value for a message, however long it is."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 16, between: str = ", ") -> str:
    """Names for a message, however many they are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return between.join(every[:most]) + more


class Folder:
    """A directory with an artifact's files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, name: str) -> Path:
        """Where a file is, for messages."""
        return self.path / name

    def read(self, name: str, most: int) -> tuple[bytes, int, Mark]:
        """The content of a file up to `most` bytes, its size, and which file it was.

        Raises ArtifactNotFound where it is not there, ArtifactCorrupt where it is no plain file,
        ArtifactError where the system does not let it be read.
        """
        file = self.place(name)
        try:
            # Opening a pipe would otherwise wait for somebody to write into it.
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(opened)
                if not stat.S_ISREG(status.st_mode):
                    raise ArtifactCorrupt(
                        f"{file}: expected a plain file, and it is none. {REBUILD}"
                    )
                with open(opened, "rb", closefd=False) as stream:
                    content = stream.read(min(most, status.st_size))
            finally:
                os.close(opened)
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactNotFound(f"{file}: there is no such file. {REBUILD}") from None
        except OSError as error:
            raise ArtifactError(
                f"{file}: cannot be read: {error.strerror or error}. Check the path and what you"
                f" may read."
            ) from None
        except MemoryError:
            raise ArtifactError(
                f"{file}: there is not enough memory to read {min(most, status.st_size)} bytes."
                f" Give the process more."
            ) from None
        except ValueError as error:  # a character that no file name has
            raise ArtifactNotFound(f"{str(file)!r}: {error}. Check the path.") from None
        return content, status.st_size, (status.st_ino, status.st_mtime_ns)


@dataclass(frozen=True)
class StoredFile:
    """One file as the manifest lists it."""

    folder: Folder
    name: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is, for messages."""
        return self.folder.place(self.name)

    def read(self) -> bytes:
        """The content. Raises ArtifactCorrupt where it is not what was written."""
        content, size, _ = self.folder.read(self.name, self.size)
        if size != self.size:
            raise ArtifactCorrupt(
                f"{self.path}: expected {self.size} bytes, but the file has {size}. {REBUILD}"
            )
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ArtifactCorrupt(
                f"{self.path}: the content is not what was written (its sha256 differs). {REBUILD}"
            )
        return content


class Contents:
    """What the files hold that a manifest names: each is read and hashed once, however often it is
    named, and all together have a bound.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[StoredFile, bytes]] = {}
        self._total = 0

    def of(self, stored: StoredFile) -> bytes:
        """The content of a file. Raises as `StoredFile.read` does."""
        known = self._known.get(stored.name)
        if known is None:
            self._total += stored.size
            if self._total > _MOST_BYTES:
                raise ArtifactCorrupt(
                    f"{stored.path}: the files up to this one have {self._total} bytes by the"
                    f" manifest, and {_MOST_BYTES} are the most. {REBUILD}"
                )
            known = self._known[stored.name] = stored, stored.read()
        if known[0] != stored:
            raise ArtifactCorrupt(
                f"{stored.path}: the manifest names this file with two sizes or hashes. {REBUILD}"
            )
        return known[1]
