"""What the compiler reads from a graph: tensors on common axes, and the order of passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tvm import tirx
from tvm.script import tirx as T

from normgraph import NormSpec
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.slice_plan import SlicePlan, plan
from normgraph.compile.tensor_program import TensorProgram, read
from normgraph.graphs import kinds

Program = Callable[..., TensorProgram]
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Expected:
    """A plan in short; `passes` has the axes each pass sums over, and "out" for an output."""

    slices: tuple[int, ...]
    lead: tuple[int, ...]
    passes: tuple[tuple[object, ...], ...]
    stored: int = 0
    columns: int = 0
    finish: tuple[tuple[int, ...], ...] = ()


OUT = "out"
PLANE, CHANNEL, GROUP = (2, 3), (0, 2, 3), (2, 3, 4)
SPECS: dict[str, tuple[NormSpec, Shape]] = {
    "batch_norm": (NormSpec("batch_norm"), ("N", 5, "H", "W")),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), ("N", 5, "H", "W")),
    "group_norm": (NormSpec("group_norm", groups=2), ("N", 6, "H", "W")),
    "layer_norm": (NormSpec("layer_norm", normalized_ndim=2), ("N", "L", 3, 7)),
    "rms_norm": (NormSpec("rms_norm"), ("N", "L", 7)),
}
# Statistics: mean, then the centred sums (squares, and delta), then the output.
_CENTRED = {axes: ((axes,), (axes, axes), (OUT,)) for axes in (CHANNEL, PLANE, GROUP)}
_IN_BACKWARD = Expected((0, 1), (), ((PLANE, PLANE, PLANE), (OUT,)), 2, 0, ((0,), (0,)))
_GN_BACKWARD = Expected((0, 1), (), (((3, 4), (3, 4), GROUP), (OUT,)), 3, 0, ((0,), (0,)))
_BN_BACKWARD = Expected((1,), (0,), ((CHANNEL, CHANNEL, CHANNEL), (OUT,)))
_LN_BACKWARD = Expected(
    (0, 1), (), ((PLANE, PLANE, PLANE), (OUT, (0, 1), (0, 1))), 0, 2, ((0, 1), (0, 1))
)
_RMS_BACKWARD = Expected((0, 1), (), (((2,),), (OUT, (0, 1))), 0, 1, ((0, 1),))
_RMS_FORWARD = Expected((0, 1), (), (((2,),), (OUT,)))
_FOLDED = Expected((0, 1), (), ((OUT,),))
PLANS: dict[str, dict[str, Expected]] = {
    "batch_norm": {
        "forward": Expected((1,), (0,), _CENTRED[CHANNEL]),
        "inference": _FOLDED,
        "backward": _BN_BACKWARD,
        "backward_frozen": Expected((1,), (0,), ((CHANNEL, CHANNEL, OUT),)),
        "backward_from_output": _BN_BACKWARD,
    },
    "instance_norm": {
        "forward": Expected((0, 1), (), _CENTRED[PLANE], 2, 0, ((0,), (0,))),
        "inference": _FOLDED,
        "backward": _IN_BACKWARD,
        "backward_frozen": Expected((1,), (0,), ((PLANE, CHANNEL, OUT),), 1),
        "backward_from_output": _IN_BACKWARD,
    },
    "group_norm": {
        "forward": Expected((0, 1), (), _CENTRED[GROUP]),
        "inference": Expected((0, 1), (), _CENTRED[GROUP]),
        "backward": _GN_BACKWARD,
        "backward_from_output": _GN_BACKWARD,
    },
    "layer_norm": {
        "forward": Expected((0, 1), (), _CENTRED[PLANE]),
        "inference": Expected((0, 1), (), _CENTRED[PLANE]),
        "backward": _LN_BACKWARD,
        "backward_from_output": _LN_BACKWARD,
    },
    "rms_norm": {
        "forward": _RMS_FORWARD,
        "inference": _RMS_FORWARD,
        "backward": _RMS_BACKWARD,
        "backward_from_output": _RMS_BACKWARD,
    },
}
EVERY_KIND = [(op, kind) for op, (spec, _) in SPECS.items() for kind in kinds(spec)]


def _short(made: SlicePlan) -> Expected:
    def entry(step: Any) -> object:
        return tuple(sorted(step.op.reduce)) if step.is_sum else OUT

    assert not made.passes[0].wide, "nothing is read before the first pass"
    return Expected(
        made.slice_axes,
        made.lead_axes,
        tuple(tuple(entry(step) for step in work.wide) for work in made.passes[1:]),
        len(made.stored),
        len(made.column_sums),
        tuple(tuple(sorted(step.op.reduce)) for step in made.finish_sums.values()),
    )


@pytest.mark.parametrize(("op", "kind"), EVERY_KIND)
def test_plan_of_every_kind(op: str, kind: str, program: Program) -> None:
    spec, shape = SPECS[op]
    assert _short(plan(program(spec, kind, shape))) == PLANS[op][kind]


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_dtype_changes_no_plan(op: str, dtype: str, program: Program) -> None:
    spec, shape = SPECS[op]
    assert _short(plan(program(spec, "backward", shape, dtype))) == PLANS[op]["backward"]


@pytest.mark.parametrize("op", SPECS)
def test_static_shapes_change_no_plan(op: str, program: Program) -> None:
    spec, shape = SPECS[op]
    static = tuple(d if isinstance(d, int) else 4 + i for i, d in enumerate(shape))
    assert _short(plan(program(spec, "forward", static))) == PLANS[op]["forward"]


def _axes(program_: TensorProgram) -> dict[str, list[int]]:
    return {tensor.name: sorted(tensor.axes) for tensor in program_.inputs}


def test_inputs_of_batch_norm_are_brought_to_x_axes(program: Program) -> None:
    made = program(*_args("batch_norm", "forward"))
    assert [str(e) for e in made.extents] == ["N", "T.int64(5)", "H", "W"]
    assert _axes(made) == {
        "x": [0, 1, 2, 3],
        "gamma": [1],
        "beta": [1],
        "running_mean": [1],
        "running_var": [1],
    }
    assert [sorted(t.axes) for t in made.outputs] == [[0, 1, 2, 3], [1], [1], [1], [1]]
    assert [t.output_index for t in made.outputs] == [0, 1, 2, 3, 4]
    assert [t.input_index for t in made.inputs] == [0, 1, 2, 3, 4]
    assert {t.dtype for t in (*made.inputs, *made.outputs)} == {"float32"}


def test_group_norm_is_read_with_its_channels_split(program: Program) -> None:
    made = program(*_args("group_norm", "backward"))
    assert [str(e) for e in made.extents] == ["N", "T.int64(2)", "T.int64(3)", "H", "W"]
    assert _axes(made) == {
        "dy": [0, 1, 2, 3, 4],
        "x": [0, 1, 2, 3, 4],
        "gamma": [1, 2],
        "mean": [0, 1],
        "inv_std": [0, 1],
    }


def test_half_tensors_keep_their_dtype_and_sums_are_float32(program: Program) -> None:
    made = program(*_args("group_norm", "backward"), "float16")
    assert {t.dtype for t in made.inputs if t.name in ("dy", "x", "gamma")} == {"float16"}
    assert {t.dtype for t in made.outputs} == {"float16"}
    assert {op.out.dtype for op in made.operations if op.reduce} == {"float32"}


def test_counts_become_scalars(program: Program) -> None:
    symbolic = program(*_args("instance_norm", "backward"))
    assert any("H" in str(value) and "W" in str(value) for _, value in symbolic.scalars)
    spec, _ = SPECS["instance_norm"]
    assert program(spec, "backward", (2, 5, 3, 4)).scalars == []


def _args(op: str, kind: str) -> tuple[NormSpec, str, Shape]:
    spec, shape = SPECS[op]
    return spec, kind, shape


# Functions that are not theirs.


def _maximum() -> Any:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 8), "float32"), out: T.Buffer((4, 1), "float32")) -> None:  # type: ignore[valid-type]
        for i, j in T.grid(4, 8):
            with T.sblock("max"):
                vi, vj = T.axis.remap("SR", [i, j])
                with T.init():
                    out[vi, 0] = T.float32(-1e30)
                out[vi, 0] = T.max(out[vi, 0], x[vi, vj])

    return func


def _transpose() -> Any:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 4), "float32"), out: T.Buffer((4, 4), "float32")) -> None:  # type: ignore[valid-type]
        for i, j in T.grid(4, 4):
            with T.sblock("swap"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = x[vj, vi]

    return func


def _sum_from_one() -> Any:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 8), "float32"), out: T.Buffer((4, 1), "float32")) -> None:  # type: ignore[valid-type]
        for i, j in T.grid(4, 8):
            with T.sblock("sum"):
                vi, vj = T.axis.remap("SR", [i, j])
                with T.init():
                    out[vi, 0] = T.float32(1)
                out[vi, 0] = out[vi, 0] + x[vi, vj]

    return func


def _product() -> Any:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 8), "float32"), out: T.Buffer((4, 1), "float32")) -> None:  # type: ignore[valid-type]
        for i, j in T.grid(4, 8):
            with T.sblock("product"):
                vi, vj = T.axis.remap("SR", [i, j])
                with T.init():
                    out[vi, 0] = T.float32(1)
                out[vi, 0] = out[vi, 0] * x[vi, vj]

    return func


def _two_sizes() -> Any:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 8), "float32"), out: T.Buffer((4, 4), "float32")) -> None:  # type: ignore[valid-type]
        for i, j in T.grid(4, 4):
            with T.sblock("cut"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = x[vi, vj]

    return func


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_maximum, "other than a sum"),
        (_transpose, "is indexed by"),
        (_sum_from_one, "starts its sum from"),
        (_product, "product over elements"),
        (_two_sizes, "axis 1 of"),
    ],
)
def test_other_functions_are_refused(make: Callable[[], Any], message: str) -> None:
    func = make()
    assert isinstance(func, tirx.PrimFunc)
    with pytest.raises(NotCanonical, match=message):
        read(func)


def _first_and_last() -> Any:
    """Statistics kept along axes 0 and 2: slices that are not next to each other."""

    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def func(x: T.Buffer((4, 5, 6), "float32"), out: T.Buffer((4, 5, 6), "float32")) -> None:  # type: ignore[valid-type]
        total = T.sblock_alloc_buffer((4, 1, 6), "float32")
        for i, j, k in T.grid(4, 6, 5):
            with T.sblock("sum"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                with T.init():
                    total[vi, 0, vj] = T.float32(0)
                total[vi, 0, vj] = total[vi, 0, vj] + x[vi, vk, vj]
        for i, j, k in T.grid(4, 5, 6):
            with T.sblock("out"):
                vi, vj, vk = T.axis.remap("SSS", [i, j, k])
                out[vi, vj, vk] = x[vi, vj, vk] - total[vi, 0, vk]

    return func


def test_slices_that_are_apart_are_refused() -> None:
    with pytest.raises(NotCanonical):
        plan(read(_first_and_last()))
