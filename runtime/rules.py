"""Inputs whose shapes fit but which have no meaningful answer: refused before a kernel runs."""

from __future__ import annotations

from math import prod

import numpy as np

from normgraph.errors import ArgumentError
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.signature import Shape, Signature
from normgraph.spec import NormSpec


def check_enough_values(spec: NormSpec, signature: Signature, shapes: tuple[Shape, ...]) -> None:
    """Raise where PyTorch raises for one value per statistic ("Expected more than 1 ...").

    Under the torch convention, where batch statistics are taken, as torch.nn.functional does it in
    _verify_spatial_size (instance_norm) and _verify_batch_size (batch_norm, group_norm; the latter
    counts the batch too). layer_norm and rms_norm are never refused, nor is any backward.
    """
    if spec.convention != "torch" or signature.kind not in ("forward", "inference"):
        return
    if signature.kind == "inference" and spec.track_running_stats:
        return
    size = shapes[signature.input_names.index("x")]
    spatial = prod(size[2:])
    if spec.op == "instance_norm":
        values, what = spatial, "spatial element"
    elif spec.op == "batch_norm":
        values, what = size[0] * spatial, "value per channel"
    elif spec.op == "group_norm" and spec.groups is not None:
        values, what = size[0] * size[1] // spec.groups * spatial, "value per channel"
    else:
        return
    if values == 1:
        raise ArgumentError(
            f"{signature.kind}: Expected more than 1 {what} when training, got input size {size}:"
            f" the variance of one value is 0. Pass more values."
        )


def check_no_zero(kind: str, gamma: AnyArray, dtype: str) -> None:
    """Raise where an element of gamma is 0, so that x cannot be recovered from y."""
    # bfloat16 comes as its bits, of which all but the sign are 0 in a zero.
    zero = (gamma & 0x7FFF) == 0 if dtype == "bfloat16" else gamma == 0
    if not zero.any():
        return
    index = tuple(int(axis) for axis in np.argwhere(zero)[0])
    place = index[0] if len(index) == 1 else index
    raise ArgumentError(
        f"{kind}: gamma must not hold a zero, because y does not tell x then, but gamma[{place}] is"
        f" 0 ({int(zero.sum())} of {zero.size} elements are). Save x and call backward instead."
    )
