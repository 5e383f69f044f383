"""The five operators, calling their kernels by kind, and the bounds results are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.scripts.verify_inputs import Inputs
from normgraph.scripts.verify_tolerance import ulp

Array = NDArray[Any]
Within = Callable[..., None]
Row = tuple[NormSpec, tuple[int | str, ...]]

ROWS: dict[str, Row] = {
    "batch_norm": (NormSpec("batch_norm"), ("N", 6, "H", "W")),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), ("N", 6, "H", "W")),
    "group_norm": (NormSpec("group_norm", groups=2), ("N", 6, "H", "W")),
    "layer_norm": (NormSpec("layer_norm"), ("N", "T", 37)),
    "rms_norm": (NormSpec("rms_norm"), ("N", "T", 37)),
}


@pytest.fixture(scope="session", params=ROWS)
def op(request: pytest.FixtureRequest) -> str:
    """Each operator of the family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def rows() -> dict[str, Row]:
    """By operator: the spec and the declared shape most tests here use."""
    return ROWS


@pytest.fixture(scope="session")
def build_row(build_operator: Callable[..., Any]) -> Callable[..., Any]:
    """build_row(op, dtype="float32"): the operator of `rows`, compiled once."""

    def build(op: str, dtype: str = "float32") -> Any:
        return build_operator(*ROWS[op], dtype)

    return build


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


@pytest.fixture(scope="session")
def every_kind_within(
    call: Callable[..., dict[str, Array]], names: Callable[..., list[str]], within: Within
) -> Callable[[Any, Inputs, str], None]:
    """every_kind_within(operator, inputs, where): hold each kind to float64 NumPy."""

    def check(operator: Any, inputs: Inputs, where: str) -> None:
        for kind in operator.kinds:
            given = inputs.take(names(operator, kind))
            want = reference.run(operator.spec, kind, given)
            factor = inputs.conditions(kind).from_output
            found = call(operator, kind, given)
            assert set(found) == set(want)
            for entry in operator.manifest["kinds"][kind]["outputs"]:
                name, dtype = entry["name"], entry["dtype"]
                label = f"{where} {inputs.case.label} {kind} {name}"
                within(found[name], want[name], dtype, inputs.case.mean, label, factor)

    return check
