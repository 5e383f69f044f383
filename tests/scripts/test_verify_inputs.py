"""The shapes and inputs an artifact is checked with."""

from __future__ import annotations

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.errors import ArgumentError
from normgraph.scripts.verify_inputs import Case, Inputs, cases, check_shape


def test_names_become_odd_and_prime_sizes_and_equal_names_equal_ones() -> None:
    found = cases(("N", 6, "H", "H"), None)
    assert {case.mean for case in found} == {0.0, 100.0}
    assert len({case.shape for case in found}) == 3
    for case in found:
        n, c, high, wide = case.shape
        assert c == 6
        assert high == wide
        assert n in (1, 2, 3)


def test_a_lone_name_is_more_than_one() -> None:
    assert {case.shape for case in cases(("N", 11), None)} == {(7, 11), (13, 11), (37, 11)}


def test_a_fixed_shape_is_taken_once() -> None:
    assert [case.shape for case in cases((2, 3), None)] == [(2, 3)] * 2
    assert [case.shape for case in cases(("N", 3), (5, 3))] == [(5, 3)] * 2


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 6), (2, 6, 0), (2, 6, 7, 1)])
def test_a_shape_the_artifact_does_not_take_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="N,6,H"):
        check_shape(("N", 6, "H"), shape)


def test_equal_names_must_have_equal_sizes() -> None:
    check_shape(("N", "N"), (4, 4))
    with pytest.raises(ArgumentError):
        check_shape(("N", "N"), (4, 5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_inputs_have_the_graphs_dtypes_and_depend_on_the_seed(dtype: str) -> None:
    spec = NormSpec("batch_norm", param_dtype="float32" if dtype.endswith("16") else None)
    core = "float64" if dtype == "float64" else "float32"
    first, same, other = (
        Inputs(spec, dtype, Case((3, 4, 5), 100.0), seed).values for seed in (1, 1, 2)
    )
    assert first["x"].dtype.name == first["y"].dtype.name == dtype
    assert first["gamma"].dtype.name == core
    assert first["mean"].dtype.name == first["running_var"].dtype.name == core
    assert first["mean"].shape == (1, 4, 1)
    np.testing.assert_array_equal(first["x"], same["x"])
    assert np.any(first["x"] != other["x"])


def test_given_data_takes_the_place_of_random_values() -> None:
    x = np.arange(60.0).reshape(3, 4, 5)
    inputs = Inputs(NormSpec("instance_norm"), "float32", Case((3, 4, 5), 0.0), 0, {"x": x})
    np.testing.assert_array_equal(inputs.values["x"], x.astype(np.float32))
    np.testing.assert_allclose(inputs.values["mean"][..., 0], x.mean(axis=2))
