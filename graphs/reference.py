"""The equations of docs/derivations.md in float64 NumPy, two passes, to be read beside it.

Written apart from the graphs: only the table of axes and the signatures are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from normgraph.errors import ArgumentError
from normgraph.graphs.signature import names
from normgraph.graphs.table import ROWS, axes_of, axis_letters
from normgraph.spec import NormSpec

Array = npt.NDArray[np.float64]

_INTERMEDIATES = ("dvar", "dmean", "delta", "var", "scale", "shift")


def run(
    spec: NormSpec, kind: str, inputs: Mapping[str, npt.NDArray[Any]], *, debug: bool = False
) -> dict[str, Array]:
    """The outputs of the graph `kind` in float64, from inputs of any float dtype.

    Shapes are the graph's: x as given, mean and inv_std with the reduced axes kept as 1. Any
    dim of x may be 0. `spec` with eps=None takes the machine epsilon of x's compute type.
    `debug` adds the named intermediates that a debug build of the graph gives out.

    Raises `SpecError` for a kind the spec lacks, `ArgumentError` for a missing or surplus input.
    """
    wanted, outputs = names(spec, kind, centred=ROWS[spec.op].centred)
    if set(wanted) != set(inputs):
        raise ArgumentError(
            f"{kind}: expected the inputs {', '.join(wanted)}; got {', '.join(inputs)}"
        )
    like_x = inputs["y" if kind == "backward_from_output" else "x"]
    space = _Space(spec, np.shape(like_x), _eps(spec, like_x.dtype.name))
    values = {name: space.inside(name, np.asarray(v, np.float64)) for name, v in inputs.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        made = _KINDS[kind](spec, space, **values)
    extras = [name for name in _INTERMEDIATES if debug and name in made]
    return {name: space.outside(name, made[name]) for name in (*outputs, *extras)}


def _eps(spec: NormSpec, dtype: str) -> float:
    eps = spec.eps if spec.eps is not None else replace(spec, param_dtype=None).resolve(dtype).eps
    return 0.0 if eps is None else eps


@dataclass(frozen=True)
class _Space:
    """x's axes with group_norm's channels split, and sums over them."""

    spec: NormSpec
    shape: tuple[int, ...]
    eps: float

    @property
    def letters(self) -> str:
        """One letter an axis of `split`."""
        return axis_letters(self.spec, len(self.shape))

    @property
    def split(self) -> tuple[int, ...]:
        """x's shape with group_norm's channels as (groups, channels of a group)."""
        if self.spec.groups is None:
            return self.shape
        n, c, *spatial = self.shape
        return (n, self.spec.groups, c // self.spec.groups, *spatial)

    @property
    def stats(self) -> tuple[int, ...]:
        """The axes a statistic reduces."""
        return axes_of(self.letters, ROWS[self.spec.op].stats)

    @property
    def params(self) -> tuple[int, ...]:
        """The axes gamma, beta and the running statistics vary along."""
        return axes_of(self.letters, ROWS[self.spec.op].params)

    @property
    def m(self) -> int:
        """Elements of a slice."""
        return math.prod(self.split[a] for a in self.stats)

    @property
    def degrees(self) -> int:
        """m - correction, at least 1."""
        return max(self.m - self.spec.correction, 1)

    def inside(self, name: str, value: Array) -> Array:
        """An input in the shape it broadcasts against `split` in."""
        if name in ("x", "y", "dy"):
            return value.reshape(self.split)
        if name in ("gamma", "beta", "running_mean", "running_var"):
            dims = enumerate(self.split)
            return value.reshape([d if a in self.params else 1 for a, d in dims])
        return value

    def outside(self, name: str, value: Array) -> Array:
        """An output in the shape the graph gives it in."""
        if name in ("y", "dx"):
            return value.reshape(self.shape)
        if name in ("dgamma", "dbeta", "new_running_mean", "new_running_var"):
            outer = axis_letters(self.spec, len(self.shape), inside=False)
            return value.reshape([self.shape[a] for a in axes_of(outer, "cd")])
        return value

    def over_slice(self, value: Array) -> Array:
        """The sum over each statistic's slice."""
        total: Array = value.sum(axis=self.stats, keepdims=True)
        return total

    def mean_over_slice(self, value: Array) -> Array:
        """The mean over each statistic's slice; 0 where it is empty."""
        return self.over_slice(value) / max(self.m, 1)

    def over_all_but_params(self, value: Array) -> Array:
        """The sum over every axis that the parameters do not vary along."""
        axes = tuple(a for a in range(value.ndim) if a not in self.params)
        total: Array = value.sum(axis=axes, keepdims=True)
        return total

    def mean_over_batch(self, value: Array) -> Array:
        """The mean of a statistic over the axes that are neither reduced nor a parameter's."""
        axes = tuple(a for a in range(value.ndim) if a not in self.params + self.stats)
        mean: Array = value.sum(axis=axes, keepdims=True)
        mean /= max(math.prod(value.shape[a] for a in axes), 1)
        return mean


def _forward(
    spec: NormSpec,
    space: _Space,
    x: Array,
    gamma: Array | float = 1.0,
    beta: Array | float = 0.0,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: Array | None = None,
) -> dict[str, Array]:
    mean = space.mean_over_slice(x) if ROWS[spec.op].centred else np.zeros(())
    delta = space.mean_over_slice(x - mean) if ROWS[spec.op].centred else np.zeros(())
    squares = space.over_slice((x - mean) ** 2) - space.m * delta**2
    var = squares / space.degrees
    inv_std = 1 / np.sqrt(var + space.eps)
    y = (x - mean - delta) * inv_std * gamma + beta
    made = {"y": y, "mean": mean, "inv_std": inv_std, "delta": delta, "var": var}
    if not ROWS[spec.op].centred:
        del made["delta"], made["mean"]
    if running_mean is not None and running_var is not None:
        given = np.asarray(spec.momentum if momentum is None else momentum, np.float64)
        keep, rate = (1 - given, given) if spec.convention == "torch" else (given, 1 - given)
        if not x.size:
            keep, rate = np.ones(()), np.zeros(())
        over = max(space.m - 1, 1) if spec.convention == "torch" else max(space.m, 1)
        batch_mean, batch_var = map(space.mean_over_batch, (mean, squares / over))
        made["new_running_mean"] = keep * running_mean + rate * batch_mean
        made["new_running_var"] = keep * running_var + rate * batch_var
    return made


def _inference(
    spec: NormSpec,
    space: _Space,
    x: Array,
    gamma: Array | float = 1.0,
    beta: Array | float = 0.0,
    running_mean: Array | None = None,
    running_var: Array | None = None,
) -> dict[str, Array]:
    if running_mean is None or running_var is None:
        made = _forward(spec, space, x, gamma, beta)
        return {name: made[name] for name in ("y", "delta", "var") if name in made}
    scale = gamma / np.sqrt(running_var + space.eps)
    shift = beta - running_mean * scale
    return {"y": x * scale + shift, "scale": scale, "shift": shift}


def _gradients(
    spec: NormSpec, space: _Space, dy: Array, x_mu: Array, gamma: Array | float, inv_std: Array
) -> dict[str, Array]:
    """The gradients from x - mean, wherever that came from."""
    g = gamma * dy
    delta = space.mean_over_slice(x_mu) if ROWS[spec.op].centred else np.zeros_like(inv_std)
    dot = space.over_slice(g * x_mu) - delta * space.over_slice(g)
    dvar = -0.5 * inv_std**3 * dot
    dvar_dmean = -2 * delta * space.m / space.degrees
    dmean = -inv_std * space.over_slice(g) + dvar * dvar_dmean
    dx = g * inv_std + dvar * 2 * x_mu / space.degrees
    made = {"dvar": dvar}
    if ROWS[spec.op].centred:
        dx = dx + dmean / max(space.m, 1)
        made |= {"dmean": dmean, "delta": delta}
    dgamma = space.over_all_but_params(dy * (x_mu - delta) * inv_std)
    return {"dx": dx, "dgamma": dgamma, "dbeta": space.over_all_but_params(dy), **made}


def _backward(
    spec: NormSpec,
    space: _Space,
    dy: Array,
    x: Array,
    inv_std: Array,
    gamma: Array | float = 1.0,
    mean: Array | float = 0.0,
) -> dict[str, Array]:
    return _gradients(spec, space, dy, x - mean, gamma, inv_std)


def _backward_from_output(
    spec: NormSpec,
    space: _Space,
    dy: Array,
    y: Array,
    inv_std: Array,
    gamma: Array | float = 1.0,
    beta: Array | float = 0.0,
) -> dict[str, Array]:
    return _gradients(spec, space, dy, (y - beta) / gamma / inv_std, gamma, inv_std)


def _backward_frozen(
    spec: NormSpec,
    space: _Space,
    dy: Array,
    x: Array,
    running_mean: Array,
    running_var: Array,
    gamma: Array | float = 1.0,
) -> dict[str, Array]:
    inv_std = 1 / np.sqrt(running_var + space.eps)
    x_hat = (x - running_mean) * inv_std
    return {
        "dx": dy * gamma * inv_std,
        "dgamma": space.over_all_but_params(dy * x_hat),
        "dbeta": space.over_all_but_params(dy),
    }


_KINDS: dict[str, Callable[..., dict[str, Array]]] = {
    "forward": _forward,
    "inference": _inference,
    "backward": _backward,
    "backward_frozen": _backward_frozen,
    "backward_from_output": _backward_from_output,
}
