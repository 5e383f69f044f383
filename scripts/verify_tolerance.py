"""How far a result may be from float64: a function of dtype, length and conditioning.

With u the unit roundoff of the arithmetic (2^-24 for float32 and both half types, 2^-53 for
float64), L the number of terms in the longest sum behind a value and kappa = sqrt(1 + mu^2/sigma^2)
the condition of x - mean (mu and sigma are the mean and the standard deviation of the whole of x):

    relative = min(u * kappa * (8 + sqrt(L)), cap)        cap = 2e-5 * sqrt(kappa)  or  1e-12
    allowed  = relative * scale + one unit in the last place of the value (half types only)

- sqrt(L): the rounding errors of a sum are of either sign and grow as a random walk; L itself
  would be the worst case, reached by no data.
- 8: the roundings outside the sums, on the longest chain of operations behind one value.
- kappa: x and mean carry errors relative to their own size, x - mean is smaller by kappa. Sums of
  x or of dy alone (`mean`, `new_running_mean`, `dbeta`) have kappa 1.
- scale: the largest value of the tensor; where the values are sums that cancel, not less than the
  size such a sum has when its terms are of random sign (`scale_of`). No formula in floating point
  knows a sum better than its terms.
- backward_from_output: x_hat = (y - beta)/gamma loses |y|/|gamma| units, so `relative` is taken
  max(1, max|y| / min|gamma|) times; not for dbeta, which needs no x_hat.
- the cap holds the model to the promise made for float32: 2e-5 of the largest value at mean 0 and
  2e-4 at mean 100 times sigma; 1e-12 for float64.
- onnxruntime adds long sums nearly in order, so that roundings of one sign pile up: it has L/64 on
  top of sqrt(L) and no cap. It is held to its graph to find a wrong graph; its accuracy is its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

ROUNDOFF = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
# Bits behind the binary point and smallest normal exponent.
_FORMAT = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
}
_HALF = ("float16", "bfloat16")
# Rows shorter than this cancel: x_hat is nearly +-1 and dx is a small difference of its terms.
_SHORT_ROW = 8


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 is that of ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def ulp(values: Array, dtype: str) -> Float64:
    """One unit in the last place of `dtype` at each value: 2^(exponent - bits)."""
    bits, smallest = _FORMAT[dtype]
    fraction, exponent = np.frexp(np.abs(np.asarray(values, np.float64)))
    normal = np.where(fraction > 0.0, np.maximum(exponent - 1, smallest), smallest)
    units: Float64 = np.ldexp(1.0, normal - bits)
    return units


@dataclass(frozen=True)
class Conditions:
    """What of the input decides how well a result can be known.

    kappa       sqrt(1 + mu^2/sigma^2) of the whole of x; 1 where nothing is centred
    row         elements behind one mean: m
    column      elements behind one parameter gradient; 0 without a gradient
    x           root mean square of x
    dy, factor  root mean square of dy; largest |gamma| * inv_std (0 without a gradient)
    inv_std     largest inverse standard deviation
    from_output max|y| / min|gamma| in backward_from_output, else 1
    """

    kappa: float
    row: int
    column: int
    x: float = 0.0
    dy: float = 0.0
    factor: float = 0.0
    inv_std: float = 0.0
    from_output: float = 1.0

    def of(self, output: str) -> Conditions:
        """The conditions of one output: plain sums have no difference to lose digits in."""
        plain = output in ("mean", "new_running_mean", "dbeta")
        return replace(self, kappa=1.0, from_output=1.0) if plain else self


def kappa_of(x: Array) -> float:
    """sqrt(1 + mu^2/sigma^2) over all of x; 1 for constant or empty x, which has no sigma."""
    wide = np.asarray(x, np.float64)
    deviation = float(wide.std()) if wide.size else 0.0
    return math.hypot(1.0, float(wide.mean()) / deviation) if deviation > 0.0 else 1.0


def relative(output: str, dtype: str, conditions: Conditions, *, in_order: bool = False) -> float:
    """The allowed error relative to the scale, before the half types' unit in the last place.

    `in_order`: for sums added in order, as onnxruntime does.
    """
    c = conditions.of(output)
    bound = _grown(dtype, c)
    if in_order:
        bound += ROUNDOFF[dtype] * c.kappa * _length(c) / 64.0
    else:
        bound = min(bound, _cap(dtype, c))
    return bound * max(1.0, c.from_output)


def _grown(dtype: str, c: Conditions) -> float:
    return ROUNDOFF[dtype] * c.kappa * (8.0 + math.sqrt(_length(c)))


def _cap(dtype: str, c: Conditions) -> float:
    return 1e-12 if dtype == "float64" else 2e-5 * math.sqrt(c.kappa)


def _length(c: Conditions) -> int:
    return max(c.row, c.column, 1)


def scale_of(output: str, want: Float64, conditions: Conditions) -> float:
    """The largest |value|; for a sum that cancels, at least the size of a random one."""
    largest = float(np.max(np.abs(want), initial=0.0))
    c = conditions
    row, column = math.sqrt(c.row), math.sqrt(c.column)
    least = {
        "mean": c.x / max(row, 1.0),
        "dx": c.factor * c.dy if c.row < _SHORT_ROW else 0.0,
        "dvar": 0.5 * c.factor * c.inv_std * c.dy * row,
        "dmean": c.factor * c.dy * row,
        "dgamma": c.dy * column,
        "dbeta": c.dy * column,
    }.get(output, 0.0)
    return max(largest, least)


def allowed(
    output: str, dtype: str, want: Float64, conditions: Conditions, *, in_order: bool = False
) -> Float64:
    """The largest error each element of `output` may have; same shape as `want`."""
    share = relative(output, dtype, conditions, in_order=in_order)
    bound: Float64 = np.full(want.shape, share * scale_of(output, want, conditions))
    if dtype == "bfloat16":
        # AVX512-BF16 rounds numbers below the least of full precision to zero.
        bound = bound + np.where(np.abs(want) < 2.0**-126, 2.0**-126, 0.0)
    return bound + ulp(want, dtype) if dtype in _HALF else bound


def describe(output: str, dtype: str, conditions: Conditions, *, in_order: bool = False) -> str:
    """The tolerance in words, with its numbers."""
    c = conditions.of(output)
    u = "2^-53" if dtype == "float64" else "2^-24"
    piled = f" + {_length(c)}/64" if in_order else ""
    text = f"{u} * kappa {c.kappa:.3g} * (8 + sqrt({_length(c)}){piled})"
    if not in_order and _cap(dtype, c) < _grown(dtype, c):
        text = "cap 1e-12" if dtype == "float64" else f"cap 2e-5 * sqrt(kappa {c.kappa:.3g})"
    if c.from_output > 1.0:
        text += f" * max|y|/min|gamma| {c.from_output:.3g}"
    text += " of the largest value"
    return f"{text} + 1 ulp of {dtype}" if dtype in _HALF else text
