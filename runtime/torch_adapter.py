"""PyTorch CPU tensors. Imported only when a tensor is passed, so torch is imported by then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import tvm_ffi

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.adapters import View
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.output_pool import LARGE, pool
from normgraph.runtime.signature import Shape

torch: Any = sys.modules["torch"]
forward_ad: Any = sys.modules["torch.autograd.forward_ad"]
noun = "torch tensor"
notes_writes = True

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
# NumPy has no bfloat16, and what is not written yet may be of any type.
_STORED = {
    dtype: np.dtype("int16" if name == "bfloat16" else name) for name, dtype in DTYPES.items()
}


def native_dtypes(names: Sequence[str], seen: Sequence[Any] = ()) -> tuple[Any, ...]:
    return tuple(DTYPES[name] for name in names)


def kernel_arguments(names: Sequence[str]) -> None:
    """Kernels take all of them as they are."""


def ready(arrays: Sequence[Any], dtypes: Sequence[Any]) -> tuple[tuple[Shape, ...], bool] | None:
    if len(arrays) != len(dtypes) or recording():
        return None
    try:
        for tensor, dtype in zip(arrays, dtypes):  # noqa: B905  # the lengths were compared above
            if (
                type(tensor) is not torch.Tensor
                or tensor.dtype is not dtype
                or tensor.layout is not torch.strided
                or not tensor.is_cpu
                or tensor.requires_grad
                or tensor.is_nested
                or tensor.is_neg()
                or not tensor.is_contiguous()
                or not aligned(tensor)
            ):
                return None
    except RuntimeError:  # tensors without memory, inside of function transforms
        return None
    return tuple([tensor.shape for tensor in arrays]), False


def aligned(tensor: Any) -> bool:
    """Whether the tensor has memory, at a multiple of its element size."""
    address: int = tensor.data_ptr()
    return address != 0 and address % tensor.itemsize == 0


def recording() -> bool:
    """Whether torch is following operations that a kernel call would be missing from."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return (
        forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or (proxies is not None and proxies.get_proxy_mode() is not None)
    )


def check_recorded(tensor: Any, where: str) -> None:
    """Raise for a tensor that torch is recording, or would have to."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{where} requires grad, and a kernel call is not recorded by autograd. Pass"
            f" tensor.detach(), or call inside torch.no_grad()."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ArgumentError(
            f"{where} has a forward-mode tangent, and a kernel call passes none on. Pass the primal"
            f" alone: torch.autograd.forward_ad.unpack_dual(tensor).primal."
        )
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch._C._is_tracing() or (proxies is not None and proxies.get_proxy_mode() is not None):
        raise ArgumentError(
            f"{where} is being traced, and a kernel call would be missing from the trace. Call it"
            f" outside of torch.jit.trace and make_fx."
        )


def writable(array: Any, dtype: Any, shape: Shape, others: Sequence[Any], owned: bool) -> bool:
    passed = ready((array,), (dtype,))
    if passed is None or passed[0][0] != shape:
        return False
    start = array.data_ptr()
    stop = start + array.nbytes
    for other in others:
        address = other.data_ptr()
        if start < address + other.nbytes and address < stop:
            return False
    return True


def empty(shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
    return [
        torch.empty(shape, dtype=dtype, device="cpu")
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def empty_large(shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
    return [_empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def _empty(shape: Shape, dtype: Any) -> Any:
    """A new tensor; a large one shows an array of the pool."""
    if prod(shape) * dtype.itemsize < LARGE or not pool.limit:
        return torch.empty(shape, dtype=dtype, device="cpu")
    array = pool.empty(tuple(shape), _STORED[dtype])
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype is dtype else tensor.view(dtype)


def has_zero(array: Any) -> bool:
    return not array.all().item()


def view(array: Any, where: str) -> View:
    check_dense(array, where)
    if array.device.type != "cpu":
        raise ArgumentError(
            f"{where} must be on the CPU, but it is on {array.device}. Move it with .cpu(), or"
            f" build an artifact for that device."
        )
    return inspect(array, where)


def check_dense(array: Any, where: str) -> None:
    """Raise for a tensor that is not one block of elements."""
    if array.layout is not torch.strided or array.is_nested:
        came = "nested" if array.is_nested else f"of layout {array.layout}"
        raise ArgumentTypeError(
            f"{where} must be a dense tensor, but it is {came}. Convert it with to_dense() or"
            f" to_padded_tensor()."
        )


def inspect(array: Any, where: str) -> View:
    """The view of a dense tensor on the right device; raises for what no kernel can take."""
    check_recorded(array, where)
    tensor = array.detach()  # which set_ and assigning to data of the other do not reach
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        raise ArgumentTypeError(
            f"{where} has no memory of its own ({type(array).__name__}): {error}. Call outside of"
            f" tracing and function transforms."
        ) from None
    if address == 0 and tensor.numel():
        raise ArgumentTypeError(
            f"{where} has no memory ({type(array).__name__}): its storage is empty or not real."
            f" Pass a tensor that holds its values."
        )
    defect = None
    if tensor.is_neg() or tensor.is_conj():
        defect = "a lazily negated or conjugated view"
    elif not tensor.is_contiguous():
        defect = f"strided (strides {tuple(tensor.stride())})"
    elif address % tensor.itemsize:
        defect = f"not aligned to its element size ({tensor.itemsize} bytes)"
    return View(
        array=tensor,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        defect=defect,
        writable=True,
        address=address,
        nbytes=tensor.nbytes,
        device=tensor.device.index or 0,
    )


def copy(view_: View) -> View:
    dense = _empty(view_.shape, view_.array.dtype)
    with torch.no_grad():
        dense.copy_(view_.array)  # resolves a lazy negation too
    return view(dense, "copy")


def kernel_argument(view_: View) -> Any:
    return view_.array


def lasting(view_: View) -> Any:
    return tvm_ffi.from_dlpack(view_.array)


def guards(arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
    kind = arrays[0][0].partition(":")[0]
    tensors = [tensor for _, tensor, _ in arrays]
    shown = [view_.array for _, _, view_ in arrays]
    addresses = [view_.address for _, _, view_ in arrays]
    address_of, grad_enabled = torch.Tensor.data_ptr, torch.is_grad_enabled

    def check() -> None:
        # Memory that resize_ has moved is freed.
        if [*map(address_of, shown)] != addresses:
            raise ArgumentError(
                f"{kind}: the memory of an array was resized or freed after it was bound. Bind the"
                f" arrays anew, and do not resize them."
            )
        if not recording():
            if not grad_enabled():
                return
            for tensor in tensors:
                if tensor.requires_grad:
                    break
            else:
                return
        for where, tensor, _ in arrays:
            check_recorded(tensor, where)

    return [check]


def allocate(shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
    tensor = _empty(shape, DTYPES[dtype])
    return View(tensor, shape, dtype, None, True, 0, tensor.nbytes)


def scalar(value: float, dtype: str) -> Any:
    return torch.tensor(value, dtype=DTYPES[dtype], device="cpu")


def memory(view_: View) -> AnyArray:
    tensor = view_.array.detach()
    bits = tensor.view(torch.int16) if view_.dtype == "bfloat16" else tensor
    array: AnyArray = bits.numpy()
    return array.view("uint16") if view_.dtype == "bfloat16" else array


def written(arrays: Iterable[Any]) -> None:
    """Tell autograd, so that a backward through an overwritten saved tensor fails, as in torch."""
    torch.autograd.graph.increment_version(tuple(arrays))
