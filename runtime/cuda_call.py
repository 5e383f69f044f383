"""One kind of an operator on CUDA devices as a callable: the same checks, other memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normgraph.errors import ArgumentError, ArgumentTypeError, DeviceError
from normgraph.runtime import cuda_arrays
from normgraph.runtime.adapters import View
from normgraph.runtime.arguments import Checked, input_view, is_scalar
from normgraph.runtime.call import Call
from normgraph.runtime.options import Selection
from normgraph.runtime.signature import Signature
from normgraph.spec import NormSpec


class CudaCall(Call):
    """A compiled kind for CUDA devices: see `Call` for how it is called.

    All arrays of a call are on one device, where the outputs come too. torch tensors give torch
    tensors back, and the kernels run on PyTorch's current stream of that device; other DLPack CUDA
    arrays give tvm_ffi.Tensor, on the stream set by `tvm_ffi.use_raw_stream`, else on the default
    one. A call returns before its kernels have run, as PyTorch's operations do, and with torch
    tensors (or all outputs given in `out`) it can be captured in a CUDA graph.

    A zero in gamma is not looked for in backward_from_output, as that would mean waiting for the
    device: the outputs that depend on it are then infinite or NaN.

    Raises DeviceError beside what `Call` raises, where the device or its driver refuses.
    """

    def __init__(
        self, signature: Signature, spec: NormSpec, function: Callable[..., Any], device: int
    ) -> None:
        super().__init__(signature, spec, _reporting(signature.kind, function))
        self.test_device = device  # where the self-test runs
        self._gamma = -1
        self._native: tuple[Sequence[Any], Sequence[Any]] | None = None

    def function(self) -> Callable[..., Any]:
        """This call as a function."""
        return self.__call__

    def kernel(self, inputs: Sequence[Any]) -> list[Any]:
        """All outputs of the bare kernel, from tvm_ffi tensors known to be good."""
        shapes = self.signature.output_shapes(tuple(tuple(tensor.shape) for tensor in inputs))
        device = inputs[0].device.index
        outputs = [
            cuda_arrays.owned_tensor(shape, spec.dtype, device)
            for shape, spec in zip(shapes, self.signature.outputs, strict=True)
        ]
        self._function(*inputs, *outputs, self._every.request)
        return outputs

    def _full(self, arrays: tuple[Any, ...], selection: Selection, out: object, copy: bool) -> Any:
        if out is None and not selection.added:
            result = self._plain(arrays, selection)
            if result is not None:
                return result
        return super()._full(arrays, selection, out, copy)

    def _plain(self, arrays: tuple[Any, ...], selection: Selection) -> Any:
        """The call for torch tensors and shapes known to be good; None leaves it to the rest."""
        torch = sys.modules.get("torch")
        if torch is None or type(arrays[0]) is not torch.Tensor:
            return None
        from normgraph.runtime import torch_cuda_adapter as adapter

        if self._native is None:
            self._native = (
                adapter.native_dtypes([spec.dtype for spec in self.signature.inputs]),
                adapter.native_dtypes([spec.dtype for spec in self.signature.outputs]),
            )
        inputs, outputs = self._native
        input_shapes = adapter.ready(arrays, inputs)
        plan = None if input_shapes is None else self._plans.get(input_shapes)
        if plan is None:
            return None
        shapes, device = plan[0], arrays[0].device
        if selection is self._every:
            buffers = [
                torch.empty(shape, dtype=dtype, device=device)
                for shape, dtype in zip(shapes, outputs, strict=True)
            ]
        else:
            buffers = self._nowhere(device.index)
            for k in selection.wanted:
                buffers[k] = torch.empty(shapes[k], dtype=outputs[k], device=device)
        self._function(*arrays, *buffers, selection.request)
        return _result(selection, [buffers[index] for index in selection.wanted])

    def _answer(self, checked: Checked, selection: Selection) -> None:
        checked.adapter.answer(
            self._spec,
            dict(zip(self.signature.input_names, checked.inputs, strict=True)),
            {self._names[k]: (view, k in selection.added) for k, view in checked.outputs.items()},
        )

    def _spare(self, checked: Checked) -> list[Any]:
        return self._nowhere(checked.inputs[0].device)

    def _nowhere(self, device: int) -> list[Any]:
        """What a kernel takes for each output that is not requested."""
        return [
            cuda_arrays.placeholder(len(spec.shape), spec.dtype, device)
            for spec in self.signature.outputs
        ]

    def _remember(self, checked: Checked, arrays: Sequence[Any]) -> None:
        self._plans[checked.input_shapes] = checked.shapes, False

    def _adapter(self, arrays: Sequence[tuple[str, Any]]) -> Any:
        kind = self.signature.kind
        libraries = {_library(f"{kind}: {name}", array) for name, array in arrays}
        if len(libraries) > 1:
            raise ArgumentTypeError(
                f"{kind}: all arrays of a call must be of one kind, but some are torch tensors and"
                f" some other DLPack arrays. Convert one of them, for example with"
                f" torch.from_dlpack."
            )
        if libraries == {"torch"}:
            from normgraph.runtime.torch_cuda_adapter import TorchDevice

            return TorchDevice()
        from normgraph.runtime.dlpack_cuda_adapter import DlpackDevice

        return DlpackDevice()

    def _views(self, adapter: Any, arrays: Sequence[Any]) -> list[View]:
        """The inputs' views, plain numbers last: they go where the others are."""
        specs = self.signature.inputs
        order = sorted(range(len(specs)), key=lambda k: is_scalar(specs[k], arrays[k]))
        kind = self.signature.kind
        views = {k: input_view(kind, adapter, specs[k], arrays[k]) for k in order}
        return [views[k] for k in range(len(specs))]


def _library(where: str, array: object) -> str:
    if isinstance(array, np.ndarray):
        raise ArgumentError(
            f"{where} must be on a CUDA device, but it is a numpy array, which is on the CPU. Pass"
            f" torch.from_numpy(array).cuda(), or build an artifact for the CPU."
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return "torch"
    if hasattr(type(array), "__dlpack__"):
        return "dlpack"
    raise ArgumentTypeError(
        f"{where} must be a torch tensor or another DLPack array on a CUDA device, but it is"
        f" {type(array).__name__}."
    )


def _result(selection: Selection, outputs: Sequence[Any]) -> Any:
    if selection.result is None:
        return outputs[0]
    return tuple.__new__(selection.result, outputs)


def _reporting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with the driver's errors told as DeviceError."""

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except RuntimeError as error:
            raise DeviceError(f"{kind}: {error}") from None

    return run
