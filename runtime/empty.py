"""The answer for an input without elements, which no kernel ever sees."""

from __future__ import annotations

import math
from collections.abc import Mapping

from normgraph.runtime.dlpack import AnyArray
from normgraph.spec import NormSpec


def answer(
    spec: NormSpec,
    inputs: Mapping[str, AnyArray],
    outputs: Mapping[str, tuple[AnyArray, bool]],
) -> None:
    """Fill the outputs in place; each comes with whether it is added to instead of written.

    y and dx are as empty as x. Sums over nothing are 0: the parameter gradients and, where it has
    elements at all, mean; the variance is 0 too, so inv_std is 1/sqrt(eps). new_running_* are
    running_*.
    """
    for name, (array, added) in outputs.items():
        if 0 in array.shape:
            continue
        value: AnyArray | float = 0.0
        if name == "inv_std":
            value = 1.0 / math.sqrt(spec.eps) if spec.eps else math.inf
        elif name.startswith("new_"):
            value = inputs[name.removeprefix("new_")]
        if not added:
            array[...] = value
        elif name == "inv_std" or name.startswith("new_"):
            # Only statistics come here, and they are never bfloat16, whose bits cannot be added.
            array += value
