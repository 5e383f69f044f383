"""The plain call, plain NumPy arrays in and every output written, at the least cost in Python.

A small call costs little more than passing its arrays to the kernel, so here nothing is looked up
twice and no function is called that can be avoided. It knows no errors: whatever it is not sure of
goes to the general call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from numpy import empty, ndarray

from normgraph.runtime.numpy_adapter import OWNS, READY, native_dtypes, owner_count
from normgraph.runtime.options import Selection
from normgraph.runtime.output_pool import pool
from normgraph.runtime.signature import Shape, Signature

# The outputs' shapes, and whether any of them is large enough for the pool.
Plan = tuple[tuple[Shape, ...], bool]


def plain_call(
    signature: Signature,
    kernel: Callable[..., Any],
    selection: Selection,
    plans: Mapping[tuple[Shape, ...], Plan],
    general: Callable[..., Any],
) -> Callable[..., Any]:
    """`general` with a short way for the plain call.

    `selection` writes every output; `plans` holds what is to be made for the input shapes that are
    known to be right, and `general` adds to it.
    """
    arity = len(signature.inputs)
    names = signature.output_names
    inputs = native_dtypes([spec.dtype for spec in signature.inputs])
    outputs = native_dtypes([spec.dtype for spec in signature.outputs])
    in_place = signature.in_place
    request, result = selection.request, selection.result
    new = tuple.__new__
    pooled = pool.empty
    unsure = READY | OWNS

    @wraps(general)
    def call(
        *args: Any,
        out: Any = None,
        want: Any = None,
        grad_req: Any = "write",
        copy: Any = True,
        **named: Any,
    ) -> Any:
        if (
            want is None
            and grad_req.__class__ is str
            and grad_req == "write"
            and not named
            and len(args) == arity
        ):
            flags = unsure
            sizes = []
            for array, dtype in zip(args, inputs):  # noqa: B905  # the lengths are equal
                if array.__class__ is not ndarray or array.dtype is not dtype:
                    break
                flags &= array.flags.num
                sizes.append(array.shape)
            else:
                plan = plans.get(tuple(sizes))
                if plan is not None and flags & READY == READY and copy is True:
                    buffers: list[Any] | None
                    shapes, large = plan
                    make = pooled if large else empty
                    if out is None:
                        buffers = list(map(make, shapes, outputs))
                    else:
                        buffers = given(args, shapes, flags, out, make)
                    if buffers is not None:
                        kernel(*args, *buffers, request)
                        return buffers[0] if result is None else new(result, buffers)
        return general(*args, out=out, want=want, grad_req=grad_req, copy=copy, **named)

    def given(
        args: tuple[Any, ...],
        shapes: tuple[Shape, ...],
        flags: int,
        out: Any,
        make: Callable[..., Any],
    ) -> list[Any] | None:
        """The outputs where the caller gave some; None where they are not beyond doubt."""
        if out.__class__ is not dict:
            return None
        left = len(out)
        buffers: list[Any] = []
        for name, shape, dtype in zip(names, shapes, outputs):  # noqa: B905
            array = out.get(name)
            if array is None:
                buffers.append(make(shape, dtype))
                continue
            if array.__class__ is not ndarray or array.dtype is not dtype or array.shape != shape:
                return None
            flags &= array.flags.num
            buffers.append(array)
            left -= 1
        if left:
            return None
        # Arrays that each own their memory share none, unless they are one array.
        every = (*args, *buffers)
        distinct = set(map(id, every))
        if len(distinct) != len(every):
            # Inputs may be one array, and a running statistic its own output; nothing else may.
            inputs = list(map(id, args))
            for array, over in zip(buffers, in_place):  # noqa: B905  # the lengths are equal
                mine = id(array)
                if inputs.count(mine) > (over >= 0 and array is args[over]):
                    return None
            if len(set(map(id, buffers))) != len(buffers):
                return None
        if flags != unsure:
            if flags & READY != READY:
                return None
            if owner_count({id(array): array for array in every}.values()) < len(distinct):
                return None
        return buffers

    call.__name__ = call.__qualname__ = signature.kind
    call.__doc__ = f"{signature}\n\n{inspect.getdoc(general)}"
    return call
