"""Running a fresh library on its self-test vectors before it is let out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from normgraph import cuda_memory, dlpack_types
from normgraph.compile.vectors import Array, Case, Port, dtype_of
from normgraph.cuda import DriverError
from normgraph.errors import CompileError, DeviceError, NormGraphError

# Of every device; nothing else of this process's has to be waited for.
_DEFAULT_STREAM = 0
# How a library begins what it tells of the driver's errors (cuda_device.c).
_OF_THE_DEVICE = "CUDA device "


def run(
    library: Path,
    cases: Sequence[Case],
    outputs: Mapping[str, Sequence[Port]],
    device: int | None = None,
) -> None:
    """Run every case on the library. Raises CompileError for the first output that is wrong.

    device: a CUDA device to run it on. Raises DeviceError where it or its driver refuses, and
    CompileError for any other fault.
    """
    if device is None:
        _run(library, cases, outputs, None)
        return
    try:
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", device), _DEFAULT_STREAM):
            _run(library, cases, outputs, device)
    except NormGraphError:
        raise
    except (DriverError, RuntimeError) as error:
        if not isinstance(error, DriverError) and not str(error).startswith(_OF_THE_DEVICE):
            raise CompileError(
                f"the self-test cannot be run on cuda:{device}: {error}. The kernels are at fault,"
                " not the device. Nothing was written."
            ) from None
        raise DeviceError(
            f"the self-test cannot be run on cuda:{device}: {error}. Nothing was written. Build"
            " where the device works, or where none can be seen (CUDA_VISIBLE_DEVICES= in the"
            " environment): the self-test is then run by the first load."
        ) from None


def _run(
    library: Path,
    cases: Sequence[Case],
    outputs: Mapping[str, Sequence[Port]],
    device: int | None,
) -> None:
    put = _tensor if device is None else partial(_on_device, device)
    get = _values if device is None else _from_device
    module = tvm_ffi.load_module(str(library), keep_module_alive=False)
    for case in cases:
        ports = outputs[case.kind]
        # NaN marks what a kernel leaves unwritten.
        made = [put(np.full(case.answers[p.name].shape, np.nan, dtype_of(p.dtype))) for p in ports]
        given = [put(values) for values in case.inputs.values()]
        write_all = sum(1 << (2 * k) for k in range(len(ports)))
        module[case.kind](*given, *made, write_all)
        for port, tensor in zip(ports, made, strict=True):
            _compare(case, port.name, get(tensor, dtype_of(port.dtype)))


def _compare(case: Case, name: str, got: Array) -> None:
    want = np.asarray(case.answers[name], np.float64)
    given = got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(given - want)
    error[(given == want) | (np.isnan(given) & np.isnan(want))] = 0.0
    worst = float(np.max(error, initial=0.0))
    # Any other NaN compares false with everything and must count as an error.
    if not worst <= case.tolerance[name]:
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), want.shape)
        place = tuple(int(i) for i in at)
        raise CompileError(
            f"the compiled {case.kind} gives a wrong {name}: at {place} it is {got[at]!s}, float64 "
            f"says {want[at]:.9g}, and {case.tolerance[name]:.3g} is allowed (case {case.prefix}). "
            "Nothing was written. A graph that was changed after its export fails so; if this "
            "one was not, it is a defect."
        )


def _tensor(values: Array) -> Any:
    return tvm.runtime.tensor(np.asarray(values, order="C"))


def _values(tensor: Any, dtype: np.dtype[Any]) -> Array:
    del dtype
    values: Array = tensor.numpy()
    return values


def _on_device(device: int, values: Array) -> Any:
    code = dlpack_types.FLOAT if values.dtype.kind == "f" else dlpack_types.BFLOAT
    memory = cuda_memory.Memory(values.shape, code, 8 * values.itemsize, device)
    compact = np.asarray(values, order="C")
    cuda_memory.upload(memory.address, compact.ctypes.data, compact.nbytes, device, _DEFAULT_STREAM)
    return tvm_ffi.from_dlpack(memory)


def _from_device(tensor: Any, dtype: np.dtype[Any]) -> Array:
    values: Array = np.empty(tuple(tensor.shape), dtype)
    device = tensor.device.index
    cuda_memory.download(
        values.ctypes.data, tensor.data_ptr(), values.nbytes, device, _DEFAULT_STREAM
    )
    return values
