"""This machine's CUDA devices, asked through the driver alone, and what each can run."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Names the driver's library, where it is not on the loader's path.
VARIABLE = "NORMGRAPH_LIBCUDA"
DEVICE_TYPE = 2  # kDLCUDA

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Device:
    """One device by its index in this process. capability: (9, 0) for sm_90."""

    index: int
    name: str
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """Its architecture as compilers name it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class State:
    """What the driver says. version: the CUDA version it supports, (13, 0) for 13.0.

    problem: why no device can be used; empty where one can.
    """

    version: tuple[int, int]
    devices: tuple[Device, ...]
    problem: str


class DriverError(Exception):
    """A call of the driver failed; the text has its name and CUDA's name and words for the error.

    Never leaves the package: who asks says what it means there.
    """


class Driver:
    """The driver's library; a call that fails raises DriverError."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the driver API."""
        status = self.status(name, *args)
        if status:
            raise DriverError(f"{name}: {self.describe(status)}")

    def status(self, name: str, *args: Any) -> int:
        """Call a function of the driver API and return what it returns."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise DriverError(f"the driver has no {name}; it is too old") from None
        return int(function(*args))

    def describe(self, status: int) -> str:
        """An error in CUDA's own words."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            function = getattr(self._library, name)
            if function(ctypes.c_int(status), ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return f"{': '.join(texts) or 'an unknown error'} ({status})"


@lru_cache(maxsize=4)
def open_driver(path: str) -> Driver:
    """The driver at that path, its `cuInit` done. Raises DriverError."""
    try:
        driver = Driver(path)
    except OSError as error:
        raise DriverError(f"there is no CUDA driver ({error})") from None
    driver.call("cuInit", ctypes.c_uint(0))
    return driver


def driver_path() -> str:
    """The path or name by which the driver is loaded."""
    return os.environ.get(VARIABLE) or "libcuda.so.1"


def driver() -> Driver:
    """This machine's driver. Raises DriverError where there is none, or it refuses."""
    return open_driver(driver_path())


def state() -> State:
    """The driver's version and its devices, or why there are none."""
    try:
        found = driver()
        version = ctypes.c_int()
        found.call("cuDriverGetVersion", ctypes.byref(version))
        supported = (version.value // 1000, version.value % 1000 // 10)
        count = ctypes.c_int()
        found.call("cuDeviceGetCount", ctypes.byref(count))
        devices = tuple(_device(found, index) for index in range(count.value))
    except DriverError as error:
        missing = f"({_NO_DEVICE})" in str(error)
        return State((0, 0), (), "the CUDA driver finds no device" if missing else str(error))
    problem = "" if devices else "the CUDA driver finds no device"
    return State(supported, devices, problem)


def _device(found: Driver, index: int) -> Device:
    handle = ctypes.c_int()
    found.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(index))
    name = ctypes.create_string_buffer(256)
    found.call("cuDeviceGetName", name, ctypes.c_int(len(name)), handle)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        found.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), handle)
        numbers.append(value.value)
    return Device(index, name.value.decode(errors="replace"), (numbers[0], numbers[1]))


def capability_of(arch: str) -> tuple[int, int] | None:
    """(9, 0) for sm_90 and for compute_90; None for what is no architecture."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)", arch)
    return (int(found[1]), int(found[2])) if found else None


def image_for(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Which of these images a device runs best, or None.

    Machine code (sm_80) runs on its own major version from its minor version on, PTX (compute_80)
    on every later device, through the driver's compiler.
    """
    best: tuple[tuple[bool, tuple[int, int]], str] | None = None
    for arch in archs:
        own = capability_of(arch)
        machine_code = arch.startswith("sm_")
        if own is None or own > capability or (machine_code and own[0] != capability[0]):
            continue
        rank = (machine_code, own)
        if best is None or rank > best[0]:
            best = rank, arch
    return None if best is None else best[1]


def obstacle(archs: Sequence[str], toolkit: tuple[int, int]) -> str | None:
    """Why no device here can run these images, compiled with that CUDA version, or None."""
    found = state()
    if found.problem:
        return f"it is for CUDA devices, and {found.problem}"
    return obstacle_of(found, archs, toolkit)


def obstacle_of(found: State, archs: Sequence[str], toolkit: tuple[int, int]) -> str | None:
    """The same of a state that has devices."""
    if found.version[0] < toolkit[0]:
        return (
            f"it was compiled with CUDA {_dotted(toolkit)}, and the driver supports CUDA"
            f" {_dotted(found.version)}: it needs a driver for CUDA {toolkit[0]}.0 or later"
        )
    images = [image_for(device.capability, archs) for device in found.devices]
    if all(image is None for image in images):
        here = ", ".join(dict.fromkeys(f"{d.name} ({d.arch})" for d in found.devices))
        return f"it holds code for {', '.join(archs):.200}, and here is {here}"
    if found.version < toolkit and not any((each or "").startswith("sm_") for each in images):
        return (
            f"its PTX is of CUDA {_dotted(toolkit)}, and the driver's compiler knows CUDA"
            f" {_dotted(found.version)}: it needs a later driver"
        )
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
