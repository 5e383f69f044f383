"""Calling an operator: what comes back, and every option of a call."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from normgraph.errors import ArgumentError, ArgumentTypeError, SpecError
from normgraph.runtime import load

KINDS = ["forward", "inference", "backward", "backward_from_output"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_returns_its_outputs_in_order(toy: Any, kind: str, dtype: str) -> None:
    op = toy.operator(dtype)
    inputs = toy.inputs(kind, dtype=np.dtype(dtype))
    for _ in range(2):  # the second call takes the short path
        given = op.call(kind, *inputs)
        given = given if isinstance(given, tuple) else (given,)
        for spec, got in zip(op.signature(kind).outputs, given, strict=True):
            assert type(got) is np.ndarray
            assert got.dtype == spec.dtype
            np.testing.assert_allclose(got, toy.outputs(kind, inputs)[spec.name])


def test_several_outputs_are_a_named_tuple_that_pickles(op: Any, toy: Any) -> None:
    result = op.backward(*toy.inputs("backward"))
    assert result._fields == ("dx", "dgamma", "dbeta")
    assert result.dgamma is result[1]
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result)
    np.testing.assert_array_equal(again.dx, result.dx)


def test_one_output_is_bare(op: Any, toy: Any) -> None:
    assert type(op.inference(*toy.inputs("inference"))) is np.ndarray


def test_arguments_by_name(op: Any, toy: Any) -> None:
    dy, x, gamma, mean, inv_std = inputs = toy.inputs("backward")
    for _ in range(2):
        result = op.backward(dy, x, inv_std=inv_std, mean=mean, gamma=gamma)
        np.testing.assert_array_equal(result.dx, toy.outputs("backward", inputs)["dx"])


@pytest.mark.parametrize("want", [("dx",), ["dgamma"], "dbeta", ("dbeta", "dx")])
def test_want_returns_only_what_is_wanted_in_the_table_s_order(
    op: Any, toy: Any, want: Any
) -> None:
    inputs = toy.inputs("backward")
    answers = toy.outputs("backward", inputs)
    names = {want} if isinstance(want, str) else set(want)
    kept = [name for name in answers if name in names]
    for _ in range(2):
        result = op.backward(*inputs, want=want)
        if len(kept) == 1:
            result = (result,)
        else:
            assert result._fields == tuple(kept)
        for name, got in zip(kept, result, strict=True):
            np.testing.assert_array_equal(got, answers[name])


def test_what_is_not_wanted_is_not_allocated(
    op: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dy, x, *rest = toy.inputs("backward")
    op.backward(dy, x, *rest)
    shapes: list[Any] = []
    empty = np.empty

    def spy(shape: Any, *args: Any) -> Any:
        shapes.append(tuple(shape))
        return empty(shape, *args)

    monkeypatch.setattr(np, "empty", spy)
    op.backward(dy, x, *rest, want="dgamma")  # the short path
    dy.flags.writeable = False
    op.backward(dy, x, *rest, want="dgamma")  # the full path
    assert shapes == [(3,), (3,)]


def test_out_is_written_and_returned(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    answers = toy.outputs("backward", inputs)
    for _ in range(2):
        dx = np.full((2, 3, 5), np.nan, np.float32)
        dbeta = np.full(3, np.nan, np.float32)
        result = op.backward(*inputs, out={"dbeta": dbeta, "dx": dx})
        assert result.dx is dx
        assert result.dbeta is dbeta
        for name in answers:
            np.testing.assert_array_equal(getattr(result, name), answers[name])


@pytest.mark.parametrize("view", [False, True])
def test_out_next_to_an_input_in_one_block_of_memory(op: Any, toy: Any, view: bool) -> None:
    x, *rest = toy.inputs("inference")
    block = np.empty((4, 3, 5), np.float32)
    block[:2] = x
    for _ in range(2):
        out = block[2:] if view else block[2:].copy()
        assert op.inference(block[:2], *rest, out={"y": out}) is out
        np.testing.assert_array_equal(out, toy.outputs("inference", [x, *rest])["y"])


def test_add_accumulates_and_null_leaves_out(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    answers = toy.outputs("backward", inputs)
    for _ in range(2):
        acc = np.full(3, 10, np.float32)
        result = op.backward(
            *inputs, out={"dgamma": acc}, grad_req={"dgamma": "add", "dbeta": "null"}
        )
        assert result._fields == ("dx", "dgamma")
        assert result.dgamma is acc
        np.testing.assert_array_equal(acc, answers["dgamma"] + 10)
        np.testing.assert_array_equal(result.dx, answers["dx"])


def test_add_to_everything(op: Any, toy: Any) -> None:
    inputs = toy.inputs("backward")
    out = {name: np.ones_like(a, np.float32) for name, a in toy.outputs("backward", inputs).items()}
    op.backward(*inputs, out=out, grad_req="add")
    for name, answer in toy.outputs("backward", inputs).items():
        np.testing.assert_array_equal(out[name], answer + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"want": ()}, "no output is wanted"),
        ({"grad_req": "null"}, "no output is wanted"),
        ({"want": "dy"}, "no output 'dy'"),
        ({"want": ("dx", "dx")}, "twice"),
        ({"want": (1,)}, "want must be"),
        ({"want": 3}, "want must be"),
        ({"grad_req": "sum"}, '"write", "add" or "null"'),
        ({"grad_req": {"dx": "sum"}}, '"write", "add" or "null"'),
        ({"grad_req": {"dz": "add"}}, "no output 'dz'"),
        ({"grad_req": {"dx": []}}, "strings"),
        ({"grad_req": 1}, "grad_req must be"),
        ({"want": "dx", "grad_req": {"dgamma": "add"}}, "dgamma is not wanted"),
        ({"want": "dx", "grad_req": {"dx": "null"}}, "dx is wanted"),
        ({"want": "dx", "grad_req": "null"}, "dx is wanted"),
        ({"grad_req": "add"}, "out={'dx': array}"),
        ({"grad_req": {"dbeta": "add"}}, "out={'dbeta': array}"),
        ({"out": {"dz": np.ones(3, np.float32)}}, "no output"),
        ({"out": [np.ones(3, np.float32)]}, "out must be a dict"),
        ({"out": np.ones(3, np.float32)}, "out must be a dict"),
        ({"out": {"dx": None}}, "it is None"),
        ({"want": "dx", "out": {"dgamma": np.ones(3, np.float32)}}, "dgamma, which is not wanted"),
        ({"copy": "never"}, "copy must be True or False"),
    ],
)
def test_contradictory_options_are_refused(
    op: Any, toy: Any, options: dict[str, Any], message: str
) -> None:
    inputs = toy.inputs("backward")
    op.backward(*inputs)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^backward: ") as caught:
        op.backward(*inputs, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("both", [False, True])
def test_running_statistics_in_place(op: Any, toy: Any, both: bool) -> None:
    for _ in range(2):
        inputs = toy.inputs("forward")
        answers = toy.outputs("forward", inputs)
        mean, var = inputs[3], inputs[4]
        out = {"new_running_mean": mean, "new_running_var": var if both else np.empty_like(var)}
        result = op.forward(*inputs, out=out)
        assert result.new_running_mean is mean
        for name, answer in answers.items():
            np.testing.assert_array_equal(getattr(result, name), answer)


def test_running_statistics_in_place_through_another_view(op: Any, toy: Any) -> None:
    inputs = toy.inputs("forward")
    answers = toy.outputs("forward", inputs)
    result = op.forward(*inputs, out={"new_running_mean": inputs[3][:]})
    np.testing.assert_array_equal(inputs[3], answers["new_running_mean"])
    np.testing.assert_array_equal(result.y, answers["y"])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_momentum_is_a_number_from_the_first_call_on(toy: Any, dtype: str) -> None:
    kind: Any = dtype
    if dtype == "bfloat16":
        kind = pytest.importorskip("ml_dtypes").bfloat16
    op = load(toy.artifact(dtype))
    inputs = toy.inputs("forward", dtype=kind)
    for place, spec in enumerate(op.signature("forward").inputs):
        inputs[place] = inputs[place].astype(kind if spec.dtype == dtype else spec.dtype)
    inputs[5] = np.asarray(0.25, inputs[5].dtype)
    answers = toy.outputs("forward", inputs)
    for _ in range(3):
        result = op.forward(*inputs[:5], 0.25)
        for name, answer in answers.items():
            np.testing.assert_array_equal(getattr(result, name).astype(np.float64), answer)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.array(2, np.float32)])
def test_momentum_is_a_number_or_an_array_of_rank_0(op: Any, toy: Any, value: Any) -> None:
    inputs = toy.inputs("forward")
    inputs[5] = np.array(2, np.float32)
    answers = toy.outputs("forward", inputs)
    for _ in range(2):
        result = op.forward(*inputs[:5], value)
        np.testing.assert_array_equal(result.new_running_var, answers["new_running_var"])
        named = op.forward(*inputs[:5], momentum=value)
        np.testing.assert_array_equal(named.new_running_mean, answers["new_running_mean"])


@pytest.mark.parametrize("value", [True, "0.1", None, [0.1], np.array([0.1], np.float32), 1j])
def test_momentum_of_another_kind_is_refused(op: Any, toy: Any, value: Any) -> None:
    inputs = toy.inputs("forward")
    op.forward(*inputs)
    with pytest.raises((ArgumentError, ArgumentTypeError), match="momentum"):
        op.forward(*inputs[:5], value)


def test_a_kind_that_is_not_there(op: Any) -> None:
    with pytest.raises(SpecError, match="no kind 'backward_frozen'; it has forward, inference"):
        _ = op.backward_frozen
    assert not hasattr(op, "backward_frozen")
    with pytest.raises(SpecError, match="no kind 'sideways'"):
        op.call("sideways")
    with pytest.raises(SpecError, match="no kind"):
        op.signature(["forward"])
    with pytest.raises(AttributeError, match="no attribute 'sideways'"):
        _ = op.sideways


def test_what_an_operator_says_of_itself(op: Any) -> None:
    assert op.kinds == ("forward", "inference", "backward", "backward_from_output")
    assert op.shape == ("N", 3, "L")
    assert op.dtype == "float32"
    assert op.spec.op == "instance_norm"
    assert op.spec.momentum is None
    assert op.manifest["format_version"] == 1
    signature = op.signature("inference")
    assert signature.input_names == ("x", "gamma", "beta", "running_mean", "running_var")
    assert signature.outputs[0].shape == ("N", 3, "L")
    assert str(signature).endswith("running_var: float32[3]) -> (y: float32[N, 3, L])")
    assert "instance_norm float32[N, 3, L] for cpu: forward, inference" in repr(op)
    assert op.inference.__name__ == "inference"
    assert op.inference.__doc__.startswith("inference(x: float32[N, 3, L]")


def test_an_operator_pickles_as_its_path(op: Any, toy: Any) -> None:
    again = pickle.loads(pickle.dumps(op))
    assert again is not op
    assert repr(again) == repr(op)
    inputs = toy.inputs("inference")
    np.testing.assert_array_equal(again.inference(*inputs), op.inference(*inputs))


def test_more_shapes_than_are_remembered(
    op: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normgraph.runtime.call.MOST_PLANS", 3)
    for _ in range(2):
        for length in range(2, 12):
            inputs = toy.inputs("inference", length=length)
            answer = toy.outputs("inference", inputs)["y"]
            np.testing.assert_array_equal(op.inference(*inputs), answer)
