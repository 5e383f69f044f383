"""The structures of dlpack.h, version 0, and its codes of types."""

from __future__ import annotations

import ctypes

UINT, FLOAT, BFLOAT = 1, 2, 4  # kDLUInt, kDLFloat, kDLBfloat


class DLTensor(ctypes.Structure):
    """A tensor's memory, device, type and shape."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    """A tensor and what gives it back. A capsule holds the address of one."""

    _fields_ = (
        ("tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )
