"""PyTorch tensors on a CUDA device. Kernels run on PyTorch's current stream of that device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from normgraph.errors import ArgumentError
from normgraph.runtime import empty
from normgraph.runtime.adapters import View
from normgraph.runtime.signature import Shape
from normgraph.runtime.torch_adapter import (
    DTYPES,
    aligned,
    check_dense,
    guards,
    inspect,
    native_dtypes,
    recording,
    written,
)
from normgraph.spec import NormSpec

torch: Any = sys.modules["torch"]

__all__ = ["TorchDevice", "native_dtypes", "ready"]


def ready(arrays: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Shape, ...] | None:
    """The shapes, if these tensors can be handed to a kernel without any more checks."""
    if len(arrays) != len(dtypes) or recording():
        return None
    try:
        device = arrays[0].device
        for tensor, dtype in zip(arrays, dtypes):  # noqa: B905  # the lengths were compared above
            if (
                type(tensor) is not torch.Tensor
                or tensor.dtype is not dtype
                or tensor.layout is not torch.strided
                or not tensor.is_cuda
                or tensor.device != device
                or tensor.requires_grad
                or tensor.is_nested
                or tensor.is_neg()
                or not tensor.is_contiguous()
                or not aligned(tensor)
            ):
                return None
    except (AttributeError, RuntimeError):  # no tensor; one without memory
        return None
    return tuple([tuple(tensor.shape) for tensor in arrays])


class TorchDevice:
    """Tensors of one device, that of the first one that is looked at."""

    noun = "torch tensor"
    notes_writes = True

    def __init__(self) -> None:
        self._device: Any = None
        self._first = ""

    def view(self, array: Any, where: str) -> View:
        """Inspect a tensor; raises for what no kernel can take."""
        check_dense(array, where)
        if array.device.type != "cuda":
            raise ArgumentError(
                f"{where} must be on a CUDA device, but it is on {array.device}. Move it with"
                f" .cuda(), or build an artifact for the CPU."
            )
        if self._device is None:
            self._device, self._first = array.device, where
        elif array.device != self._device:
            raise ArgumentError(
                f"{where} must be on {self._device}, as {self._first} is, but it is on"
                f" {array.device}. Move one of them with .to()."
            )
        return inspect(array, where)

    def copy(self, view: View) -> View:
        """A compact copy on the device."""
        with torch.no_grad():
            dense = torch.empty(view.shape, dtype=view.array.dtype, device=view.array.device)
            dense.copy_(view.array)  # resolves a lazy negation too
        return inspect(dense, "copy")

    def kernel_argument(self, view: View) -> Any:
        """What the kernel call takes."""
        return view.array

    def lasting(self, view: View) -> Any:
        """A tensor: with it the call finds PyTorch's stream and allocator."""
        return view.array

    def guards(self, arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
        """As on the CPU."""
        return guards(arrays)

    def allocate(self, shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
        """A new tensor for an output."""
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device=self._device)
        return View(tensor, shape, dtype, None, True, 0, tensor.nbytes, self._device.index)

    def scalar(self, value: float, dtype: str) -> Any:
        """A new tensor of rank 0, filled on the device."""
        return torch.full((), value, dtype=DTYPES[dtype], device=self._device)

    def answer(
        self, spec: NormSpec, inputs: Mapping[str, View], outputs: Mapping[str, tuple[View, bool]]
    ) -> None:
        """The answer for an input without elements, written on the device."""
        with torch.no_grad():
            empty.answer(
                spec,
                {name: view.array.detach() for name, view in inputs.items()},
                {name: (view.array.detach(), added) for name, (view, added) in outputs.items()},
            )

    def written(self, arrays: Iterable[Any]) -> None:
        """Tell autograd."""
        written(arrays)
