"""Outputs must not share memory with anything else in a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normgraph.errors import ArgumentError
from normgraph.runtime.adapters import View
from normgraph.runtime.options import Selection
from normgraph.runtime.signature import Signature


def check_overlap(
    signature: Signature,
    selection: Selection,
    inputs: Sequence[View],
    outputs: Mapping[int, View],
) -> None:
    """Raise ArgumentError where one of the caller's outputs overlaps an input or another output.

    new_running_* over exactly running_* is the one overlap allowed, unless it is added to: a kernel
    reads each element of it before it writes that element.
    """
    earlier: list[tuple[str, View]] = []
    for index, view in outputs.items():
        name = signature.output_names[index]
        for other_name, other in zip(signature.input_names, inputs, strict=True):
            if not _overlap(view, other):
                continue
            same = view.address == other.address and view.nbytes == other.nbytes
            if same and name == f"new_{other_name}":
                if index not in selection.added:
                    continue
                raise ArgumentError(
                    f'{signature.kind}: out[{name!r}] is {other_name} itself, which "write"'
                    f' updates in place; "add" needs an array of its own.'
                )
            raise ArgumentError(
                f"{signature.kind}: out[{name!r}] must not share memory with {other_name}, but it"
                f" does. Pass an array of its own."
            )
        for other_name, other in earlier:
            if _overlap(view, other):
                raise ArgumentError(
                    f"{signature.kind}: out[{name!r}] must not share memory with"
                    f" out[{other_name!r}], but it does. Pass an array of its own."
                )
        earlier.append((name, view))


def _overlap(one: View, other: View) -> bool:
    # Both are compact here, so their memory is one range each.
    return (
        one.address < other.address + other.nbytes
        and other.address < one.address + one.nbytes
        and one.nbytes > 0
        and other.nbytes > 0
    )
