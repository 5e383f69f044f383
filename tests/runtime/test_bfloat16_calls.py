"""NumPy arrays of bfloat16: a call of known shapes is as checked, and goes the short way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.call import Call


@pytest.fixture
def bfloat16() -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _equal(result: Any, answers: dict[str, Any]) -> None:
    for got, answer in zip(_tuple(result), answers.values(), strict=True):
        np.testing.assert_array_equal(got.astype(np.float64), answer)


def test_the_second_call_takes_the_short_way(
    toy: Any, bfloat16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = toy.operator("bfloat16")
    first = {kind: toy.inputs(kind, dtype=bfloat16) for kind in op.kinds}
    for kind, inputs in first.items():
        _equal(op.call(kind, *inputs), toy.outputs(kind, inputs))

    def never(*_: Any) -> Any:
        raise AssertionError("the long way")

    monkeypatch.setattr(Call, "_full", never)
    for kind, inputs in first.items():
        inputs[0][:] = inputs[0][::-1].copy()
        answers = toy.outputs(kind, inputs)
        result = op.call(kind, *inputs)
        _equal(result, answers)
        specs = op.signature(kind).outputs
        assert [each.dtype for each in _tuple(result)] == [spec.dtype for spec in specs]
        given = {spec.name: np.zeros_like(a) for spec, a in zip(specs, _tuple(result), strict=True)}
        again = _tuple(op.call(kind, *inputs, out=given))
        assert all(got is want for got, want in zip(again, given.values(), strict=True))
        _equal(again, answers)
    inputs = first["backward"]
    acc = np.full(3, 2, bfloat16)
    op.backward(*inputs, want="dbeta", out={"dbeta": acc}, grad_req="add")
    np.testing.assert_array_equal(
        acc.astype(np.float64), toy.outputs("backward", inputs)["dbeta"] + 2
    )
    only = op.backward(*inputs, want=("dx", "dbeta"))
    _equal(only, {name: toy.outputs("backward", inputs)[name] for name in ("dx", "dbeta")})


def test_what_is_not_beyond_doubt_is_checked_as_before(toy: Any, bfloat16: Any) -> None:
    op = toy.operator("bfloat16")
    dy, x, *rest = toy.inputs("backward", dtype=bfloat16)
    op.backward(dy, x, *rest)
    answers = toy.outputs("backward", [dy, x, *rest])
    with pytest.raises(ArgumentError, match="memory"):
        op.backward(dy, x, *rest, out={"dx": x})
    with pytest.raises(ArgumentError, match="memory"):
        op.backward(dy, x, *rest, out={"dx": dy[:]})
    both = np.empty((2, 3), bfloat16)
    with pytest.raises(ArgumentError, match="memory"):
        op.backward(dy, x, *rest, out={"dgamma": both[0], "dbeta": both[0]})
    _equal(op.backward(dy, x, *rest, out={"dgamma": both[0], "dbeta": both[1]}), answers)
    for other in (dy.view(np.uint16), dy.astype(np.float32), dy.view(np.float16)):
        with pytest.raises(ArgumentTypeError, match="dy must be bfloat16"):
            op.backward(other, x, *rest)
    with pytest.raises(ArgumentTypeError, match="dx"):
        op.backward(dy, x, *rest, out={"dx": np.empty(x.shape, np.uint16)})
    _equal(op.backward(dy.copy(order="F"), x, *rest), answers)
    dy.flags.writeable = False
    _equal(op.backward(dy, x, *rest), answers)
