"""What every graph is made of, how it is checked, and which shapes are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.shape_inference import infer_shapes

import normgraph as ng
from normgraph import NormSpec, graphs
from normgraph.errors import NormGraphError, SpecError
from normgraph.graphs.writer import GraphWriter

DTYPES = ("float16", "bfloat16", "float32", "float64")
# What the compiler's importer and onnxruntime both take, and nothing that compares or selects.
PRIMITIVE = {
    *("Abs", "Add", "Cast", "Concat", "Div", "Identity", "Mul", "Neg", "Not", "Reciprocal"),
    *("ReduceSum", "Relu", "Reshape", "Shape", "Size", "Sqrt", "Sub"),
}


def ancestors(graph: onnx.GraphProto, name: str) -> set[str]:
    makers = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    open_names = [name]
    while open_names:
        node = makers.get(open_names.pop())
        fresh = set(node.input) - found if node is not None else set()
        found |= fresh
        open_names += fresh
    return found


def every_graph(case: Any, dtypes: tuple[str, ...] = ("float32",)) -> Any:
    for kind in graphs.kinds(case.spec):
        for dtype in dtypes:
            for shape in (case.shape, case.names):
                yield graphs.build(case.spec, kind, shape, dtype, debug=True)


def test_every_graph_passes_the_strict_checks(case: Any) -> None:
    for model in every_graph(case, DTYPES):
        onnx.checker.check_model(model, full_check=True)
        inferred = infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        assert list(inferred.graph.output) == list(model.graph.output)


def test_the_output_shapes_are_what_shape_inference_finds(case: Any) -> None:
    for model in every_graph(case, DTYPES):
        stripped = onnx.ModelProto()
        stripped.CopyFrom(model)
        for output in stripped.graph.output:
            output.type.tensor_type.ClearField("shape")
        inferred = infer_shapes(stripped, check_type=True, strict_mode=True, data_prop=True)
        for found, declared in zip(inferred.graph.output, model.graph.output, strict=True):
            dims = zip(
                found.type.tensor_type.shape.dim, declared.type.tensor_type.shape.dim, strict=True
            )
            for left, right in dims:
                # Inference gives names of its own to what it cannot follow.
                if left.HasField("dim_value"):
                    assert left.dim_value == right.dim_value
                else:
                    assert right.dim_param


def test_nodes_are_primitive_and_named_after_what_they_make(case: Any) -> None:
    for model in every_graph(case, DTYPES):
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert model.ir_version == 8
        assert {node.op_type for node in model.graph.node} <= PRIMITIVE
        assert not model.functions
        for node in model.graph.node:
            assert [node.name] == list(node.output)


def test_the_form_the_compiler_relies_on(case: Any) -> None:
    for model in every_graph(case):
        constants = {c.name for c in model.graph.initializer}
        inputs = {i.name for i in model.graph.input}
        shaped = []
        for node in model.graph.node:
            if node.op_type == "ReduceSum":
                assert {a.name: a.i for a in node.attribute} == {"keepdims": 1}
                assert node.input[1] in constants
            if node.op_type == "Reshape":
                leaves = {o.name for o in model.graph.output} & set(node.output)
                assert leaves or node.input[0] in inputs
                shaped.append(leaves.pop() if leaves else node.input[0])
                if shaped[-1] not in ("x", "y", "dx", "dy"):
                    assert node.input[1] in constants
        assert len(shaped) == len(set(shaped))


def test_only_what_is_used_is_written(case: Any) -> None:
    for kind in graphs.kinds(case.spec):
        graph = graphs.build(case.spec, kind, case.names).graph
        needed = {o.name for o in graph.output}
        for output in graph.output:
            needed |= ancestors(graph, output.name)
        assert {n.name for n in graph.node} <= needed
        assert {c.name for c in graph.initializer} <= needed


@pytest.mark.parametrize("kind", ["backward", "backward_from_output"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dvar_feeds_dmean_feeds_dx(case: Any, kind: str, dtype: str) -> None:
    graph = graphs.build(case.spec, kind, case.names, dtype).graph
    assert "dvar" in ancestors(graph, "dx")
    if case.op == "rms_norm":
        assert not any("mean" in node.name for node in graph.node)
    else:
        assert "dmean" in ancestors(graph, "dx")
        assert "dvar" in ancestors(graph, "dmean")
        assert "delta" in ancestors(graph, "dvar") & ancestors(graph, "dmean")


def test_row_sums_are_made_once_and_serve_all(case: Any) -> None:
    graph = graphs.build(case.spec, "backward", case.names).graph
    full = {i.name for i in graph.input if i.name in ("dy", "x")} | {"x_mu", "dot"}
    full |= {f"{name}_inside" for name in full}
    sums = [n for n in graph.node if n.op_type == "ReduceSum" and n.input[0] in full]
    assert len({tuple(n.input) for n in sums}) == len(sums)
    if not case.channels_last:  # there the parameters sum along rows, the statistics across
        assert len({n.input[0] for n in sums}) == len(sums)


def test_half_types_are_cast_at_the_border_only(case: Any) -> None:
    for dtype in ("float16", "bfloat16"):
        for kind in graphs.kinds(case.spec):
            graph = graphs.build(case.spec, kind, case.names, dtype).graph
            ends = {v.name for v in (*graph.input, *graph.output)}
            halves = {
                v.name
                for v in (*graph.input, *graph.output)
                if v.type.tensor_type.elem_type
                in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
            }
            for node in graph.node:
                touched = {*node.input, *node.output} & halves
                assert not touched or (node.op_type == "Cast" and touched <= ends)


def test_metadata_says_what_was_built() -> None:
    spec = NormSpec("rms_norm", eps=None)
    model = graphs.build(spec, "backward", ("N", 64), "float16")
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata.pop("normgraph.version") == ng.__version__ == model.producer_version
    assert NormSpec.from_dict(json.loads(metadata.pop("normgraph.spec"))) == spec.resolve("float16")
    assert metadata == {
        "normgraph.kind": "backward",
        "normgraph.dtype": "float16",
        "normgraph.shape": '["N", 64]',
    }


def test_a_build_is_the_same_every_time(case: Any) -> None:
    for kind in graphs.kinds(case.spec):
        first, second = (graphs.build(case.spec, kind, case.names) for _ in range(2))
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(
            deterministic=True
        )


def test_a_build_takes_milliseconds() -> None:
    spec = NormSpec("batch_norm", momentum=None, correction=1)
    times = []
    for _ in range(20):
        start = time.thread_time()  # whatever else the machine does
        graphs.build(spec, "forward", ("N", 64, "H", "W"), "float16")
        times.append(time.thread_time() - start)
    assert sorted(times)[len(times) // 2] < 0.010


@pytest.mark.parametrize(
    "shape",
    [
        ("N", 6, "H", "W"),
        ["N", 6, "H", "W"],
        "N,6,H,W",
        "(N, 6, H, W)",
        " 'N', 6, 'H', 'W', ",
        ("N", np.int64(6), "H", "W"),
        ("N", "6", "H", "W"),
        pytest.param((d for d in ("N", 6, "H", "W")), id="a generator"),
    ],
    ids=repr,
)
def test_forms_of_a_shape(shape: Any) -> None:
    model = graphs.build(NormSpec("instance_norm"), "forward", shape)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 6, "H", "W"]


@pytest.mark.parametrize(
    ("op", "options", "shape", "message"),
    [
        ("batch_norm", {}, (4, 6, 0), "expected ints of at least 1 and names, .* may be empty a"),
        ("batch_norm", {}, (4, 6, -1), "got -1"),
        ("batch_norm", {}, (4, 6, 1.5), "got 1.5"),
        ("batch_norm", {}, (4, 6, True), "got True"),
        ("batch_norm", {}, (4, 6, None), "got None"),
        ("batch_norm", {}, "4,6,7x", "got '7x'"),
        ("batch_norm", {}, "4,,6", "got ''"),
        ("batch_norm", {}, "", "got ''"),
        ("batch_norm", {}, 4, "shape: expected dims, such as"),
        ("batch_norm", {}, (4,), r"batch_norm takes 2 to 5 dims \(n c s\*\); got 1 in \(4\)"),
        ("batch_norm", {}, (1, 2, 3, 4, 5, 6), "takes 2 to 5 dims"),
        ("instance_norm", {}, ("N", 4), "instance_norm takes 3 to 5 dims"),
        ("layer_norm", {}, (8,), "layer_norm takes 2 to 5 dims"),
        ("layer_norm", {"normalized_ndim": 3}, (4, 8), "at most the 2 dims of .*; got 3"),
        ("batch_norm", {}, ("N", "C", 4), "expected an int at axis 1 .*parameters vary along it"),
        (
            "instance_norm",
            {"weight": False, "bias": False, "track_running_stats": True},
            ("N", "C", 4),
            "because running statistics vary along it; got the name 'C'",
        ),
        ("batch_norm", {"weight": False, "bias": False}, ("N", "C", 4), "running statistics vary"),
        ("instance_norm", {"weight": False}, ("N", "C", 4), "got the name 'C' in .N, C, 4."),
        ("group_norm", {"groups": 2}, ("N", "C", 4), "because groups split it"),
        ("group_norm", {"groups": 4}, ("N", 6, 4), "divisor of the 6 channels .*; got 4"),
        ("layer_norm", {}, ("N", 4, "D"), "expected an int at axis 2"),
        ("rms_norm", {"normalized_ndim": 2}, ("N", "T", 8), "expected an int at axis 1"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    op: str, options: dict[str, Any], shape: Any, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        graphs.build(NormSpec(op, **options), "forward", shape)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SpecError, match=r"dtype: expected one of .*; got 'int8'"):
        graphs.build(NormSpec("layer_norm"), "forward", (4, 8), "int8")


def test_export_writes_one_file_a_kind(tmp_path: Path) -> None:
    spec = NormSpec("batch_norm")
    files = graphs.export(spec, shape=("N", 6, "H"), dtype="float64", out=tmp_path / "a" / "b")
    assert files == {kind: tmp_path / "a" / "b" / f"{kind}.onnx" for kind in graphs.kinds(spec)}
    for kind, path in files.items():
        assert onnx.load(path) == graphs.build(spec, kind, ("N", 6, "H"), "float64")


def test_export_of_some_kinds(tmp_path: Path) -> None:
    files = graphs.export(
        NormSpec("batch_norm"), shape="N,6,H", out=str(tmp_path), kinds=["backward", "forward"]
    )
    assert list(files) == ["backward", "forward"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backward.onnx", "forward.onnx"]


@pytest.mark.parametrize("kinds", [[], "forward", ["forward", "upward"]])
def test_export_of_what_is_no_kind_writes_nothing(kinds: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"expected .*forward, inference"):
        graphs.export(NormSpec("layer_norm"), shape="N,6", out=tmp_path / "a", kinds=kinds)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("misuse", "error", "message"),
    [
        (lambda g: g.Mul("a", "x", "b"), NormGraphError, "reads 'b', which nothing makes before"),
        (lambda g: g.Mul("x", "x", "x"), NormGraphError, "'x' is made twice"),
        (lambda g: g.Softmax("a", "x"), AttributeError, "Softmax is not one of Abs, Add"),
        (lambda g: g.output("z", "float32", ()), NormGraphError, "'z' is made by no node"),
    ],
)
def test_the_writer_refuses_a_wrong_graph_at_the_line(
    misuse: Callable[[GraphWriter], object], error: type[Exception], message: str
) -> None:
    writer = GraphWriter("float32")
    writer.input("x", "float32", ("N",))
    with pytest.raises(error, match=message):
        misuse(writer)
