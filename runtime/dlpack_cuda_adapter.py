"""Any other DLPack array on a CUDA device. Outputs come as tvm_ffi.Tensor.

Kernels run on the stream that `tvm_ffi.use_raw_stream` has set, by default the device's default
stream. The producer is told that stream and makes it wait for what it still has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm_ffi

from normgraph.cuda import DEVICE_TYPE
from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime import cuda_arrays, empty
from normgraph.runtime.adapters import View
from normgraph.runtime.dlpack_adapter import view_of
from normgraph.runtime.signature import Shape
from normgraph.spec import NormSpec

_DEFAULT_STREAM = 1  # the array API's number for CUDA's legacy default stream


class _OnStream:
    """A producer that exports for one stream."""

    def __init__(self, array: Any, device: int) -> None:
        self._array, self._device = array, device

    def __dlpack__(self, **_: Any) -> Any:
        stream = tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", self._device))
        return self._array.__dlpack__(stream=int(stream) or _DEFAULT_STREAM)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE_TYPE, self._device


class DlpackDevice:
    """Arrays of one device, that of the first one that is looked at."""

    noun = "DLPack array"
    notes_writes = False

    def __init__(self) -> None:
        self._device = -1
        self._first = ""

    def view(self, array: Any, where: str) -> View:
        """Inspect an array; raises for what no kernel can take."""
        device_type, device = (int(each) for each in array.__dlpack_device__())
        if device_type != DEVICE_TYPE:
            raise ArgumentError(
                f"{where} must be on a CUDA device, but it is on DLPack device {device_type}:"
                f"{device}. Copy it there, or build an artifact for the CPU."
            )
        if self._device < 0:
            self._device, self._first = device, where
        elif device != self._device:
            raise ArgumentError(
                f"{where} must be on cuda:{self._device}, as {self._first} is, but it is on"
                f" cuda:{device}. Copy one of them."
            )
        if isinstance(array, tvm_ffi.Tensor):
            return view_of(array, writable=True)
        try:
            tensor = tvm_ffi.from_dlpack(_OnStream(array, device))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ArgumentTypeError(
                f"{where} ({type(array).__name__}) cannot be exported through DLPack: {error}."
                f" Convert it to a torch tensor."
            ) from None
        # Other producers may share memory that must not be written, and cannot say so.
        return view_of(tensor, writable=False)

    def copy(self, view: View) -> View:
        """Not possible without a framework."""
        raise ArgumentError(
            f"an array must be compact in row-major order, but one is {view.defect}, and nothing"
            f" here copies it on the device. Make it contiguous first."
        )

    def kernel_argument(self, view: View) -> Any:
        """What the kernel call takes."""
        return view.array

    def lasting(self, view: View) -> Any:
        """The tensor, if its producer does not have to be told the stream of each call."""
        if not view.writable:
            raise ArgumentError(
                "an array that is not a tvm_ffi.Tensor cannot be bound on a device: its producer"
                " is told the stream when it exports, which a bound call does not repeat. Bind"
                " tvm_ffi.from_dlpack(array), and keep the order of the streams."
            )
        return view.array

    def guards(self, arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
        """Nothing."""
        return []

    def allocate(self, shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
        """A new array for an output."""
        return view_of(cuda_arrays.owned_tensor(shape, dtype, self._device), writable=True)

    def scalar(self, value: float, dtype: str) -> Any:
        """A new array of rank 0."""
        return cuda_arrays.tensor_of(np.array(value, dtype), dtype, self._device)

    def answer(
        self, spec: NormSpec, inputs: Mapping[str, View], outputs: Mapping[str, tuple[View, bool]]
    ) -> None:
        """The answer for an input without elements, made on the host and copied."""
        host = {
            name: (cuda_arrays.memory_view(view.array, view.dtype), added)
            for name, (view, added) in outputs.items()
        }
        given = {n: cuda_arrays.memory_view(v.array, v.dtype) for n, v in inputs.items()}
        empty.answer(spec, given, host)
        for name, (array, _) in host.items():
            view = outputs[name][0]
            cuda_arrays.write(view.array, array, view.dtype)

    def written(self, arrays: Iterable[Any]) -> None:
        """tvm_ffi keeps no record of writes."""
