"""Awkward values: far from zero, infinities and NaN, variances near and below eps, large ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from normgraph import NormSpec

Array = npt.NDArray[Any]
Sizes = tuple[tuple[int, ...], ...]
DTYPES = ("float32", "float16", "bfloat16")
IMAGE = ("N", 6, "H", "W")
# Parts of a warp, a block, several blocks a slice; columns.
IMAGES: Sizes = ((3, 6, 5, 7), (2, 6, 37, 41), (1, 6, 91, 91))
CASES: dict[str, tuple[NormSpec, tuple[int | str, ...], Sizes]] = {
    "batch_norm": (NormSpec("batch_norm"), IMAGE, IMAGES),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), IMAGE, IMAGES),
    "group_norm": (NormSpec("group_norm", groups=2), IMAGE, IMAGES),
    "layer_norm": (NormSpec("layer_norm"), ("N", 37), ((5, 37),)),
    "layer_norm of long rows": (NormSpec("layer_norm"), ("N", 8209), ((3, 8209),)),
    "rms_norm": (NormSpec("rms_norm"), ("N", 37), ((5, 37),)),
    "rms_norm of long rows": (NormSpec("rms_norm"), ("N", 8209), ((3, 8209),)),
    "channels last": (NormSpec("batch_norm"), ("N", 5), ((1000, 5),)),
}
CENTRED = [name for name in CASES if not name.startswith("rms")]


def poisoned(value: float) -> Any:
    """Puts `value` into two elements: the first, and one in the middle."""

    def put(array: Array) -> Array:
        flat = array.reshape(-1)
        flat[0] = flat[flat.size // 2] = value
        return array

    return put


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", CASES)
def test_infinities_and_nan(
    name: str, value: float, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    """They spoil their own slice and what sums over it, and nothing else."""
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype)
    for size in sizes:
        for kind in ("forward", "inference", "backward"):
            check_kind(artifact, kind, size, spoiled={"x": poisoned(value)})
        check_kind(artifact, "backward", size, spoiled={"dy": poisoned(value)})


@pytest.mark.parametrize("name", CENTRED)
def test_at_mean_a_million(name: str, build_emulated: Any, check_kind: Any) -> None:
    """float32 then has steps of 1/16; the zero term keeps y and dx at their own accuracy."""
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape)
    for size in sizes:
        for kind in ("forward", "backward"):
            check_kind(artifact, kind, size, mean=1e6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-2, 3e-3, 1e3])
@pytest.mark.parametrize("name", CASES)
def test_variances_near_eps_and_far_above(
    name: str, scale: float, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype)
    for kind in ("forward", "backward"):
        check_kind(artifact, kind, sizes[0], spoiled={"x": lambda x: x * x.dtype.type(scale)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CENTRED)
def test_slices_of_one_value(name: str, dtype: str, build_emulated: Any, check_kind: Any) -> None:
    """A variance of 0: y = beta."""
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype)
    for size in sizes:
        check_kind(artifact, "forward", size, spoiled={"x": lambda x: np.full_like(x, 3.0)})


@pytest.mark.parametrize("first", [(1, 0, 0), (1.0625, -1.0625, 2.0**-16)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_columns_of_half_types_are_centred_exactly(
    dtype: str, first: tuple[float, ...], build_emulated: Any, inputs_of: Any
) -> None:
    """x - shift has no rounding error, which would be the same in all blocks and move the mean.

    Each of 1056 blocks has 48 rows, of which it takes 3, with a mean of 1/3 or 2^-16 / 3, for
    the shift.
    """
    spec, shape, _ = CASES["channels last"]
    artifact = build_emulated(spec, shape, dtype)
    given = inputs_of(artifact, "forward", (1056 * 48, 5))
    column = np.tile(np.array([*first, *([-1.0625] * 22), 0, *([1.0625] * 22)]), 1056)
    x = np.repeat(column[:, None], 5, axis=1).astype(given["x"].dtype)
    came = artifact.call("forward", {**given, "x": x})
    assert not came.findings
    np.testing.assert_allclose(came.arrays["mean"].ravel(), column.mean(), rtol=0, atol=2e-9)
