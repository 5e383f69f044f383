"""Calling an operator: what comes back, and every option of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", ["forward", "inference", "backward", "backward_from_output"])
def test_every_kind_returns_its_outputs_in_order(toy: Any, kind: str, dtype: str) -> None:
    op = toy.operator(dtype)
    inputs = toy.inputs(kind, dtype=np.dtype(dtype))
    given = op.call(kind, *inputs)
    given = given if isinstance(given, tuple) else (given,)
    for spec, got in zip(op.signature(kind).outputs, given, strict=True):
        assert type(got) is np.ndarray
        assert got.dtype == spec.dtype
        np.testing.assert_allclose(got, toy.outputs(kind, inputs)[spec.name])
