"""Device memory without a framework: allocated, filled and read through the driver.

Every call selects the device's primary context, the one PyTorch and the CUDA runtime use, for as
long as it lasts. Copies are made in the order of a stream and waited for. The driver's synchronous
ones are of the default stream, with which no order is kept by a stream that is non-blocking, as
those of PyTorch and CuPy are.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from normgraph.cuda import DEVICE_TYPE, Driver, driver
from normgraph.dlpack_types import DLManagedTensor

_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_NAME = b"dltensor"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

# What was exported and not given back yet, by the address of its DLManagedTensor.
_exported: dict[int, tuple[Any, ...]] = {}


@lru_cache(maxsize=16)
def _context(found: Driver, device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    found.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
    found.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


@contextlib.contextmanager
def _on(device: int, by: Driver | None = None) -> Iterator[Driver]:
    found = by or driver()
    found.call("cuCtxPushCurrent_v2", _context(found, device))
    try:
        yield found
    finally:
        found.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@contextlib.contextmanager
def _beside_captures(found: Driver) -> Iterator[None]:
    """What may wait for the device is allowed to this thread, whatever graph is captured."""
    mode = ctypes.c_int(_RELAXED)
    found.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        found.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def upload(address: int, source: int, nbytes: int, device: int, stream: int) -> None:
    """Copy from host memory at `source`, after what the stream has to do before.

    When it returns the values are there for every stream. Raises cuda.DriverError.
    """
    with _on(device) as found:
        found.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )
        found.call("cuStreamSynchronize", ctypes.c_void_p(stream))


def download(target: int, address: int, nbytes: int, device: int, stream: int) -> None:
    """Copy to host memory at `target`, after what the stream has to do before.

    Raises cuda.DriverError.
    """
    with _on(device) as found:
        found.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target),
            ctypes.c_uint64(address),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )
        found.call("cuStreamSynchronize", ctypes.c_void_p(stream))


class Memory:
    """A DLPack producer of one compact tensor on a CUDA device.

    It is exported once, and the memory goes back when the consumer lets go of it; the driver waits
    for what still runs on it. address: of memory that somebody else owns; None allocates. Raises
    cuda.DriverError.
    """

    def __init__(
        self, shape: Sequence[int], code: int, bits: int, device: int, address: int | None = None
    ) -> None:
        self._device = device
        self._owner: Driver | None = None
        if address is None:
            made = ctypes.c_uint64()
            nbytes = max(math.prod(shape) * bits // 8, 1)
            with _on(device) as found:
                found.call("cuMemAlloc_v2", ctypes.byref(made), ctypes.c_size_t(nbytes))
            self._owner, address = found, made.value
        self.address = address
        self._shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self._ndim, self._type = len(shape), (code, bits)

    def __dlpack__(self, **_: Any) -> Any:
        managed = DLManagedTensor()
        tensor = managed.tensor
        tensor.data = self.address
        tensor.device_type, tensor.device_id = DEVICE_TYPE, self._device
        tensor.ndim = self._ndim
        (tensor.code, tensor.bits), tensor.lanes = self._type, 1
        tensor.shape = ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = ctypes.cast(_RELEASE, ctypes.c_void_p)
        at = ctypes.addressof(managed)
        _exported[at] = (managed, self._shape, self._owner, self.address, self._device)
        return _new_capsule(at, _NAME, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE_TYPE, self._device


def _give_back(managed: int) -> None:
    _, _, owner, address, device = _exported.pop(managed)
    if owner is not None:
        # It is the garbage collector that says when, at worst while somebody captures a graph.
        with _on(device, owner), _beside_captures(owner):
            owner.call("cuMemFree_v2", ctypes.c_uint64(address))


# Kept here for as long as the process lives: consumers call it.
_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_give_back)
