"""`NormSpec`: which operator, with which options. Shape and dtype come with the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, SupportsFloat

from normgraph.errors import SpecError

DTYPES = ("float16", "bfloat16", "float32", "float64")
CONVENTIONS = ("torch", "onnx", "mxnet")

# Beside eps, weight and param_dtype, which every operator takes.
_OPTIONS = {
    "batch_norm": {"bias", "correction", "track_running_stats"},
    "instance_norm": {"bias", "correction", "track_running_stats"},
    "group_norm": {"bias", "correction", "groups"},
    "layer_norm": {"bias", "correction", "normalized_ndim"},
    "rms_norm": {"normalized_ndim", "eps=None"},
}
OPERATORS = tuple(_OPTIONS)

# torch weights the new value by momentum, the other two the old one.
_DEFAULT_MOMENTUM = {"torch": 0.1, "onnx": 0.9, "mxnet": 0.9}
_LEAST_FLOAT32, _MOST_FLOAT32 = 2.0**-149, 2.0**128 - 2.0**104
_MACHINE_EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


def compute_dtype(dtype: str) -> str:
    """The type a graph for x of `dtype` computes in, and keeps its statistics in.

    float64 for float64, float32 for every other.
    """
    return "float64" if check_dtype(dtype) == "float64" else "float32"


def check_dtype(dtype: object, what: str = "dtype") -> str:
    """Return `dtype` if it is one of the four strings in `DTYPES`, else raise `SpecError`."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    raise SpecError(f"{what}: expected one of {', '.join(DTYPES)}; got {dtype!r}")


@dataclass(frozen=True)
class NormSpec:
    """One operator of the normalization family and its options; hashable, checked when made.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, the statistics over the axes the operator
    names; rms_norm has no mean and no beta: y = x / sqrt(mean(x^2) + eps) * gamma.

    Fields (each reads back resolved):
        op: batch_norm, instance_norm, group_norm, layer_norm or rms_norm.
        eps: added to the variance, 1e-5. None (rms_norm only) is the machine epsilon of the
            type the graph computes in, filled in by `resolve`.
        groups: group_norm only, and required there.
        normalized_ndim: layer_norm and rms_norm: how many trailing axes are normalized; 1.
        weight, bias: whether there is a gamma, a beta. rms_norm has no bias.
        correction: the variance is the sum of squares over m - correction; 0 or 1.
        track_running_stats: forward updates running_mean and running_var, inference uses them.
            True for batch_norm, False for instance_norm, not an option of the others.
        momentum: None makes it a scalar input of the forward graph; left out (or NaN), it is
            the default of the convention.
        convention: "torch": new = old * (1 - momentum) + batch * momentum, variance over m - 1,
            0.1.
            "onnx", "mxnet": new = old * momentum + batch * (1 - momentum), variance over m, 0.9.
        param_dtype: the type of gamma, beta and their gradients; None is x's.

    Raises `SpecError` for a value that does not exist or does not fit the operator.
    """

    op: str
    eps: float | None = 1e-5
    groups: int | None = None
    normalized_ndim: int | None = None
    weight: bool = True
    bias: bool | None = None
    correction: int = 0
    track_running_stats: bool | None = None
    momentum: float | None = math.nan
    convention: str = "torch"
    param_dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.op, str) or self.op not in _OPTIONS:
            raise SpecError(f"op: expected one of {', '.join(OPERATORS)}; got {self.op!r}")
        self._resolve_eps()
        self._resolve_axes()
        self._resolve_parameters()
        self._resolve_running_stats()

    def _takes(self, option: str) -> bool:
        return option in _OPTIONS[self.op]

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, option: str, value: object, instead: str) -> SpecError:
        takers = ", ".join(op for op, options in _OPTIONS.items() if option in options)
        return SpecError(
            f"{self.op} has no {option} (operators that have it: {takers}); got {value!r}. "
            f"{instead}"
        )

    def _resolve_eps(self) -> None:
        if self.eps is None:
            if not self._takes("eps=None"):
                raise self._refuse("eps=None", None, "Give eps a number, such as 1e-5.")
            return
        if not _is_number(self.eps):
            raise SpecError(f"eps: expected a number; got {self.eps!r}")
        eps = _to_float(self.eps)
        if not (math.isfinite(eps) and eps >= 0):
            raise SpecError(f"eps: expected a finite number of at least 0; got {self.eps!r}")
        self._set("eps", eps)

    def _resolve_axes(self) -> None:
        if self._takes("groups"):
            if not _is_int(self.groups) or self.groups is None or self.groups < 1:
                raise SpecError(
                    f"{self.op} needs groups, an int of at least 1; got {self.groups!r}"
                )
            self._set("groups", int(self.groups))
        elif self.groups is not None:
            raise self._refuse("groups", self.groups, "Leave groups out.")
        if self._takes("normalized_ndim"):
            ndim = 1 if self.normalized_ndim is None else self.normalized_ndim
            if not _is_int(ndim) or ndim < 1:
                raise SpecError(f"normalized_ndim: expected an int of at least 1; got {ndim!r}")
            self._set("normalized_ndim", int(ndim))
        elif self.normalized_ndim is not None:
            raise self._refuse("normalized_ndim", self.normalized_ndim, "Leave it out.")

    def _resolve_parameters(self) -> None:
        bias = self._takes("bias") if self.bias is None else self.bias
        for name, value in (("weight", self.weight), ("bias", bias)):
            if not isinstance(value, bool):
                raise SpecError(f"{name}: expected True or False; got {value!r}")
        if bias and not self._takes("bias"):
            raise self._refuse("bias", bias, "Leave bias out or give False.")
        self._set("bias", bias)
        if not _is_int(self.correction) or self.correction not in (0, 1):
            raise SpecError(f"correction: expected 0 or 1; got {self.correction!r}")
        self._set("correction", int(self.correction))
        if self.correction and not self._takes("correction"):
            raise self._refuse("correction", self.correction, "Leave it out or give 0.")
        if self.param_dtype is not None:
            check_dtype(self.param_dtype, "param_dtype")

    def _resolve_running_stats(self) -> None:
        tracks = self.track_running_stats
        if tracks is None:
            tracks = self.op == "batch_norm"
        if not isinstance(tracks, bool):
            raise SpecError(f"track_running_stats: expected True or False; got {tracks!r}")
        if tracks and not self._takes("track_running_stats"):
            raise self._refuse("track_running_stats", tracks, "Leave it out or give False.")
        self._set("track_running_stats", tracks)
        if not isinstance(self.convention, str) or self.convention not in CONVENTIONS:
            raise SpecError(
                f"convention: expected one of {', '.join(CONVENTIONS)}; got {self.convention!r}"
            )
        default = _DEFAULT_MOMENTUM[self.convention]
        momentum, left_out = self.momentum, False
        if momentum is not None:
            if not _is_number(momentum):
                raise SpecError(f"momentum: expected a number or None; got {momentum!r}")
            momentum = _to_float(momentum)
            left_out = math.isnan(momentum)
            momentum = default if left_out else momentum
            if not 0 <= momentum <= 1:
                raise SpecError(f"momentum: expected a number from 0 to 1; got {momentum!r}")
        if not tracks and (momentum != default or self.convention != "torch"):
            given = [] if left_out else [f"momentum={momentum!r}"]
            given += [] if self.convention == "torch" else [f"convention={self.convention!r}"]
            raise SpecError(
                f"momentum and convention say how running statistics are updated, and this "
                f"{self.op} has none; got {', '.join(given)}. Leave them out"
                + (
                    ", or set track_running_stats=True."
                    if self._takes("track_running_stats")
                    else "."
                )
            )
        self._set("momentum", momentum)

    def resolve(self, dtype: str) -> NormSpec:
        """The spec with eps and param_dtype filled in for an x of `dtype`.

        Raises `SpecError` where param_dtype is neither x's type nor the one it computes in, and
        where the latter cannot hold eps.
        """
        core = compute_dtype(dtype)
        eps = _MACHINE_EPSILON[core] if self.eps is None else self.eps
        if core == "float32" and eps and not _LEAST_FLOAT32 <= eps <= _MOST_FLOAT32:
            raise SpecError(
                f"eps: expected 0 or a number that {core}, in which x of {dtype} is computed, can "
                f"hold ({_LEAST_FLOAT32:.3g} to {_MOST_FLOAT32:.3g}); got {eps!r}"
            )
        param_dtype = dtype if self.param_dtype is None else self.param_dtype
        if param_dtype not in (dtype, core):
            allowed = dtype if dtype == core else f"{dtype} or {core}"
            raise SpecError(
                f"param_dtype: expected {allowed} with x of {dtype}; got {param_dtype!r}"
            )
        return replace(self, eps=eps, param_dtype=param_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name; values are JSON's own types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NormSpec:
        """The spec `to_dict` was called on. Raises `SpecError` for a name that is no option."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown or "op" not in values:
            raise SpecError(
                f"expected op and any of {', '.join(known[1:])}; got "
                + (f"unknown {', '.join(unknown)}" if unknown else "no op")
            )
        return cls(**values)


def _to_float(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
