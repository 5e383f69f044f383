"""Calling kernels by kind, and the bounds results are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from normgraph.scripts.verify_tolerance import ulp

Array = NDArray[Any]
Within = Callable[..., None]


@pytest.fixture(scope="session")
def call() -> Callable[..., dict[str, Array]]:
    """call(operator, kind, inputs): the kernel's outputs by name."""

    def run(operator: Any, kind: str, inputs: dict[str, Array]) -> dict[str, Array]:
        found = operator.call(kind, *inputs.values())
        names = [entry["name"] for entry in operator.manifest["kinds"][kind]["outputs"]]
        values = found if isinstance(found, tuple) else (found,)
        return dict(zip(names, values, strict=True))

    return run


@pytest.fixture(scope="session")
def names() -> Callable[[Any, str], list[str]]:
    """names(operator, kind): the kind's inputs, in order."""

    def inputs(operator: Any, kind: str) -> list[str]:
        return [entry["name"] for entry in operator.manifest["kinds"][kind]["inputs"]]

    return inputs


@pytest.fixture(scope="session")
def within() -> Within:
    """within(got, want, dtype, mean, where, factor=1): hold a result to its bound.

    dtype is that of `got`; half types have one unit in their last place on top of the float32
    bound. `factor` widens the bound where the input itself lost digits.
    """

    def check(
        got: Array, want: Array, dtype: str, mean: float, where: str, factor: float = 1.0
    ) -> None:
        assert got.shape == want.shape, where
        assert got.dtype.name == dtype, where
        wide = got.astype(np.float64)
        single = 2e-5 if mean == 0.0 else 2e-4
        share = 1e-12 if dtype == "float64" else single
        allowed = np.full(want.shape, factor * share * np.max(np.abs(want), initial=0.0))
        if dtype in ("float16", "bfloat16"):
            allowed += ulp(want, dtype)
        error = np.abs(wide - want)
        assert np.all(error <= allowed), (
            f"{where}: off by {np.nanmax(error):.2e}, {np.max(allowed):.2e} allowed, "
            f"{np.isnan(wide).sum()} NaN"
        )

    return check
