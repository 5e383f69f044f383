"""The tolerance: what it promises, and how it grows."""

from __future__ import annotations

import numpy as np
import pytest

from normgraph.scripts.verify_tolerance import (
    Conditions,
    allowed,
    describe,
    kappa_of,
    relative,
    scale_of,
    ulp,
)


@pytest.mark.parametrize("row", [1, 7, 49, 3136, 262144, 10**7])
def test_never_above_what_is_promised(row: int) -> None:
    column = 32 * row
    at_zero, at_hundred = Conditions(1.0, row, column), Conditions(100.005, row, column)
    for output in ("y", "dx", "dgamma", "mean"):
        assert relative(output, "float32", at_zero) <= 2e-5
        assert relative(output, "float32", at_hundred) <= 2.001e-4
        assert relative(output, "float64", at_zero) <= 1e-12
        assert relative(output, "float64", at_hundred) <= 1e-12
        assert relative(output, "float16", at_zero) == relative(output, "float32", at_zero)


def test_grows_with_the_length_of_the_sum_and_with_kappa_until_the_cap() -> None:
    def at(kappa: float, row: int) -> float:
        return relative("y", "float32", Conditions(kappa, row, 0))

    assert at(1.0, 1) == pytest.approx(9 * 2.0**-24)
    assert at(1.0, 64) == pytest.approx(16 * 2.0**-24)
    assert at(2.0, 64) == pytest.approx(2 * at(1.0, 64))
    assert at(100.0, 10**8) == pytest.approx(2e-4)


def test_plain_sums_do_not_grow_with_kappa() -> None:
    conditions = Conditions(100.0, 49, 0, from_output=50.0)
    assert relative("mean", "float32", conditions) == pytest.approx(15 * 2.0**-24)
    assert relative("dbeta", "float32", conditions) == pytest.approx(15 * 2.0**-24)
    assert relative("dx", "float32", conditions) > 100 * relative("dbeta", "float32", conditions)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_ulp_is_numpys_spacing(dtype: str) -> None:
    random = np.random.default_rng(0)
    exponents = random.integers(-14, 15, 200)
    values = (random.uniform(1, 2, 200) * 2.0**exponents).astype(dtype)
    np.testing.assert_array_equal(ulp(values, dtype), np.spacing(values).astype(np.float64))
    assert ulp(np.zeros(1), dtype)[0] == np.spacing(np.zeros(1, dtype))[0]


def test_an_ulp_of_bfloat16() -> None:
    np.testing.assert_array_equal(ulp(np.array([1.0, 100.0]), "bfloat16"), [2.0**-7, 0.5])


def test_half_types_may_be_off_by_one_unit_more() -> None:
    want = np.array([1.0, -2.0, 0.25])
    conditions = Conditions(1.0, 49, 0)
    extra = allowed("y", "float16", want, conditions) - allowed("y", "float32", want, conditions)
    np.testing.assert_allclose(extra, ulp(want, "float16"), rtol=1e-9)


def test_a_sum_that_cancels_is_held_to_the_size_of_its_terms() -> None:
    conditions = Conditions(1.0, 4, 100, x=1.0, dy=2.0, factor=3.0, inv_std=1.0)
    nothing = np.zeros(3)
    assert scale_of("dbeta", nothing, conditions) == 20.0
    assert scale_of("dx", nothing, conditions) == 6.0
    assert scale_of("mean", nothing, conditions) == 0.5
    assert scale_of("y", nothing, conditions) == 0.0
    assert scale_of("dbeta", np.array([30.0, -50.0]), conditions) == 50.0


def test_kappa_is_that_of_the_data() -> None:
    x = np.random.default_rng(0).standard_normal(100_000)
    assert kappa_of(x) == pytest.approx(1.0, abs=1e-4)
    assert kappa_of(x + 100) == pytest.approx(100.0, rel=1e-2)
    assert kappa_of(np.ones(3)) == 1.0
    assert kappa_of(np.ones(0)) == 1.0


def test_the_words_name_what_decided() -> None:
    small = Conditions(1.0, 49, 0)
    assert (
        describe("y", "float32", small) == "2^-24 * kappa 1 * (8 + sqrt(49)) of the largest value"
    )
    assert describe("y", "float16", small).endswith("+ 1 ulp of float16")
    assert describe("y", "float32", Conditions(1.0, 10**8, 0)).startswith("cap 2e-5")
    assert "max|y|/min|gamma| 50" in describe("dx", "float32", Conditions(1, 1, 1, from_output=50))
