"""The arrays of a self-test file, an .npz archive, each looked at before memory is given to it."""

from __future__ import annotations

import io
import math
import re

import numpy as np

from normgraph.runtime import archive
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.files import short
from normgraph.runtime.manifest import MOST_TESTED

# Of one array: the largest tensor of a self-test in float64, and room for the header.
_MOST_BYTES = 8 * MOST_TESTED + 2**16
# Of all that is read: a build stores one tensor whole, and of the others a pattern.
_MOST_READ = 4 * _MOST_BYTES

# The header of an .npy file as numpy.save writes it for numbers in this machine's byte order:
# NEP 1, version 1.0. Two bytes of the length of the text come before it.
_MAGIC = b"\x93NUMPY\1\0"
_TEXT = re.compile(
    rb"\{'descr': '([<|][fiu][1248])', 'fortran_order': (False|True),"
    rb" 'shape': \(([0-9, ]{0,200})\), \} *\n"
)


class Vectors:
    """The arrays by name. Reading raises one of `archive.DAMAGE`, KeyError for one not there."""

    def __init__(self, content: bytes) -> None:
        self._archive = archive.opened(io.BytesIO(content), len(content))
        self._read = 0

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.NameToInfo

    def __getitem__(self, name: str) -> AnyArray:
        entry = self._archive.getinfo(f"{name}.npy")
        if entry.file_size > _MOST_BYTES:
            raise ValueError(
                f"{entry.filename} has {entry.file_size} bytes, and {_MOST_BYTES} are the most"
            )
        self._read += entry.file_size
        if self._read > _MOST_READ:
            raise ValueError(f"more than {_MOST_READ} bytes of arrays are asked for")
        with self._archive.open(entry) as stream:
            return _array(stream.read(entry.file_size), entry.filename)


def _array(content: bytes, name: str) -> AnyArray:
    """The array of an .npy file.

    NumPy's own reader believes the shape in the header, and evaluates the text of it as Python.
    """
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(content[start - 2 : start], "little")
    header = _TEXT.fullmatch(content[start:end])
    if not content.startswith(_MAGIC) or header is None:
        raise ValueError(f"{name} is no .npy file of numbers: {short(content[:end], 100)}")
    dtype = np.dtype(header[1].decode("ascii"))
    shape = tuple(int(size) for size in re.findall(rb"[0-9]+", header[3]))
    size = len(content) - end
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} is said to have shape {short(shape)}, and has {size} bytes")
    flat: AnyArray = np.frombuffer(content, dtype, offset=end, count=math.prod(shape))
    return flat.reshape(shape, order="F" if header[2] == b"True" else "C")
