"""Tensors on CUDA devices without a framework: made, filled and read through the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import tvm_ffi

from normgraph import cuda_memory, dlpack_types
from normgraph.cuda import DriverError
from normgraph.errors import DeviceError
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.signature import Shape

_STORED = {"bfloat16": np.dtype("uint16")}
# Any address that is not null: kernels do not touch what is not requested.
_NOWHERE = 256


def owned_tensor(shape: Shape, dtype: str, device: int = 0) -> Any:
    """A new tvm_ffi.Tensor of uninitialised memory on a device. Raises DeviceError."""
    try:
        return tvm_ffi.from_dlpack(cuda_memory.Memory(shape, *_type(dtype), device))
    except DriverError as error:
        raise DeviceError(
            f"an array of shape {shape} cannot be allocated on cuda:{device}: {error}. Free memory"
            f" there, or pass arrays in out=."
        ) from None


@lru_cache(maxsize=256)
def placeholder(rank: int, dtype: str, device: int) -> Any:
    """A tvm_ffi.Tensor without memory, for an output that is not requested."""
    memory = cuda_memory.Memory((1,) * rank, *_type(dtype), device, _NOWHERE)
    return tvm_ffi.from_dlpack(memory)


def tensor_of(array: AnyArray, dtype: str, device: int = 0) -> Any:
    """A new tvm_ffi.Tensor with these values; bfloat16 comes as its bits."""
    tensor = owned_tensor(array.shape, dtype, device)
    write(tensor, array, dtype)
    return tensor


def write(tensor: Any, array: AnyArray, dtype: str) -> None:
    """Copy values into a tensor, in the order of the current stream; bfloat16 comes as its bits.

    Raises DeviceError.
    """
    values = np.ascontiguousarray(array, _STORED.get(dtype, np.dtype(dtype)))
    device = tensor.device.index
    if values.nbytes:
        with _copying(device) as stream:
            cuda_memory.upload(tensor.data_ptr(), values.ctypes.data, values.nbytes, device, stream)


def memory_view(tensor: Any, dtype: str) -> AnyArray:
    """A copy of a tensor's values on the host; bfloat16 as its bits, uint16.

    The values are those after what the current stream has to do before. Raises DeviceError.
    """
    values: AnyArray = np.empty(tuple(tensor.shape), _STORED.get(dtype, np.dtype(dtype)))
    device = tensor.device.index
    if values.nbytes:
        with _copying(device) as stream:
            cuda_memory.download(
                values.ctypes.data, tensor.data_ptr(), values.nbytes, device, stream
            )
    return values


@contextlib.contextmanager
def _copying(device: int) -> Iterator[int]:
    """The device's current stream, on which kernels run too."""
    try:
        yield int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", device)))
    except DriverError as error:
        raise DeviceError(
            f"values cannot be copied to or from cuda:{device}: {error}. While a CUDA graph is"
            f" captured nothing can be: a copy waits for its stream. At other times it is work"
            f" from before on the device that failed."
        ) from None


def _type(dtype: str) -> tuple[int, int]:
    if dtype == "bfloat16":
        return dlpack_types.BFLOAT, 16
    return dlpack_types.FLOAT, 8 * np.dtype(dtype).itemsize
