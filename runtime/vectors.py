"""The arrays of a self-test file, an .npz archive, each looked at before memory is given to it."""

from __future__ import annotations

import io
import math

import numpy as np

from normgraph.runtime import archive
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.manifest import MOST_TESTED

# Of one array: the largest tensor of a self-test in float64, and room for the header.
_MOST_BYTES = 8 * MOST_TESTED + 2**16


class Vectors:
    """The arrays by name. Reading raises one of `archive.DAMAGE`, KeyError for one not there."""

    def __init__(self, content: bytes) -> None:
        self._archive = archive.opened(io.BytesIO(content), len(content))

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.NameToInfo

    def __getitem__(self, name: str) -> AnyArray:
        entry = self._archive.getinfo(f"{name}.npy")
        if entry.file_size > _MOST_BYTES:
            raise ValueError(
                f"{entry.filename} has {entry.file_size} bytes, and {_MOST_BYTES} are the most"
            )
        with self._archive.open(entry) as stream:
            content = io.BytesIO(stream.read(entry.file_size))
        return _array(content, entry.filename)


def _array(content: io.BytesIO, name: str) -> AnyArray:
    """The array of an .npy file. NumPy's own reader believes the shape in the header."""
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name} is not of version 1.0 of the format of .npy files")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(content)
    rest = content.getbuffer()[content.tell() :]
    if dtype.kind not in "fiu" or not dtype.isnative:
        raise ValueError(f"{name} holds {dtype}, and numbers are expected")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{name} is said to have shape {shape}, and has {len(rest)} bytes")
    flat: AnyArray = np.frombuffer(rest, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")
