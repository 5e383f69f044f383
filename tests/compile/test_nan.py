"""A NaN stays a NaN on its way through a kernel, whatever its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

from normgraph import NormSpec

if TYPE_CHECKING:
    from normgraph.runtime import Operator

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFF00, 0x7FC00000, 0x7F800001])
@pytest.mark.parametrize("length", [3, 37, 150])
def test_a_float32_nan_is_a_nan_in_bfloat16(
    build_operator: Callable[..., Operator], bits: int, length: int
) -> None:
    op = build_operator(NormSpec("batch_norm"), ("N", 6, "L"), "bfloat16", ("inference",))
    x = np.ones((2, 6, length), BFLOAT16)
    ones, zeros = np.ones(6, BFLOAT16), np.zeros(6, BFLOAT16)
    mean, var = np.zeros(6, np.float32), np.ones(6, np.float32)
    mean.view(np.uint32)[4] = bits
    y = op.inference(x, ones, zeros, mean, var).astype(np.float32)
    assert np.isnan(y[:, 4]).all()
    assert np.isfinite(np.delete(y, 4, axis=1)).all()
    total = x.copy()
    op.inference(x, ones, zeros, mean, var, out={"y": total}, grad_req="add")
    assert np.isnan(total.astype(np.float32)[:, 4]).all()


def test_infinite_answers_of_a_static_shape_pass_the_self_test(
    build_operator: Callable[..., Operator],
) -> None:
    # One element a row and eps = 0: the variance is 0, inv_std infinite and dx not a number.
    op = build_operator(NormSpec("layer_norm", eps=0), (4, 1))
    assert op.self_test()
    forward = op.forward(
        np.ones((4, 1), np.float32), np.ones(1, np.float32), np.zeros(1, np.float32)
    )
    assert np.isinf(forward.inv_std).all()
