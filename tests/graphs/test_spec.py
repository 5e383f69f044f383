"""`NormSpec`: what each option resolves to, and every error."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.errors import NormGraphError, SpecError
from normgraph.graphs.table import ROWS
from normgraph.spec import OPERATORS, compute_dtype


def test_the_operators_are_the_rows_of_the_table() -> None:
    assert tuple(ROWS) == OPERATORS
    assert OPERATORS == ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


@pytest.mark.parametrize(
    ("op", "given", "field", "expected"),
    [
        ("instance_norm", {}, "eps", 1e-5),
        ("batch_norm", {}, "track_running_stats", True),
        ("instance_norm", {}, "track_running_stats", False),
        ("layer_norm", {}, "track_running_stats", False),
        ("layer_norm", {}, "normalized_ndim", 1),
        ("rms_norm", {}, "normalized_ndim", 1),
        ("batch_norm", {}, "normalized_ndim", None),
        ("batch_norm", {}, "groups", None),
        ("batch_norm", {}, "bias", True),
        ("rms_norm", {}, "bias", False),
        ("rms_norm", {"bias": False}, "bias", False),
        ("batch_norm", {}, "momentum", 0.1),
        ("batch_norm", {"convention": "onnx"}, "momentum", 0.9),
        ("batch_norm", {"convention": "mxnet"}, "momentum", 0.9),
        ("batch_norm", {"convention": "onnx", "momentum": 0.25}, "momentum", 0.25),
        ("batch_norm", {"momentum": None}, "momentum", None),
        ("batch_norm", {"eps": 0}, "eps", 0.0),
        ("rms_norm", {"eps": None}, "eps", None),
        ("batch_norm", {}, "param_dtype", None),
    ],
)
def test_every_field_reads_back_resolved(
    op: str, given: dict[str, Any], field: str, expected: object
) -> None:
    value = getattr(NormSpec(op, **given), field)
    assert value == expected
    assert type(value) is type(expected)


def test_a_spec_is_a_value() -> None:
    assert NormSpec("batch_norm") == NormSpec("batch_norm", bias=True, momentum=0.1)
    assert hash(NormSpec("batch_norm")) == hash(NormSpec("batch_norm", eps=1e-5))
    assert NormSpec("batch_norm") != NormSpec("batch_norm", correction=1)
    with pytest.raises(AttributeError):
        NormSpec("batch_norm").eps = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "spec",
    [
        NormSpec("batch_norm", convention="mxnet", momentum=None, correction=1),
        NormSpec("group_norm", groups=4, bias=False),
        NormSpec("layer_norm", normalized_ndim=3, param_dtype="float32"),
        NormSpec("rms_norm", eps=None),
        NormSpec("instance_norm", track_running_stats=True, weight=False),
    ],
    ids=lambda spec: spec.op,
)
def test_a_spec_comes_back_from_json(spec: NormSpec) -> None:
    assert NormSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [
        ("float16", 2.0**-23),
        ("bfloat16", 2.0**-23),
        ("float32", 2.0**-23),
        ("float64", 2.0**-52),
    ],
)
def test_resolve_fills_in_eps_and_param_dtype(dtype: str, eps: float) -> None:
    resolved = NormSpec("rms_norm", eps=None).resolve(dtype)
    assert (resolved.eps, resolved.param_dtype) == (eps, dtype)
    assert resolved.resolve(dtype) == resolved
    given = NormSpec("rms_norm", eps=1e-3, param_dtype=compute_dtype(dtype)).resolve(dtype)
    assert (given.eps, given.param_dtype) == (1e-3, compute_dtype(dtype))


@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("float64", "float32"),
        ("float32", "float64"),
        ("float64", "float16"),
    ],
)
def test_parameters_have_the_type_of_x_or_of_the_sums(param_dtype: str, dtype: str) -> None:
    with pytest.raises(SpecError, match=f"param_dtype: expected .* got '{param_dtype}'"):
        NormSpec("layer_norm", param_dtype=param_dtype).resolve(dtype)


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("batchnorm", {}, "op: expected one of batch_norm, .*rms_norm; got 'batchnorm'"),
        (None, {}, "op: expected one of"),
        ("batch_norm", {"eps": -1e-5}, "eps: expected a finite number of at least 0"),
        ("batch_norm", {"eps": math.nan}, "eps: expected a finite number"),
        ("batch_norm", {"eps": math.inf}, "eps: expected a finite number"),
        ("batch_norm", {"eps": "1e-5"}, "eps: expected a number; got '1e-5'"),
        ("batch_norm", {"eps": True}, "eps: expected a number; got True"),
        ("layer_norm", {"eps": None}, "layer_norm has no eps=None .*rms_norm.* Give eps a number"),
        ("group_norm", {}, "group_norm needs groups, an int of at least 1; got None"),
        ("group_norm", {"groups": 0}, "group_norm needs groups"),
        ("group_norm", {"groups": True}, "group_norm needs groups"),
        ("batch_norm", {"groups": 2}, "batch_norm has no groups .*group_norm.*; got 2"),
        ("batch_norm", {"normalized_ndim": 1}, "no normalized_ndim .*layer_norm, rms_norm"),
        ("layer_norm", {"normalized_ndim": 0}, "normalized_ndim: expected an int of at least 1"),
        ("layer_norm", {"normalized_ndim": 1.0}, "normalized_ndim: expected an int"),
        ("layer_norm", {"weight": 1}, "weight: expected True or False; got 1"),
        ("layer_norm", {"bias": "no"}, "bias: expected True or False; got 'no'"),
        ("rms_norm", {"bias": True}, "rms_norm has no bias .*; got True. Leave bias out"),
        ("layer_norm", {"correction": 2}, "correction: expected 0 or 1; got 2"),
        ("layer_norm", {"correction": False}, "correction: expected 0 or 1; got False"),
        ("rms_norm", {"correction": 1}, "rms_norm has no correction"),
        ("layer_norm", {"track_running_stats": True}, "no track_running_stats .*batch_norm"),
        ("batch_norm", {"track_running_stats": 1}, "track_running_stats: expected True or False"),
        ("batch_norm", {"momentum": 1.5}, "momentum: expected a number from 0 to 1; got 1.5"),
        ("batch_norm", {"momentum": -0.1}, "momentum: expected a number from 0 to 1"),
        ("batch_norm", {"momentum": "0.1"}, "momentum: expected a number or None"),
        ("batch_norm", {"convention": "tf"}, "convention: expected one of torch, onnx, mxnet"),
        ("layer_norm", {"momentum": 0.5}, "has none; got momentum=0.5. Leave them out.$"),
        ("instance_norm", {"momentum": None}, "got momentum=None. .*set track_running_stats=True"),
        ("instance_norm", {"convention": "onnx"}, "has none; got convention='onnx'. Leave"),
        (
            "instance_norm",
            {"convention": "mxnet", "momentum": 0.5},
            "this instance_norm has none; got momentum=0.5, convention='mxnet'. Leave them out, or",
        ),
        ("batch_norm", {"param_dtype": "half"}, "param_dtype: expected one of float16, bfloat16"),
    ],
)
def test_what_does_not_exist_is_refused(op: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        NormSpec(op, **options)
    assert isinstance(caught.value, NormGraphError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("dtype", ["float8", "Float32", None, 32])
def test_an_unknown_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(SpecError, match="dtype: expected one of float16, bfloat16, float32, float"):
        NormSpec("layer_norm").resolve(dtype)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"op": "batch_norm", "epsilon": 1e-5}, "got unknown epsilon"),
        ({"eps": 1e-5}, "got no op"),
    ],
)
def test_from_dict_refuses_what_is_no_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        NormSpec.from_dict(values)


@pytest.mark.parametrize("eps", [1e39, 1e-50])
def test_eps_must_fit_the_type_it_is_added_in(eps: float) -> None:
    spec = NormSpec("layer_norm", eps=eps)
    with pytest.raises(SpecError, match="eps: expected 0 or a number that float32"):
        spec.resolve("float16")
    assert spec.resolve("float64").eps == eps


def test_numbers_of_other_libraries_are_taken_as_pythons_own() -> None:
    groups: Any = np.int64(4)
    spec = NormSpec("group_norm", groups=groups, eps=np.float64(1e-3))
    assert spec == NormSpec("group_norm", groups=4, eps=1e-3)
    assert type(spec.groups) is int
    assert type(spec.eps) is float


@pytest.mark.parametrize("eps", [10**400, -1, float("nan")])
def test_eps_out_of_range(eps: float) -> None:
    with pytest.raises(SpecError, match="eps: expected a finite number"):
        NormSpec("layer_norm", eps=eps)
