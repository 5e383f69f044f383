"""Names, order, dtypes and shapes of every kind's inputs and outputs, written out by hand."""

from __future__ import annotations

from typing import Any

import onnx
import pytest

from normgraph import NormSpec, graphs
from normgraph.errors import SpecError

X = ("float32", ("N", 6, "H", "W"))
C = ("float32", (6,))
RUN = ("float32", (6,))
IN = ("float32", ("N", 6, 1, 1))
BN = ("float32", (1, 6, 1, 1))
GN = ("float32", ("N", 3, 1, 1, 1))
ROW = ("float32", ("N", "T", 1))
LX = ("float32", ("N", "T", 8))
LP = ("float32", (8,))


def ports(values: Any) -> list[tuple[str, str, tuple[int | str, ...]]]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        dtype = {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())
        dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        found.append((value.name, dtype, dims))
    return found


def expected(text: str, types: dict[str, tuple[str, tuple[int | str, ...]]]) -> Any:
    return [(name, *types[name]) for name in text.split()]


def types_of(x: Any, param: Any, stat: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("x", "y", "dx", "dy"), x),
        **dict.fromkeys(("gamma", "beta", "dgamma", "dbeta"), param),
        **dict.fromkeys(("mean", "inv_std"), stat),
        **dict.fromkeys(("running_mean", "running_var"), RUN),
        **dict.fromkeys(("new_running_mean", "new_running_var"), RUN),
        "momentum": ("float32", ()),
    }


CENTRED = {
    "forward": ("x gamma beta", "y mean inv_std"),
    "inference": ("x gamma beta", "y"),
    "backward": ("dy x gamma mean inv_std", "dx dgamma dbeta"),
    "backward_from_output": ("dy y gamma beta inv_std", "dx dgamma dbeta"),
}
TRACKED = {
    "forward": (
        "x gamma beta running_mean running_var",
        "y mean inv_std new_running_mean new_running_var",
    ),
    "inference": ("x gamma beta running_mean running_var", "y"),
    "backward": ("dy x gamma mean inv_std", "dx dgamma dbeta"),
    "backward_frozen": ("dy x gamma running_mean running_var", "dx dgamma dbeta"),
    "backward_from_output": ("dy y gamma beta inv_std", "dx dgamma dbeta"),
}
RMS = {
    "forward": ("x gamma", "y inv_std"),
    "inference": ("x gamma", "y"),
    "backward": ("dy x gamma inv_std", "dx dgamma"),
    "backward_from_output": ("dy y gamma inv_std", "dx dgamma"),
}
NO_WEIGHT = {
    "forward": (
        "x beta running_mean running_var",
        "y mean inv_std new_running_mean new_running_var",
    ),
    "inference": ("x beta running_mean running_var", "y"),
    "backward": ("dy x mean inv_std", "dx dbeta"),
    "backward_frozen": ("dy x running_mean running_var", "dx dbeta"),
    "backward_from_output": ("dy y beta inv_std", "dx dbeta"),
}
NO_BIAS = {
    "forward": ("x gamma", "y mean inv_std"),
    "inference": ("x gamma", "y"),
    "backward": ("dy x gamma mean inv_std", "dx dgamma"),
    "backward_from_output": ("dy y gamma inv_std", "dx dgamma"),
}
BARE = {
    "forward": ("x", "y inv_std"),
    "inference": ("x", "y"),
    "backward": ("dy x inv_std", "dx"),
    "backward_from_output": ("dy y inv_std", "dx"),
}
MOMENTUM = {
    **TRACKED,
    "forward": (
        "x gamma beta running_mean running_var momentum",
        "y mean inv_std new_running_mean new_running_var",
    ),
}


@pytest.mark.parametrize(
    ("spec", "table", "types"),
    [
        (NormSpec("batch_norm"), TRACKED, types_of(X, C, BN)),
        (NormSpec("batch_norm", track_running_stats=False), CENTRED, types_of(X, C, BN)),
        (NormSpec("batch_norm", weight=False), NO_WEIGHT, types_of(X, C, BN)),
        (NormSpec("batch_norm", momentum=None), MOMENTUM, types_of(X, C, BN)),
        (NormSpec("instance_norm"), CENTRED, types_of(X, C, IN)),
        (NormSpec("instance_norm", bias=False), NO_BIAS, types_of(X, C, IN)),
        (NormSpec("instance_norm", track_running_stats=True), TRACKED, types_of(X, C, IN)),
        (NormSpec("group_norm", groups=3), CENTRED, types_of(X, C, GN)),
        (NormSpec("layer_norm"), CENTRED, types_of(LX, LP, ROW)),
        (NormSpec("rms_norm"), RMS, types_of(LX, LP, ROW)),
        (NormSpec("rms_norm", weight=False), BARE, types_of(LX, LP, ROW)),
    ],
)
def test_every_kind_takes_and_gives_exactly_this(
    spec: NormSpec, table: dict[str, tuple[str, str]], types: dict[str, Any]
) -> None:
    assert graphs.kinds(spec) == tuple(table)
    for kind, (inputs, outputs) in table.items():
        graph = graphs.build(spec, kind, types["x"][1]).graph
        assert ports(graph.input) == expected(inputs, types)
        assert ports(graph.output) == expected(outputs, types)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wide_parameters", [False, True])
def test_statistics_are_at_least_float32(dtype: str, wide_parameters: bool) -> None:
    core = "float64" if dtype == "float64" else "float32"
    param = core if wide_parameters else dtype
    spec = NormSpec("batch_norm", momentum=None, param_dtype=core if wide_parameters else None)
    graph = graphs.build(spec, "forward", "N,6,H,W", dtype).graph
    assert [dtype for _, dtype, _ in ports(graph.input)] == [dtype, param, param, core, core, core]
    assert [dtype for _, dtype, _ in ports(graph.output)] == [dtype, core, core, core, core]
    graph = graphs.build(spec, "backward", "N,6,H,W", dtype).graph
    assert [dtype for _, dtype, _ in ports(graph.input)] == [dtype, dtype, param, core, core]
    assert [dtype for _, dtype, _ in ports(graph.output)] == [dtype, param, param]


def test_parameters_of_several_normalized_dims() -> None:
    spec = NormSpec("layer_norm", normalized_ndim=2)
    graph = graphs.build(spec, "backward", ("N", 4, 8)).graph
    assert ports(graph.input)[2:] == [
        ("gamma", "float32", (4, 8)),
        ("mean", "float32", ("N", 1, 1)),
        ("inv_std", "float32", ("N", 1, 1)),
    ]
    assert ports(graph.output)[1:] == [
        ("dgamma", "float32", (4, 8)),
        ("dbeta", "float32", (4, 8)),
    ]


@pytest.mark.parametrize(
    ("spec", "kind", "extra"),
    [
        (NormSpec("instance_norm"), "forward", ["delta", "var"]),
        (NormSpec("instance_norm"), "inference", ["delta", "var"]),
        (NormSpec("instance_norm"), "backward", ["dvar", "dmean", "delta"]),
        (NormSpec("layer_norm"), "backward_from_output", ["dvar", "dmean", "delta"]),
        (NormSpec("rms_norm"), "forward", ["var"]),
        (NormSpec("rms_norm"), "backward", ["dvar"]),
        (NormSpec("batch_norm"), "inference", ["scale", "shift"]),
        (NormSpec("batch_norm"), "backward_frozen", []),
    ],
)
def test_a_debug_build_gives_intermediates_behind_the_outputs(
    spec: NormSpec, kind: str, extra: list[str]
) -> None:
    shape = "N,6,8" if spec.normalized_ndim else "N,6,H,W"
    plain = graphs.build(spec, kind, shape)
    debug = graphs.build(spec, kind, shape, debug=True)
    names = [o.name for o in plain.graph.output]
    assert [o.name for o in debug.graph.output] == names + extra
    assert [n for n in debug.graph.node if n in plain.graph.node] == list(plain.graph.node)


@pytest.mark.parametrize(
    ("op", "kind", "message"),
    [
        ("batch_norm", "sideways", "kind: expected one of forward, inference, .*got 'sideways'$"),
        ("layer_norm", "backward_frozen", "backward_frozen needs running statistics"),
        ("instance_norm", "backward_frozen", "track_running_stats=True"),
    ],
)
def test_a_kind_the_spec_lacks_is_refused(op: str, kind: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        graphs.build(NormSpec(op), kind, "N,4,8")
