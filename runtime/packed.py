"""An artifact in one file: a zip archive of its directory, read where it is.

Nothing is extracted: the files are read into memory one by one, so no name in the archive reaches
the file system, nothing is left behind, and a full or read-only disk makes no difference. What may
come out of an archive is bounded by what it may declare: its number of files, its size and the
sizes the manifest states.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normgraph.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound
from normgraph.runtime import archive as archives
from normgraph.runtime.files import Folder, Mark

# What the files may grow to, together: kernels shrink to a third, and a bomb to a thousandth.
_MOST_GROWTH, _ALWAYS_ALLOWED = 20, 2**20


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
            with archives.opened(file, status.st_size) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
                if total > _ALWAYS_ALLOWED + _MOST_GROWTH * status.st_size:
                    raise _corrupt(path, f"its {status.st_size} bytes would become {total}")
                yield archive, (status.st_ino, status.st_mtime_ns)
    except ArtifactError:  # of which one is a FileNotFoundError
        raise
    except FileNotFoundError:
        raise ArtifactNotFound(f"{path}: there is no such file. Check the path.") from None
    except archives.DAMAGE as error:
        raise _corrupt(path, str(error)) from None
    except MemoryError:
        raise ArtifactError(
            f"{path}: there is not enough memory to read it. Give the process more."
        ) from None
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror or error}. Check the path and what you may"
            f" read."
        ) from None


def _corrupt(path: Path, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"{path}: expected a packed artifact, but {what.rstrip('.')}. Pack the artifact again, or"
        f" pass the directory of one."
    )
