"""The self-test: inputs with float64 answers that travel with an artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from normgraph.graphs import reference
from normgraph.spec import NormSpec

Array = npt.NDArray[Any]

# Sizes for symbolic dims: short odd ones, then rows longer than any vector, with a tail. Kernels
# leave small inputs to one thread, so the second case is grown to more elements than that.
_SIZES = ((3, 5, 2, 7, 3), (2, 7, 13, 5, 3))
_PARALLEL_ELEMENTS = 40000

# x is drawn twice: of a variance that eps counts against, and around a mean so large that without
# delta, the correction of the rounded mean, the answers are outside their bounds.
_SMALL_SCALE = 1e-2
_LARGE_MEAN = {"float64": 1e12, "float32": 1e6, "float16": 1e2, "bfloat16": 3.0}
# A static shape above this many elements gets the second of the two alone.
_TESTED_TWICE = 2**21

# Larger arrays are stored as this many elements (a prime) repeated over the shape, and their
# answers as this many samples.
_STORED = 2053

_UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# What no relative bound covers: the distance between subnormal numbers of float16; in bfloat16 all
# of them, which AVX512-BF16 rounds to zero.
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph as the manifest lists it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Case:
    """One call of one kind: full inputs, the float64 answers and the error that is allowed."""

    kind: str
    prefix: str
    inputs: Mapping[str, Array]
    answers: Mapping[str, Array]
    tolerance: Mapping[str, float]
    stored: Mapping[str, Array]

    def entry(self) -> dict[str, Any]:
        """The case as the manifest lists it."""
        return {
            "kind": self.kind,
            "prefix": self.prefix,
            "shapes": {name: list(a.shape) for name, a in self.inputs.items()},
            "tolerance": dict(self.tolerance),
        }


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a normgraph dtype name."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def cases(spec: NormSpec, kind: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> list[Case]:
    """Self-test cases of one kind, the same for every build."""
    small, large = _sizes(inputs)
    made = [_case(spec, kind, inputs, outputs, f"{kind}.large_mean", large, small_scale=False)]
    if max(_count(port.shape, small) for port in inputs) <= _TESTED_TWICE:
        prefix = f"{kind}.small_variance"
        made.append(_case(spec, kind, inputs, outputs, prefix, small, small_scale=True))
    return made


def most_elements(inputs: Sequence[Port]) -> int:
    """Of an input in the self-test cases of a kind with these inputs.

    The small case has more where it is left out, alone.
    """
    _, large = _sizes(inputs)
    return max(_count(port.shape, large) for port in inputs)


def _sizes(inputs: Sequence[Port]) -> tuple[dict[str, int], dict[str, int]]:
    """Of the symbolic dims, in the small case and in the large one."""
    dims = list(dict.fromkeys(d for p in inputs for d in p.shape if isinstance(d, str)))
    small, large = (dict(zip(dims, size, strict=False)) for size in _SIZES)
    while dims and max(_count(port.shape, large) for port in inputs) < _PARALLEL_ELEMENTS:
        large[dims[-1]] = 2 * large[dims[-1]] + 1
    return small, large


def _count(shape: Sequence[int | str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[d] if isinstance(d, str) else d for d in shape)


def _case(
    spec: NormSpec,
    kind: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    prefix: str,
    sizes: Mapping[str, int],
    *,
    small_scale: bool,
) -> Case:
    # The legacy generator's stream is fixed for good, so a rebuild makes the same bytes.
    random = np.random.RandomState(20150211)
    values: dict[str, Array] = {}
    stored: dict[str, Array] = {}
    for port in inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in port.shape)
        values[port.name], pattern = _draw(random, port, shape, small_scale=small_scale)
        stored[f"{prefix}.in.{port.name}"] = _bits(pattern)
    _replace_dependent(spec, inputs, values, stored, prefix)
    answers = reference.run(spec, kind, values, debug=True)
    tolerance: dict[str, float] = {}
    for port in outputs:
        answer = np.asarray(answers[port.name], np.float64)
        tolerance[port.name] = _tolerance(port.name, port.dtype, values, answer)
        if answer.size > _STORED:
            at = np.sort(random.randint(0, answer.size, _STORED)).astype(np.int64)
            stored[f"{prefix}.at.{port.name}"] = at
            answer = answer.ravel()[at]
        stored[f"{prefix}.out.{port.name}"] = answer
    return Case(kind, prefix, values, answers, tolerance, stored)


def _draw(
    random: np.random.RandomState, port: Port, shape: tuple[int, ...], *, small_scale: bool
) -> tuple[Array, Array]:
    """A full input and the pattern it repeats."""
    count = int(np.prod(shape, dtype=np.int64))
    pattern: Array = random.randn(min(count, _STORED))
    if port.name in ("gamma", "running_var", "inv_std"):
        pattern = 0.5 + np.abs(pattern)
    if port.name in ("x", "y"):
        pattern = pattern * _SMALL_SCALE if small_scale else pattern + _LARGE_MEAN[port.dtype]
    if port.name == "momentum":
        pattern = np.full(1, 0.3)
    pattern = pattern.astype(dtype_of(port.dtype))
    if count <= _STORED:
        pattern = pattern.reshape(shape)
    return np.resize(pattern, shape), pattern


def _replace_dependent(
    spec: NormSpec,
    inputs: Sequence[Port],
    values: dict[str, Array],
    stored: dict[str, Array],
    prefix: str,
) -> None:
    """Statistics and y are those of a forward call, not free inputs."""
    wanted = [p for p in inputs if p.name in ("mean", "inv_std", "y")]
    if not wanted:
        return
    source = next(p for p in inputs if p.name in ("x", "y"))
    affine = {n: v for n, v in values.items() if n in ("gamma", "beta")}
    plain = replace(
        spec,
        weight="gamma" in affine,
        bias="beta" in affine,
        track_running_stats=False,
        momentum=math.nan,
        convention="torch",
    )
    forward = reference.run(plain, "forward", {"x": values[source.name], **affine})
    for port in wanted:
        full = np.asarray(forward[port.name]).astype(dtype_of(port.dtype))
        values[port.name] = full
        stored[f"{prefix}.in.{port.name}"] = _bits(full)


def _tolerance(name: str, dtype: str, values: Mapping[str, Array], answer: Array) -> float:
    """The bound of a build's gate: 2e-5 of the output's size in float32, 1e-12 in float64, one unit
    of a half type on top. From the output, x_hat = (y - beta)/gamma loses |y|/|gamma| ulps.
    """
    size = max(_largest(answer), _terms(name, values))
    relative = 1e-12 if dtype == "float64" else 2e-5
    if "y" in values and "gamma" in values:
        relative *= 1.0 + _largest(values["y"]) / float(
            np.min(np.abs(values["gamma"].astype(np.float64)))
        )
    if dtype in ("float16", "bfloat16"):
        relative += _UNITS[dtype]
    return relative * size + _SMALLEST.get(dtype, 0.0)


def _terms(name: str, values: Mapping[str, Array]) -> float:
    """The size of the terms an output is the sum of. Rounding is relative to it where they cancel,
    as they do in dx of short rows and in delta always.
    """
    scale = _largest(values["gamma"]) if "gamma" in values else 1.0
    if "inv_std" in values:
        scale *= _largest(values["inv_std"])
    if name in ("dx", "dmean", "dvar"):
        return scale * _rms(values["dy"])
    if name in ("dgamma", "dbeta"):
        return _rms(values["dy"])
    if name in ("mean", "new_running_mean", "delta"):
        return _rms(values["x"] if "x" in values else values["y"])
    return 0.0


def _largest(array: Array) -> float:
    return float(np.max(np.abs(_finite(array)), initial=0.0))


def _rms(array: Array) -> float:
    finite = _finite(array)
    return float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0


def _finite(array: Array) -> Array:
    wide = array.astype(np.float64)
    return wide[np.isfinite(wide)]


def _bits(array: Array) -> Array:
    return array.view(np.uint16) if array.dtype == dtype_of("bfloat16") else array
