"""Passing memory to kernels where NumPy's own DLPack export refuses: bfloat16 and read-only arrays.

NumPy has no bfloat16 of its own and exports no read-only memory through DLPack, so such an array is
exported as writable 16-bit integers over the same memory, and the dtype in the capsule is set
before it is consumed. Nothing is copied; kernels do not write to their inputs.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from normgraph.dlpack_types import BFLOAT, UINT, DLTensor
from normgraph.runtime.output_pool import pool

AnyArray = npt.NDArray[Any]

CPU = 1  # kDLCPU

_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Capsule:
    """A DLPack producer of one capsule, whose dtype code it sets."""

    def __init__(self, capsule: Any, code: int) -> None:
        # A DLManagedTensor begins with its DLTensor.
        address = _get_pointer(capsule, b"dltensor")
        DLTensor.from_address(address).code = code
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


class _WritableMemory:
    """A read-only array's memory, offered as writable through the array interface."""

    def __init__(self, array: AnyArray) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._array = array  # keeps the memory alive


def kernel_tensor(array: AnyArray, dtype: str) -> Any:
    """What a kernel takes for a compact array, which may be read-only or of a bfloat16 dtype.

    The array itself where DLPack exports it as it is, else a tvm_ffi.Tensor of the same memory.
    """
    bfloat16 = dtype == "bfloat16"
    if array.flags.writeable and not bfloat16:
        return array
    exported: AnyArray = array.view(np.uint16) if bfloat16 else array
    if not exported.flags.writeable:
        exported = np.asarray(_WritableMemory(exported))
    if bfloat16:
        return tvm_ffi.from_dlpack(_Capsule(exported.__dlpack__(), BFLOAT))
    return exported


class _LastingMemory(_WritableMemory):
    """An array's memory, which NumPy does not resize as long as this is there."""

    def __init__(self, array: AnyArray) -> None:
        super().__init__(array)
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        # With refcheck=False, resize frees memory that others show, but not where one refers to
        # the array weakly.
        self._fixed = weakref.ref(owner)


def lasting_tensor(array: AnyArray, dtype: str) -> Any:
    """A tvm_ffi.Tensor of a compact array's memory, which stays there as long as the tensor does.

    bfloat16 comes as its bits; the array may be read-only.
    """
    exported: AnyArray = np.asarray(_LastingMemory(array))
    if dtype == "bfloat16":
        return tvm_ffi.from_dlpack(_Capsule(exported.__dlpack__(), BFLOAT))
    return tvm_ffi.from_dlpack(exported)


def owned_tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """A new tvm_ffi.Tensor of uninitialised memory, in the pool's where it is large."""
    array = pool.empty(shape, np.dtype("uint16" if dtype == "bfloat16" else dtype))
    if dtype == "bfloat16":
        return tvm_ffi.from_dlpack(_Capsule(array.__dlpack__(), BFLOAT))
    return tvm_ffi.from_dlpack(array)


def tensor_of(array: AnyArray, dtype: str) -> Any:
    """A new tvm_ffi.Tensor with these values; bfloat16 comes as its bits."""
    tensor = owned_tensor(array.shape, dtype)
    np.copyto(memory_view(tensor, dtype), array, casting="no")
    return tensor


def memory_view(tensor: Any, dtype: str) -> AnyArray:
    """A CPU tvm_ffi.Tensor's memory as a writable NumPy array; bfloat16 as its bits, uint16."""
    source = _Capsule(tensor.__dlpack__(), UINT) if dtype == "bfloat16" else tensor
    array: AnyArray = np.from_dlpack(source)
    # NumPy marks what comes in an unversioned capsule read-only, as it cannot tell.
    return array if array.flags.writeable else np.asarray(_WritableMemory(array))
