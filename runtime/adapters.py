"""What a call needs to know of an array, whichever library it comes from, and who tells it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import numpy as np

from normgraph.errors import ArgumentTypeError
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.signature import Shape


@dataclass
class View:
    """The facts about one array that decide whether and how a kernel may use it."""

    array: Any
    shape: Shape
    dtype: str
    defect: str | None  # why a kernel cannot take the memory as it is: strided, misaligned, ...
    writable: bool
    address: int
    nbytes: int
    device: int = 0  # of an array on a CUDA device, its number


class Adapter(Protocol):
    """One array library. Each implementation is a module; `where` opens its error messages."""

    @property
    def noun(self) -> str:
        """How messages name one of its arrays."""

    @property
    def notes_writes(self) -> bool:
        """Whether `written` does anything."""

    def native_dtypes(self, names: Sequence[str], seen: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The library's dtype objects; None where arrays of that dtype never pass `ready`.

        Of a dtype that is not the library's own, the object is that of an array in `seen`.
        """

    def ready(
        self, arrays: Sequence[Any], dtypes: Sequence[Any]
    ) -> tuple[tuple[Shape, ...], bool] | None:
        """The shapes, if these arrays can be handed to a kernel without any more checks.

        The flag says whether each is known to own its memory.
        """

    def writable(
        self, array: Any, dtype: Any, shape: Shape, others: Sequence[Any], owned: bool
    ) -> bool:
        """Whether a kernel may write here without any more checks.

        `others` passed `ready` or `writable`, and must not share memory with `array`; `owned` says
        that each of them owns its memory, and then this one does too where the answer is yes.
        """

    def empty(self, shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
        """New arrays of native dtypes, none of them large."""

    def empty_large(self, shapes: Iterable[Shape], dtypes: Iterable[Any]) -> list[Any]:
        """New arrays of native dtypes, the large ones in the memory of `output_pool`."""

    def kernel_arguments(self, names: Sequence[str]) -> Callable[[Sequence[Any]], list[Any]] | None:
        """What makes of arrays of these dtypes what the kernel call takes, if they passed `ready`.

        None where it takes them as they are. What is no array of the library is left as it is.
        """

    def has_zero(self, array: Any) -> bool:
        """Whether an array that passed `ready` may hold a zero."""

    def view(self, array: Any, where: str) -> View:
        """Inspect any array of the library; raises for what no kernel can take."""

    def copy(self, view: View) -> View:
        """A compact, aligned copy."""

    def kernel_argument(self, view: View) -> Any:
        """What the kernel call takes for an array without a defect; nothing is copied."""

    def lasting(self, view: View) -> Any:
        """What any number of kernel calls take for an array without a defect.

        Whatever is done to the array, its memory stays where it is, or `guards` notice.
        """

    def guards(self, arrays: Sequence[tuple[str, Any, View]]) -> list[Callable[[], None]]:
        """What is to be checked before each call with these arrays, which were good once.

        Each comes with what opens its error messages, and with its view.
        """

    def allocate(self, shape: Shape, dtype: str, inputs: Sequence[View]) -> View:
        """A new array for an output; a large one in the memory of `output_pool`."""

    def scalar(self, value: float, dtype: str) -> Any:
        """A new array of rank 0."""

    def memory(self, view: View) -> AnyArray:
        """The memory as a writable NumPy array; bfloat16 as its bits."""

    def written(self, arrays: Iterable[Any]) -> None:
        """Called after a kernel wrote into arrays that the caller gave."""


def adapter_of(array: object, where: str) -> Adapter:
    """The adapter for this array's library. Raises ArgumentTypeError for what is no array."""
    if isinstance(array, np.ndarray):
        return _load("numpy")
    # Where torch is not imported, nothing can be a tensor of it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return _load("torch")
    if hasattr(type(array), "__dlpack__"):
        return _load("dlpack")
    raise ArgumentTypeError(
        f"{where} must be a numpy array, a torch tensor or another DLPack array, but it is"
        f" {type(array).__name__}. Convert it, for example with numpy.asarray."
    )


def adapter_for_call(kind: str, arrays: Iterable[tuple[str, object]]) -> Adapter:
    """The one adapter all these arrays belong to; arrays of different libraries are refused."""
    first: tuple[str, Adapter] | None = None
    for name, array in arrays:
        adapter = adapter_of(array, f"{kind}: {name}")
        if first is None:
            first = name, adapter
        elif adapter is not first[1]:
            raise ArgumentTypeError(
                f"{kind}: all arrays of a call must be of one kind, but {first[0]} is a"
                f" {first[1].noun} and {name} is a {adapter.noun}. Convert one of them, for"
                f" example with torch.from_numpy or Tensor.numpy."
            )
    if first is None:
        raise ArgumentTypeError(f"{kind}: no array was given.")
    return first[1]


@cache
def _load(library: str) -> Adapter:
    module = importlib.import_module(f"normgraph.runtime.{library}_adapter")
    return cast(Adapter, module)
