"""The emulator behind the CUDA driver's own functions, as a launcher calls them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SOURCE = """
extern "C" __global__ void scale(const float* x, float* y, long long n, int step, float by) {
  extern __shared__ float buffer[];
  for (long long i = threadIdx.x; i < n; i += step) {
    buffer[i] = x[i] * by;
    y[i] = buffer[i];
  }
}
"""
LAUNCH_FAILED, INVALID_VALUE, MAX_DYNAMIC_SHARED = 719, 1, 8


class Driver:
    """The functions of the driver, one program loaded, one array in and one out."""

    def __init__(self, library: ctypes.CDLL, program: Path, values: Any) -> None:
        self.library = library
        library.simt_begin(0)
        library.simt_allocate.restype = ctypes.c_uint64
        self.x = self.array(b"x", 0, values)
        self.y = self.array(b"y", 1, values)
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        image = ctypes.c_char_p(bytes(program))
        assert library.cuModuleLoadDataEx(ctypes.byref(self.module), image, 0, None, None) == 0
        function = ctypes.byref(self.function)
        assert library.cuModuleGetFunction(function, self.module, b"scale") == 0
        assert library.cuModuleGetFunction(function, self.module, b"other") != 0
        assert library.cuModuleGetFunction(function, self.module, b"scale") == 0

    def array(self, name: bytes, role: int, values: Any) -> ctypes.c_uint64:
        data = None if role else ctypes.c_void_p(values.ctypes.data)
        size = ctypes.c_size_t(values.nbytes)
        return ctypes.c_uint64(self.library.simt_allocate(name, role, size, 4, 0, data))

    def launch(self, n: int, shared: int) -> int:
        args: list[Any] = [
            self.x,
            self.y,
            ctypes.c_int64(n),
            ctypes.c_int32(32),
            ctypes.c_float(0.5),
        ]
        params = (ctypes.c_void_p * 5)(*(ctypes.addressof(arg) for arg in args))
        sizes = (1, 1, 1, 32, 1, 1, shared)
        return int(self.library.cuLaunchKernel(self.function, *sizes, None, params, None))

    def findings(self, path: Path) -> str:
        assert self.library.simt_finish(bytes(path)) == 0
        return path.read_text()


@pytest.fixture
def driver(emulator: Any) -> Driver:
    values = np.arange(100, dtype=np.float32)
    return Driver(ctypes.CDLL(str(emulator.driver)), emulator.compile(SOURCE).path, values)


def test_a_launch(driver: Driver, tmp_path: Path) -> None:
    assert driver.launch(100, 400) == 0
    found, _, rest = driver.findings(tmp_path / "found").partition("---\n")
    assert found == ""
    assert rest == "---\nscale 1 1 1 32 1 1 400 a:x+0 a:y+0 i:100 i:32 f:0x1p-1\n"
    y = np.zeros(100, np.float32)
    size = ctypes.c_size_t(y.nbytes)
    assert driver.library.cuMemcpyDtoH_v2(ctypes.c_void_p(y.ctypes.data), driver.y, size) == 0
    np.testing.assert_array_equal(y, np.arange(100) / 2)


def test_a_launch_that_reads_too_far(driver: Driver, tmp_path: Path) -> None:
    assert driver.launch(101, 404) == 0
    assert "out-of-bounds" in driver.findings(tmp_path / "found")


def test_much_shared_memory_has_to_be_asked_for(driver: Driver, tmp_path: Path) -> None:
    size = 64 * 1024
    assert driver.launch(100, size) == INVALID_VALUE
    assert driver.library.cuFuncSetAttribute(driver.function, MAX_DYNAMIC_SHARED, size) == 0
    assert driver.launch(100, size) == 0
    assert driver.launch(100, size + 4) == INVALID_VALUE


def test_memory_given_back_is_not_used_again(driver: Driver, tmp_path: Path) -> None:
    made = ctypes.c_uint64()
    assert driver.library.cuMemAlloc_v2(ctypes.byref(made), ctypes.c_size_t(400)) == 0
    values = np.ones(100, np.float32)
    source, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(400)
    assert driver.library.cuMemcpyHtoD_v2(made, source, size) == 0
    driver.x = made
    assert driver.launch(100, 400) == 0
    assert driver.library.cuMemFree_v2(made) == 0
    assert driver.launch(100, 400) == LAUNCH_FAILED
    assert "given-back" in driver.findings(tmp_path / "found")
