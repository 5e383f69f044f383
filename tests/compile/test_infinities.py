"""`mean` of data with infinities is that of the plain sum, wherever in the slice they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph import NormSpec

Array = NDArray[Any]

# With every way through the rule: rows, short rows, several rows a slice, columns, all columns
# together; on the calling thread and on several.
CASES = (
    ("instance_norm", ("N", 3, "H", "W"), ((4, 3, 7, 7), (4, 3, 61, 67))),
    ("batch_norm", ("N", 3, "H", "W"), ((4, 3, 7, 7), (40, 3, 31, 33))),
    ("batch_norm", ("N", 40), ((30, 40), (1500, 40))),
    ("group_norm", ("N", 6, "H", "W"), ((4, 6, 7, 7),)),
    ("layer_norm", ("N", 48), ((5, 48), (1500, 48))),
)
OWN = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SIGNS = ((np.inf,), (-np.inf,), (np.inf, -np.inf), (np.nan,), (np.inf, np.nan))


def _slices(op: str, x: Array) -> Array:
    """x as (slices, elements of one)."""
    if op == "batch_norm":
        return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    if op == "group_norm":
        return x.reshape(x.shape[0] * 2, -1)
    return x.reshape(-1, int(np.prod(x.shape[2:]))) if op == "instance_norm" else x


def _placed(op: str, slices: Array, shape: tuple[int, ...]) -> Array:
    if op == "batch_norm":
        return np.moveaxis(slices.reshape(shape[1], shape[0], *shape[2:]), 0, 1).copy()
    return slices.reshape(shape).copy()


@pytest.mark.parametrize("dtype", OWN)
@pytest.mark.parametrize(("op", "declared", "shapes"), CASES)
def test_mean(
    op: str,
    declared: tuple[int | str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    build_operator: Callable[..., Any],
) -> None:
    spec = NormSpec(op, groups=2 if op == "group_norm" else None)
    operator = build_operator(spec, declared, dtype, kinds=("forward",))
    random = np.random.default_rng(0)
    for shape in shapes:
        x = random.standard_normal(shape).astype(OWN[dtype])
        channels = shape[-1] if op == "layer_norm" else shape[1]
        affine = [np.ones(channels, OWN[dtype]), np.zeros(channels, OWN[dtype])]
        if op == "batch_norm":
            affine += [np.zeros(channels, np.float32), np.ones(channels, np.float32)]
        length = _slices(op, x).shape[1]
        # The first elements are sampled, the last are not.
        for first in (0, 1, length // 2, length - 2):
            for values in SIGNS:
                slices = _slices(op, x).copy()
                for k, value in enumerate(values):
                    slices[::2, (first + k * (length // 2)) % length] = value
                with np.errstate(invalid="ignore"):
                    want = slices.astype(np.float64).mean(axis=1)
                found = operator.forward(_placed(op, slices, shape), *affine)
                mean = found.mean.astype(np.float64).ravel()
                where = f"{shape}, {values} at {first}"
                np.testing.assert_allclose(mean, want, rtol=2e-5, atol=2e-5, err_msg=where)
                assert np.isnan(_slices(op, found.y.astype(np.float32))[::2]).all(), where
                assert np.isfinite(_slices(op, found.y.astype(np.float32))[1::2]).all(), where
