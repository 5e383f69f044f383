"""Inputs for each kind of graph, and the shapes an artifact is checked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.errors import ArgumentError
from normgraph.scripts.verify_tolerance import Conditions, kappa_of, numpy_dtype
from normgraph.spec import compute_dtype

Array = NDArray[Any]

# What the symbolic dimensions are set to, in the order the names appear. Odd, prime and uneven, so
# that every vector loop has a tail; then a batch of one; then a row longer than a cache line.
_SIZES = ((3, 7, 5, 2, 3), (1, 13, 11, 3, 2), (2, 37, 19, 3, 2))


@dataclass(frozen=True)
class Case:
    """One shape of x and the mean of its values (they have unit variance), or data by name."""

    shape: tuple[int, ...]
    mean: float
    name: str = ""

    @property
    def label(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{size} {self.name or f'N({self.mean:g},1)'}"


def cases(declared: Sequence[int | str], shape: Sequence[int] | None) -> list[Case]:
    """The cases of an artifact: at `shape` if given, else at its own or at the sizes above."""
    if shape is not None:
        check_shape(declared, shape)
        shapes = [tuple(shape)]
    else:
        shapes = list(dict.fromkeys(_bind(declared, sizes) for sizes in _SIZES))
    return [Case(each, mean) for each in shapes for mean in (0.0, 100.0)]


def _bind(declared: Sequence[int | str], sizes: Sequence[int]) -> tuple[int, ...]:
    names = list(dict.fromkeys(dim for dim in declared if isinstance(dim, str)))
    # A lone name is the batch as a rule, and a batch of one may be all its statistics have.
    first = 1 if len(names) == 1 else 0
    bound = {name: sizes[(first + place) % len(sizes)] for place, name in enumerate(names)}
    return tuple(dim if isinstance(dim, int) else bound[dim] for dim in declared)


def check_shape(declared: Sequence[int | str], shape: Sequence[int]) -> None:
    """Raise ArgumentError unless `shape` is one the artifact was built for."""
    wanted = ",".join(map(str, declared))
    came = ",".join(map(str, shape))
    bound: dict[str, int] = {}
    fits = len(shape) == len(declared) and all(
        size > 0 and (dim == size if isinstance(dim, int) else bound.setdefault(dim, size) == size)
        for dim, size in zip(declared, shape, strict=False)
    )
    if not fits:
        raise ArgumentError(
            f"expected a shape that fits {wanted} with every size at least 1, got {came}; "
            "give another --shape or build the artifact for this one"
        )
    if prod(shape) >= 2**59:
        raise ArgumentError(
            f"expected a shape that memory can hold, got {came}; take a smaller one"
        )


def parameter_shape(spec: NormSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of gamma and beta: (C,) or the normalised dimensions."""
    count = spec.normalized_ndim
    return (shape[1],) if count is None else tuple(shape[len(shape) - count :])


def forward_names(spec: NormSpec) -> tuple[str, ...]:
    """The inputs of forward: what the operator lacks it does not take."""
    names = ["x"]
    names += ["gamma"] if spec.weight else []
    names += ["beta"] if spec.bias else []
    if spec.track_running_stats:
        names += ["running_mean", "running_var"]
        names += ["momentum"] if spec.momentum is None else []
    return tuple(names)


class Inputs:
    """The inputs of every kind for one case: random, with a seed, in the dtypes of the graphs.

    x is N(mean, 1) and dy N(0, 1). |gamma| is in [0.5, 1.5] with either sign, beta in [-1, 1]. The
    running statistics are near those of x. The saved statistics, and y for backward_from_output,
    are the float64 reference's rounded to the dtype the graph takes, so each kind is checked by
    itself. Arrays in `data` take the place of the random ones of the same name.
    """

    def __init__(
        self,
        spec: NormSpec,
        dtype: str,
        case: Case,
        seed: int,
        data: Mapping[str, Array] | None = None,
    ) -> None:
        random = np.random.default_rng([seed, *case.shape, int(case.mean)])
        self.spec, self.dtype, self.case = spec, dtype, case
        stats = numpy_dtype(compute_dtype(dtype))
        values = numpy_dtype(dtype)
        parameters = numpy_dtype(spec.param_dtype or dtype)
        shape = parameter_shape(spec, case.shape)
        signs = np.where(random.random(shape) < 0.25, -1.0, 1.0)
        channels = case.shape[1:2]
        self.values: dict[str, Array] = {
            "x": (random.standard_normal(case.shape) + case.mean).astype(values),
            "dy": random.standard_normal(case.shape).astype(values),
            "gamma": (signs * random.uniform(0.5, 1.5, shape)).astype(parameters),
            "beta": random.uniform(-1.0, 1.0, shape).astype(parameters),
            "running_mean": (case.mean + random.standard_normal(channels) / 4).astype(stats),
            "running_var": random.uniform(0.5, 1.5, channels).astype(stats),
            "momentum": np.asarray(0.25, stats),
        }
        for name, array in (data or {}).items():
            self.values[name] = np.asarray(array).astype(self.values[name].dtype)
        saved = reference.run(spec, "forward", self.take(forward_names(spec)))
        for name in ("mean", "inv_std"):
            if name in saved:
                self.values[name] = saved[name].astype(stats)
        self.values["y"] = saved["y"].astype(values)
        self.row = max(1, self.values["x"].size // max(1, self.values["inv_std"].size))

    def take(self, names: Sequence[str]) -> dict[str, Array]:
        """The inputs of these names, in this order."""
        return {name: self.values[name] for name in names}

    def conditions(self, kind: str) -> Conditions:
        """What the tolerance of this kind depends on."""
        v = self.values
        gamma = np.abs(v["gamma"].astype(np.float64)) if self.spec.weight else np.ones(())
        gradient = kind.startswith("backward")
        inv_std = v["inv_std"].astype(np.float64)
        if kind == "backward_frozen":
            inv_std = 1.0 / np.sqrt(v["running_var"].astype(np.float64))
        kappa, from_output = 1.0, 1.0
        if kind == "backward_from_output":
            from_output = float(np.abs(v["y"].astype(np.float64)).max() / gamma.min())
        elif self.spec.op != "rms_norm":
            kappa = kappa_of(v["x"])
        return Conditions(
            kappa=kappa,
            row=self.row,
            column=v["x"].size // max(1, v["gamma"].size) if gradient else 0,
            x=float(np.sqrt(np.mean(v["x"].astype(np.float64) ** 2))),
            dy=float(np.sqrt(np.mean(v["dy"].astype(np.float64) ** 2))) if gradient else 0.0,
            factor=float(gamma.max() * inv_std.max()) if gradient else 0.0,
            inv_std=float(inv_std.max()),
            from_output=from_output,
        )
