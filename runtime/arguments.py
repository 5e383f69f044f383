"""The arrays of a call: put in order, and each held against what the kernel takes or gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.adapters import View
from normgraph.runtime.signature import Shape, Signature, TensorSpec


@dataclass
class Checked:
    """The arrays of one call with nothing wrong.

    adapter  that of their library, or of the device they are on
    inputs   in the order of the signature
    outputs  what is wanted, by index: the caller's arrays and new ones
    given    the caller's outputs as they came, by name
    shapes   of all outputs, wanted or not
    """

    adapter: Any
    inputs: list[View]
    outputs: dict[int, View]
    given: Mapping[str, Any]
    shapes: tuple[Shape, ...]

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the inputs."""
        return tuple(view.shape for view in self.inputs)

    @property
    def is_empty(self) -> bool:
        """Whether an input has no elements, so that no kernel can be called."""
        return any(0 in view.shape for view in self.inputs)


def in_order(
    signature: Signature, args: tuple[Any, ...], named: Mapping[str, Any], options: str
) -> tuple[Any, ...]:
    """The inputs in order, from positional and keyword arguments; `options` is for messages."""
    kind, names = signature.kind, signature.input_names
    expected = f"it takes {', '.join(names)}"
    if len(args) > len(names):
        raise ArgumentTypeError(
            f"{kind}: expected {len(names)} arrays, but {len(args)} came; {expected}."
        )
    found = dict(zip(names, args, strict=False))
    for name, value in named.items():
        if name not in names:
            raise ArgumentTypeError(
                f"{kind}: there is no argument {name!r}; {expected}, and the options {options}."
            )
        if name in found:
            raise ArgumentTypeError(f"{kind}: {name} was given twice, by position and by name.")
        found[name] = value
    missing = [name for name in names if name not in found]
    if missing:
        raise ArgumentTypeError(f"{kind}: {', '.join(missing)} missing; {expected}.")
    return tuple(found[name] for name in names)


def is_scalar(spec: TensorSpec, array: object) -> bool:
    """Whether this is a plain number where an array of rank 0 is expected."""
    numbers = (int, float, np.floating, np.integer)
    return spec.shape == () and isinstance(array, numbers) and not isinstance(array, bool)


def input_view(kind: str, adapter: Any, spec: TensorSpec, array: Any) -> View:
    """The view of an input of the right dtype; a plain number becomes an array."""
    where = f"{kind}: {spec.name}"
    if is_scalar(spec, array):
        array = adapter.scalar(float(array), spec.dtype)
    view: View = adapter.view(array, where)
    if view.dtype != spec.dtype:
        raise ArgumentTypeError(
            f"{where} must be {spec.dtype} ({spec}), but it is {view.dtype}. Convert it, or"
            f" build an artifact for that dtype."
        )
    return view


def compact(
    kind: str, adapter: Any, spec: TensorSpec, view: View, *, copy: bool, bound: bool
) -> View:
    """An input as the kernel takes it: itself or, where that must be and may be, a copy."""
    if view.defect is None:
        return view
    if copy:
        made: View = adapter.copy(view)
        return made
    purpose, advice = "for copy=False", "Make it contiguous, or allow copy=True."
    if bound:
        purpose, advice = "to be bound", "Bind a contiguous array, and copy into that."
    raise ArgumentError(
        f"{kind}: {spec.name} must be compact in row-major order {purpose}, but it is"
        f" {view.defect}. {advice}"
    )


def output_view(kind: str, adapter: Any, spec: TensorSpec, shape: Shape, array: Any) -> View:
    """The view of an output the caller gave, which must be exactly as the kernel writes it."""
    where = f"{kind}: out[{spec.name!r}]"
    view: View = adapter.view(array, where)
    if view.dtype != spec.dtype:
        raise ArgumentTypeError(
            f"{where} must be {spec.dtype} ({spec}), but it is {view.dtype}. Allocate it with"
            f" that dtype."
        )
    if view.shape != shape:
        raise ArgumentError(
            f"{where} must have shape {shape} ({spec}), but it has {view.shape}. Allocate it"
            f" with that shape."
        )
    if view.defect is not None:
        raise ArgumentError(
            f"{where} must be compact in row-major order, but it is {view.defect}. Pass a"
            f" contiguous array and copy from it."
        )
    if not view.writable:
        raise ArgumentError(
            f"{where} must be writable, but it is read-only, or its {adapter.noun} does not"
            f" say. Pass a writable one."
        )
    return view
