"""NumPy arrays, also bfloat16 ones, by ml_dtypes or another package that names its dtype so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy import ndarray

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime import dlpack
from normgraph.runtime.adapters import View
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.output_pool import Lease, pool
from normgraph.runtime.signature import Shape

noun = "numpy array"
notes_writes = False

# Bits of ndarray.flags.num: C-contiguous, aligned, writeable (NumPy exports no read-only memory).
READY = 0x1 | 0x100 | 0x400
OWNS = 0x4


def native_dtypes(names: Sequence[str], seen: Sequence[Any] = ()) -> tuple[Any, ...]:
    """bfloat16 is that of an array, or None: there is more than one dtype object of that name."""
    # Among arrays may be a plain number, for momentum.
    dtypes = [array.dtype for array in seen if isinstance(array, ndarray)]
    bfloat16 = next((dtype for dtype in dtypes if _name(dtype) == "bfloat16"), None)
    return tuple(bfloat16 if name == "bfloat16" else np.dtype(name) for name in names)


def ready(arrays: Sequence[Any], dtypes: Sequence[Any]) -> tuple[tuple[Shape, ...], bool] | None:
    if len(arrays) != len(dtypes):
        return None
    shapes = []
    common = -1
    for array, dtype in zip(arrays, dtypes):  # noqa: B905  # the lengths were compared above
        if type(array) is not ndarray or array.dtype is not dtype:
            return None
        common &= array.flags.num
        shapes.append(array.shape)
    if common & READY != READY:
        return None
    return tuple(shapes), common & OWNS != 0 or owner_count(arrays) > 0


def writable(array: Any, dtype: Any, shape: Shape, others: Sequence[Any], owned: bool) -> bool:
    if type(array) is not ndarray or array.dtype is not dtype or array.shape != shape:
        return False
    flags = array.flags.num
    if flags & READY != READY:
        return False
    if owned and not flags & OWNS:
        return owner_count((array, *others)) == 1 + len(others)
    if owned:
        # Arrays that each own their memory share none, unless they are one array.
        for other in others:  # noqa: SIM110  # a generator would double the cost of this check
            if other is array:
                return False
        return True
    return not any(np.may_share_memory(array, other) for other in others)


def owner_count(arrays: Iterable[Any]) -> int:
    """How many pieces of memory these arrays lie in, of their own or of the pool; else 0."""
    owners = set()
    for array in arrays:
        if array.flags.num & OWNS:
            owners.add(id(array))
        else:
            base = array.base
            if base.__class__ is ndarray:  # what the pool gives for bfloat16 is a view
                base = base.base
            if base.__class__ is not Lease:
                return 0
            owners.add(id(base))
    return len(owners)


def empty(shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
    return list(map(np.empty, shapes, dtypes))


def empty_large(shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
    return list(map(pool.empty, shapes, dtypes))


def kernel_arguments(names: Sequence[str]) -> Callable[[Sequence[Any]], list[Any]] | None:
    """DLPack has bfloat16, but NumPy does not export it."""
    if "bfloat16" not in names:
        return None
    kept = tuple(names)

    def made(arrays: Sequence[Any]) -> list[Any]:
        return [
            dlpack.kernel_tensor(array, name) if array.__class__ is ndarray else array
            for array, name in zip(arrays, kept)  # noqa: B905  # the lengths are equal
        ]

    return made


def has_zero(array: AnyArray) -> bool:
    return not array.all()


@lru_cache(maxsize=64)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def view(array: Any, where: str) -> View:
    if type(array) is not ndarray and isinstance(array, np.ma.MaskedArray):
        raise ArgumentTypeError(
            f"{where} is a masked array, and kernels know no mask. Pass array.filled(value)."
        )
    plain: AnyArray = np.asarray(array)
    address = plain.__array_interface__["data"][0]
    if not plain.dtype.isnative:
        raise ArgumentTypeError(
            f"{where} has byte order {plain.dtype.byteorder!r} ({plain.dtype}), but kernels need"
            f' the native one. Pass array.astype(array.dtype.newbyteorder("=")).'
        )
    flags = plain.flags
    defect = None
    if not flags.c_contiguous:
        defect = f"strided (strides {plain.strides} bytes)"
    elif not flags.aligned or address % max(plain.itemsize, 1):
        defect = f"not aligned to its element size ({plain.itemsize} bytes)"
    return View(
        array=plain,
        shape=plain.shape,
        dtype=_name(plain.dtype),
        defect=defect,
        writable=flags.writeable,
        address=address,
        nbytes=plain.nbytes,
    )


def copy(view_: View) -> View:
    dense = pool.empty(view_.shape, view_.array.dtype)
    np.copyto(dense, view_.array)
    return view(dense, "copy")


def kernel_argument(view_: View) -> Any:
    return dlpack.kernel_tensor(view_.array, view_.dtype)


def lasting(view_: View) -> Any:
    return dlpack.lasting_tensor(memory(view_), view_.dtype)


def guards(arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
    """Nothing: what made an array good cannot change but for its memory, which is held."""
    return []


def allocate(shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
    if dtype == "bfloat16":
        found = next((item.array.dtype for item in inputs if item.dtype == dtype), None)
        if found is None:
            raise ArgumentError(
                "a bfloat16 output without a bfloat16 input needs an array in out=."
            )
    else:
        found = np.dtype(dtype)
    array = pool.empty(shape, found)
    return View(array, shape, dtype, None, True, 0, array.nbytes)


def scalar(value: float, dtype: str) -> AnyArray:
    return np.array(value, dtype)


def memory(view_: View) -> AnyArray:
    array: AnyArray = view_.array
    return array.view(np.uint16) if view_.dtype == "bfloat16" else array


def written(arrays: Iterable[Any]) -> None:
    """NumPy keeps no record of writes."""
