"""Any other DLPack CPU array. Outputs come as tvm_ffi.Tensor, which every DLPack library reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tvm_ffi

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime import dlpack
from normgraph.runtime.adapters import View
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.signature import Shape

noun = "DLPack array"
notes_writes = False


def native_dtypes(names: Sequence[str], seen: Sequence[Any] = ()) -> tuple[Any, ...]:
    return tuple(None for _ in names)


def kernel_arguments(names: Sequence[str]) -> None:
    """None of them passes `ready`."""


def ready(arrays: Sequence[Any], dtypes: Sequence[Any]) -> tuple[tuple[Shape, ...], bool] | None:
    """None: these arrays take the long path, whose cost is small beside a DLPack import."""
    return None


def writable(array: Any, dtype: Any, shape: Shape, others: Sequence[Any], owned: bool) -> bool:
    return False


def empty(shapes: Iterable[Shape], dtypes: Iterable[str]) -> list[Any]:
    return [dlpack.owned_tensor(*pair) for pair in zip(shapes, dtypes, strict=True)]


empty_large = empty


def has_zero(array: Any) -> bool:
    return True


def view(array: Any, where: str) -> View:
    device_type, device_id = array.__dlpack_device__()
    if device_type != dlpack.CPU:
        raise ArgumentError(
            f"{where} must be on the CPU, but it is on DLPack device {int(device_type)}:"
            f"{device_id}. Copy it to the CPU, or build an artifact for that device."
        )
    if isinstance(array, tvm_ffi.Tensor):
        tensor = array
    else:
        try:
            tensor = tvm_ffi.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentTypeError(
                f"{where} ({type(array).__name__}) cannot be exported through DLPack: {error}."
                f" Convert it to a numpy array or a torch tensor."
            ) from None
    # Other producers may share memory that must not be written, and cannot say so.
    return view_of(tensor, writable=isinstance(array, tvm_ffi.Tensor))


def view_of(tensor: Any, *, writable: bool) -> View:
    """The view of a tvm_ffi.Tensor, on any device."""
    dtype = str(tensor.dtype)
    itemsize = max(tensor.dtype.itemsize, 1)
    defect = None
    if not tensor.is_contiguous():
        defect = f"strided (strides {tensor.strides})"
    elif tensor.data_ptr() % itemsize:
        defect = f"not aligned to its element size ({itemsize} bytes)"
    return View(
        array=tensor,
        shape=tuple(tensor.shape),
        dtype=dtype,
        defect=defect,
        writable=writable,
        address=tensor.data_ptr(),
        nbytes=tensor.numel() * itemsize,
        device=tensor.device.index,
    )


def copy(view_: View) -> View:
    dense = dlpack.owned_tensor(view_.shape, view_.dtype)
    np.copyto(dlpack.memory_view(dense, view_.dtype), dlpack.memory_view(view_.array, view_.dtype))
    return view(dense, "copy")


def kernel_argument(view_: View) -> Any:
    return view_.array


def lasting(view_: View) -> Any:
    return view_.array


def guards(arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
    """Nothing: a DLPack export holds its memory."""
    return []


def allocate(shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
    return view(dlpack.owned_tensor(shape, dtype), "output")


def scalar(value: float, dtype: str) -> Any:
    return tvm_ffi.from_dlpack(np.array(value, dtype))


def memory(view_: View) -> AnyArray:
    return dlpack.memory_view(view_.array, view_.dtype)


def written(arrays: Iterable[Any]) -> None:
    """tvm_ffi keeps no record of writes."""
