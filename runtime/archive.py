"""Zip archives that others may have written: what is doubtful about one is refused before use.

Two lists of files, files that share bytes, names that lead elsewhere or end early, encryption:
programs read such archives differently from each other. And what a few bytes may grow to is bounded
by what the reader says.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from typing import IO

from normgraph.runtime.files import NAME, short

# A list of so many is read before it is known what is in it.
MOST_FILES = 256
_LONGEST_LIST = 2**17

# The record at the end of every archive: signature, numbers of disks, files on this disk and in
# all, size and offset of the list of files, length of a comment. Before it may be the place of
# another one, for large archives.
_END = struct.Struct("<4s4H2LH")
_LARGE_LOCATOR_SIZE = 20
# What stands before each file: signature, version, flags, method, time, date, checksum, sizes,
# lengths of the name and of extra fields.
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1

# What zipfile raises for an archive that is damaged or made to confuse it.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def opened(file: IO[bytes], size: int) -> zipfile.ZipFile:
    """The archive in a file of `size` bytes. Raises one of DAMAGE where something is doubtful."""
    count = _check_end(file, size)
    archive = zipfile.ZipFile(file)
    try:
        _check_entries(file, archive, size, count)
    except BaseException:
        archive.close()
        raise
    return archive


def _check_end(file: IO[bytes], size: int) -> int:
    """The list of files lies right before the end of the file, and is short; how many it has."""
    before = min(size, _LARGE_LOCATOR_SIZE + _END.size)
    file.seek(size - before)
    end = file.read(before)
    locator, end = end[: -_END.size], end[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise ValueError("it does not end as an archive does: it was cut or added to")
    _, disk, first, here, count, length, offset, comment = _END.unpack(end)
    if disk or first or comment or here != count:
        raise ValueError("it has a comment, or is one of several")
    if count > MOST_FILES or length > _LONGEST_LIST:
        raise ValueError(f"it lists {count} files, and {MOST_FILES} are the most")
    if offset + length + _END.size != size:
        raise ValueError("its list of files is not where it has to be")
    if locator.startswith(b"PK\6\7"):
        raise ValueError("it has a second list of files")
    return int(count)


def _check_entries(file: IO[bytes], archive: zipfile.ZipFile, size: int, count: int) -> None:
    """Plain files with plain names, each of its own bytes."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if len(entries) != count:
        raise ValueError(f"it lists {len(entries)} files, and its end says {count}")
    names: set[str] = set()
    end = 0
    for entry in entries:
        name = entry.filename
        if not NAME.fullmatch(name) or entry.orig_filename != name:
            raise ValueError(f"{short(entry.orig_filename)} is no plain file name")
        if name in names:
            raise ValueError(f"{name} is in it twice")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{name} is no plain file")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by method {entry.compress_type}")
        if entry.header_offset < end:
            raise ValueError(f"{name} shares bytes with another file")
        file.seek(entry.header_offset)
        _, _, flags, method, *_ = _LOCAL.unpack(file.read(_LOCAL.size))
        if (entry.flag_bits | flags) & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted")
        if method != entry.compress_type:
            raise ValueError(f"{name} is compressed in two ways")
        end = entry.header_offset + _LOCAL.size + len(name) + entry.compress_size
        names.add(name)
    if end > size:
        raise ValueError("its last file is cut")
