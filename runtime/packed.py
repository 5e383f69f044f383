"""An artifact in one file: a zip archive of its directory, read where it is.

Nothing is extracted: the files are read into memory one by one, so no name in the archive reaches
the file system, nothing is left behind, and a full or read-only disk makes no difference. What may
come out of an archive is bounded by what it may declare: its number of files, its size and the
sizes the manifest states.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from normgraph.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound
from normgraph.runtime.files import Folder, Mark

# An artifact has some ten files. A list of so many is read before it is known what is in it.
_MOST_FILES = 256
_LONGEST_LIST = 2**17
# What the files may grow to, together: kernels shrink to a third, and a bomb to a thousandth.
_MOST_GROWTH, _ALWAYS_ALLOWED = 20, 2**20

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")
# The record at the end of every archive: signature, numbers of disks, files on this disk and in
# all, size and offset of the list of files, length of a comment.
_END = struct.Struct("<4s4H2LH")
_LOCAL_HEADER = 30

# What zipfile raises for an archive that is damaged or made to confuse it.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)


class Packed(Folder):
    """The files in an archive, read as those of a directory are.

    It is opened anew for each, so another thread, a child after a fork and a writer that replaces
    the archive do not disturb: files of two archives do not fit one manifest.
    """

    def read(self, name: str, most: int) -> tuple[bytes, int, Mark]:
        """As for a directory; ArtifactCorrupt also where the archive is damaged or not safe."""
        with _opened(self.path) as (archive, mark):
            try:
                entry = archive.getinfo(name)
            except KeyError:
                raise ArtifactNotFound(
                    f"{self.path}: there is no {name} in the archive. Pack the artifact again."
                ) from None
            with archive.open(entry) as stream:
                return stream.read(min(most, entry.file_size)), entry.file_size, mark


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, Mark]]:
    """The archive, once nothing about it is doubtful."""
    try:
        # Opening a pipe would otherwise wait for somebody to write into it.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise _corrupt(path, "it is no plain file")
            _check_end(path, file, status.st_size)
            with zipfile.ZipFile(file) as archive:
                _check_entries(path, archive, status.st_size)
                yield archive, (status.st_ino, status.st_mtime_ns)
    except ArtifactError:  # of which one is a FileNotFoundError
        raise
    except FileNotFoundError:
        raise ArtifactNotFound(f"{path}: there is no such file. Check the path.") from None
    except _DAMAGE as error:
        raise _corrupt(path, str(error)) from None
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror or error}. Check the path and what you may"
            f" read."
        ) from None


def _check_end(path: Path, file: IO[bytes], size: int) -> None:
    """The list of files lies right before the end of the file, and is short."""
    file.seek(max(0, size - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise _corrupt(path, "it does not end as an archive does: it was cut or added to")
    _, disk, first, here, count, length, offset, comment = _END.unpack(end)
    if disk or first or comment or here != count:
        raise _corrupt(path, "it has a comment, or is one of several")
    if count > _MOST_FILES or length > _LONGEST_LIST:
        raise _corrupt(path, f"it lists {count} files, and an artifact has some ten")
    if offset + length + _END.size != size:
        raise _corrupt(path, "its list of files is not where it has to be")


def _check_entries(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Plain files with plain names, each of its own bytes, that do not grow beyond bounds."""
    names: set[str] = set()
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name = entry.filename
        mode = entry.external_attr >> 16
        if not _NAME.fullmatch(name) or entry.orig_filename != name:
            raise _corrupt(path, f"{name!r:.80} is no plain file name")
        if name in names:
            raise _corrupt(path, f"{name} is in it twice")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _corrupt(path, f"{name} is no plain file")
        if entry.flag_bits & 1:
            raise _corrupt(path, f"{name} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _corrupt(path, f"{name} is compressed by method {entry.compress_type}")
        if entry.header_offset < end:
            raise _corrupt(path, f"{name} shares bytes with another file")
        end = entry.header_offset + _LOCAL_HEADER + len(name) + entry.compress_size
        names.add(name)
    total = sum(entry.file_size for entry in archive.infolist())
    if end > size or total > _ALWAYS_ALLOWED + _MOST_GROWTH * size:
        raise _corrupt(path, f"its {size} bytes would become {total}")


def _corrupt(path: Path, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"{path}: expected a packed artifact, but {what.rstrip('.')}. Pack the artifact again, or"
        f" pass the directory of one."
    )
