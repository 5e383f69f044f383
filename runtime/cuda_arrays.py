"""Tensors on CUDA devices without a framework: made, filled and read through the driver."""

from __future__ import annotations

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
    """Copy values into a tensor; bfloat16 comes as its bits."""
    values = np.ascontiguousarray(array, _STORED.get(dtype, np.dtype(dtype)))
    if values.nbytes:
        cuda_memory.upload(
            tensor.data_ptr(), values.ctypes.data, values.nbytes, tensor.device.index
        )


def memory_view(tensor: Any, dtype: str) -> AnyArray:
    """A copy of a tensor's values on the host; bfloat16 as its bits, uint16."""
    values: AnyArray = np.empty(tuple(tensor.shape), _STORED.get(dtype, np.dtype(dtype)))
    if values.nbytes:
        cuda_memory.download(
            values.ctypes.data, tensor.data_ptr(), values.nbytes, tensor.device.index
        )
    return values


def _type(dtype: str) -> tuple[int, int]:
    if dtype == "bfloat16":
        return dlpack_types.BFLOAT, 16
    return dlpack_types.FLOAT, 8 * np.dtype(dtype).itemsize
