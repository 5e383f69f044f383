"""Large inputs whose right results are known: a batch of a few megabytes, repeated.

y and dx repeat too, and the parameter gradients are so many times the smaller batch's, so that
nothing large has to be computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph import NormSpec
from normgraph.errors import AccuracyError
from normgraph.scripts.bench_check import as_numpy, results_of, slack_of, worst_outside
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.verify_inputs import Case, Inputs
from normgraph.scripts.verify_tolerance import relative, scale_of

Array = NDArray[Any]

REPEATED = 16 << 20


class Batch:
    """Inputs of one shape, made of a smaller batch repeated `times` where it exceeds REPEATED.

    The smaller one has REPEATED bytes or the next more that go into the batch without a rest.
    """

    def __init__(self, spec: NormSpec, shape: tuple[int, ...]) -> None:
        self.shape = shape
        most = max(1, min(4 * prod(shape) // REPEATED, shape[0]))
        self.times = next(n for n in range(most, 0, -1) if shape[0] % n == 0)
        self.base = (shape[0] // self.times, *shape[1:])
        self.inputs = Inputs(spec, "float32", Case(self.base, 0.0), seed=0)
        self._tiled: dict[str, Array] = {}

    def take(self, names: Sequence[str]) -> dict[str, Array]:
        """Inputs by name: those with a batch are repeated."""
        for name in names:
            if name not in self._tiled:
                value = self.inputs.values[name]
                along = name in ("x", "dy") or (
                    name in ("mean", "inv_std") and self.inputs.spec.op != "batch_norm"
                )
                if along and self.times > 1:
                    value = np.tile(value, (self.times, *(1,) * (value.ndim - 1)))
                self._tiled[name] = value
        return {name: self._tiled[name] for name in names}

    def check(self, peer: Peer, kind: str, want: Mapping[str, Array]) -> None:
        """Raise AccuracyError where a result is far from the smaller batch's."""
        conditions = self.inputs.conditions(kind)
        for name, value in results_of(peer, kind, want).items():
            if name.startswith("new_running"):
                continue
            found, right = as_numpy(value), want[name]
            summed = name in ("dgamma", "dbeta")
            parts = 1 if summed or found.size == right.size else self.times
            factor = self.times if summed else 1
            bound = slack_of(peer, "float32") * factor * relative(name, "float32", conditions)
            bound *= scale_of(name, right, conditions)
            right = factor * right
            divided = found.reshape(parts, -1)
            for place, part in enumerate(divided):
                # What equals a part that was right is right, and comparing takes a fraction.
                if place and np.array_equal(part, divided[0]):
                    continue
                error = worst_outside(part, right, bound, "float32")
                if error is not None:
                    raise AccuracyError(f"{peer.name}, {kind}, {name}: off by {error:.1e}")
