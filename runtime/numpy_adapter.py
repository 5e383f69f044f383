"""NumPy arrays, bfloat16 ones (by ml_dtypes or another package that names its dtype so) included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime import dlpack
from normgraph.runtime.adapters import View
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.signature import Shape

noun = "numpy array"
empty = np.empty

# Bits of ndarray.flags.num: C-contiguous, aligned, writeable (NumPy exports no read-only memory).
_READY = 0x1 | 0x100 | 0x400
_OWNS = 0x4


def native_dtypes(names: Sequence[str]) -> tuple[Any, ...]:
    """bfloat16 is None: there is more than one dtype object of that name."""
    return tuple(None if name == "bfloat16" else np.dtype(name) for name in names)


def ready(arrays: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Shape, ...] | None:
    if len(arrays) != len(dtypes):
        return None
    shapes = []
    for array, dtype in zip(arrays, dtypes):  # noqa: B905  # the lengths were compared above
        if (
            type(array) is not np.ndarray
            or array.dtype is not dtype
            or array.flags.num & _READY != _READY
        ):
            return None
        shapes.append(array.shape)
    return tuple(shapes)


def disjoint(outputs: Sequence[Any], inputs: Sequence[Any]) -> bool:
    for position, output in enumerate(outputs):
        owns = output.flags.num & _OWNS
        for other in (*inputs, *outputs[:position]):
            if output is other:
                return False
            # Two arrays that each own their memory cannot share it.
            if not (owns and other.flags.num & _OWNS) and np.may_share_memory(output, other):
                return False
    return True


def view(array: Any, where: str) -> View:
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentTypeError(
            f"{where} is a masked array, and kernels know no mask. Pass array.filled(value)."
        )
    plain: AnyArray = np.asarray(array)
    if not plain.dtype.isnative:
        raise ArgumentTypeError(
            f"{where} has byte order {plain.dtype.byteorder!r} ({plain.dtype}), but kernels need"
            f' the native one. Pass array.astype(array.dtype.newbyteorder("=")).'
        )
    flags = plain.flags
    defect = None
    if not flags.c_contiguous:
        defect = f"strided (strides {plain.strides} bytes)"
    elif not flags.aligned or plain.__array_interface__["data"][0] % max(plain.itemsize, 1):
        defect = f"not aligned to its element size ({plain.itemsize} bytes)"
    return View(
        array=plain,
        shape=plain.shape,
        dtype=plain.dtype.name,
        defect=defect,
        writable=flags.writeable,
        address=plain.__array_interface__["data"][0],
        nbytes=plain.nbytes,
    )


def copy(view_: View) -> View:
    return view(np.array(view_.array, order="C", copy=True, subok=False), "copy")


def kernel_argument(view_: View) -> Any:
    return dlpack.kernel_tensor(view_.array, view_.dtype)


def allocate(shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
    found: Any = dtype
    if dtype == "bfloat16":
        found = next((item.array.dtype for item in inputs if item.dtype == dtype), None)
        if found is None:
            raise ArgumentError(
                "a bfloat16 output without a bfloat16 input needs an array in out=."
            )
    return view(np.empty(shape, found), "output")


def scalar(value: float, dtype: str) -> AnyArray:
    return np.array(value, dtype)


def memory(view_: View) -> AnyArray:
    array: AnyArray = view_.array
    return array.view(np.uint16) if view_.dtype == "bfloat16" else array


def written(arrays: Sequence[Any]) -> None:
    """NumPy keeps no record of writes."""
