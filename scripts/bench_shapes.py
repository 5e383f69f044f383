"""Random shapes of the five operators, the same for the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from normgraph import NormSpec

OPERATORS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
# Bytes of x in float32; other dtypes have the same shapes.
LEAST, MOST = 4 * 1024, 64 * 1024 * 1024
# How many artifacts each operator has: one for each channel count or row length drawn.
_FAMILIES = 8
_SPACE = ("D", "H", "W")


@dataclass(frozen=True)
class Draw:
    """One shape of the draw, and the artifact that takes it."""

    number: int
    spec: NormSpec
    declared: tuple[int | str, ...]
    shape: tuple[int, ...]

    @property
    def family(self) -> tuple[NormSpec, tuple[int | str, ...]]:
        """What the shapes of one artifact share."""
        return self.spec, self.declared


def draw(count: int, seed: int) -> list[Draw]:
    """`count` shapes, the operators in turn, sizes of x spread evenly over their logarithms."""
    random = np.random.default_rng(seed)
    families = {op: [_family(random, op) for _ in range(_FAMILIES)] for op in OPERATORS}
    found = []
    for number in range(count):
        op = OPERATORS[number % len(OPERATORS)]
        spec, declared = families[op][int(random.integers(_FAMILIES))]
        elements = int(_spread(random, LEAST, MOST)) // 4
        found.append(Draw(number, spec, declared, _shape(random, op, declared, elements)))
    return found


def _family(random: np.random.Generator, op: str) -> tuple[NormSpec, tuple[int | str, ...]]:
    """A spec and the declared shape: the extents that parameters have are fixed, others open."""
    if op in ("layer_norm", "rms_norm"):
        return NormSpec(op), ("N", int(_spread(random, 8, 16384)))
    channels = int(_spread(random, 2, 1024))
    space = _SPACE[-int(random.choice((1, 2, 2, 2, 3))) :]
    if op == "group_norm":
        per_group = int(random.choice((1, 2, 4, 8, 16)))
        groups = max(2, channels // per_group)
        return NormSpec(op, groups=groups), ("N", groups * per_group, *space)
    return NormSpec(op), ("N", channels, *space)


def _shape(
    random: np.random.Generator, op: str, declared: tuple[int | str, ...], elements: int
) -> tuple[int, ...]:
    """Sizes for the open extents that make about `elements` in all, at least two a channel."""
    fixed = math.prod(dim for dim in declared if isinstance(dim, int))
    rest = max(2, elements // fixed)
    names = [dim for dim in declared[1:] if isinstance(dim, str)]
    space = 1
    sizes: dict[str, int] = {}
    # What the batch leaves goes to the extents of space, of unequal sizes.
    batch = int(_spread(random, 1, rest + 1)) if names else rest
    left = max(1, rest // batch)
    for place, name in enumerate(names):
        share = len(names) - place
        side = left ** (1.0 / share) * random.uniform(0.7, 1.4) if share > 1 else left
        sizes[name] = max(1, min(left, round(side)))
        left = max(1, left // sizes[name])
        space *= sizes[name]
    if space == 1 and names and op in ("instance_norm", "group_norm"):
        # One value has no variance: training refuses it.
        sizes[names[-1]] = space = 2
    sizes["N"] = max(2 if space == 1 else 1, batch)
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in declared)


def _spread(random: np.random.Generator, low: int, high: int) -> float:
    return float(np.exp(random.uniform(math.log(low), math.log(high))))
