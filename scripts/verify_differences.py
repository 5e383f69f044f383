"""Central differences of the float64 forward: gradients without any formula for the gradient.

For the loss sum(dy * y), the derivative with respect to one element a is

    D(h) = sum(dy * (y(a + h) - y(a - h))) / 2h = derivative + c h^2 + O(h^4)

taken at h and h/2 and extrapolated, (4 D(h/2) - D(h))/3. The distance from D(h/2) to the
extrapolated value says how far the differences themselves can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph.graphs.reference as reference
from normgraph import NormSpec

Array = NDArray[Any]

# The gradient of each input, and the forward whose derivative it is: frozen statistics are
# constants, as they are in inference.
GRADIENTS = {"dx": "x", "dgamma": "gamma", "dbeta": "beta"}
FORWARD_OF = {
    "backward": "forward",
    "backward_from_output": "forward",
    "backward_frozen": "inference",
}
_STEP = 1e-3


@dataclass(frozen=True)
class Difference:
    """One derivative: where, its value, and how uncertain it is (absolute)."""

    index: tuple[int, ...]
    value: float
    uncertainty: float


def differences(
    spec: NormSpec,
    kind: str,
    inputs: Mapping[str, Array],
    output: str,
    *,
    positions: int,
    random: np.random.Generator,
) -> list[Difference]:
    """Derivatives of the forward of `kind` at random positions of the input behind `output`.

    `inputs` are those of the forward and `dy`. At most `positions` elements are taken.
    """
    name = GRADIENTS[output]
    # Only forward updates running statistics, and so only forward takes a momentum.
    without = {"dy"} if FORWARD_OF[kind] == "forward" else {"dy", "momentum"}
    wide = {key: np.array(value, np.float64) for key, value in inputs.items() if key not in without}
    dy = np.asarray(inputs["dy"], np.float64)
    point = wide[name]
    count = min(positions, point.size)
    found = []
    for flat in sorted(random.choice(point.size, size=count, replace=False).tolist()):
        index = tuple(int(i) for i in np.unravel_index(flat, point.shape))
        coarse, fine = (
            _slope(spec, FORWARD_OF[kind], wide, dy, name, index, step)
            for step in (_STEP, _STEP / 2)
        )
        value = (4.0 * fine - coarse) / 3.0
        # 1e-10: the roundings of y, 1e-16 each, over 2h and summed.
        doubt = abs(value - fine) / 4.0 + 1e-10 * max(1.0, abs(value))
        found.append(Difference(index, value, doubt))
    return found


def _slope(
    spec: NormSpec,
    forward: str,
    inputs: dict[str, Array],
    dy: Array,
    name: str,
    index: tuple[int, ...],
    step: float,
) -> float:
    point = inputs[name]
    before = point[index]
    ends = []
    for moved in (before + step, before - step):
        point[index] = moved
        ends.append((reference.run(spec, forward, inputs)["y"], moved))
    point[index] = before
    (above, high), (below, low) = ends
    return float(np.sum(dy * (above - below)) / (high - low))
