"""Builds beside each other, and the self-test that lets none out that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

import normgraph as ng
from normgraph.compile import build
from normgraph.errors import CompileError
from normgraph.graphs import export


def test_several_threads_build(tmp_path: Path) -> None:
    def one(index: int) -> ng.NormSpec:
        spec = ng.NormSpec("rms_norm", eps=10.0**-index)
        graphs = tmp_path / f"graphs{index}"
        export(spec, shape=("N", 5), out=graphs, kinds=("inference",))
        return ng.load(build(graphs, out=tmp_path / f"out{index}")).spec

    with ThreadPoolExecutor(4) as pool:
        specs = list(pool.map(one, range(1, 5)))
    assert [spec.eps for spec in specs] == [10.0**-index for index in range(1, 5)]


def test_the_graphs_own_directory_is_refused(tmp_path: Path) -> None:
    export(ng.NormSpec("rms_norm"), shape=("N", 5), out=tmp_path, kinds=("inference",))
    with pytest.raises(CompileError, match="would lie among the graphs"):
        build(tmp_path, out=tmp_path / ".." / tmp_path.name)
    assert {file.name for file in tmp_path.iterdir()} == {"inference.onnx"}


# In exact arithmetic delta is 0 and these change nothing; eps counts where the variance is small.
CORRECTIONS = [
    ("forward", "x_centred"),
    ("forward", "var_eps"),
    ("backward", "dot_shift"),
    ("backward", "dot_centred"),
]


@pytest.mark.parametrize(("kind", "name"), CORRECTIONS)
def test_a_flipped_correction_fails_the_self_test(
    kind: str, name: str, tmp_path: Path, flip: Callable[[onnx.ModelProto, str], None]
) -> None:
    spec = ng.NormSpec("batch_norm")
    (file,) = export(spec, shape=("N", 6, "L"), out=tmp_path, kinds=(kind,)).values()
    model = onnx.load(file)
    flip(model, name)
    onnx.save(model, file)
    with pytest.raises(CompileError, match="gives a wrong"):
        build(tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def flip() -> Callable[[onnx.ModelProto, str], None]:
    """Change the operator of the node that makes a tensor: + and -, * and /."""
    other = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul"}

    def change(model: onnx.ModelProto, name: str) -> None:
        (node,) = (n for n in model.graph.node if name in n.output)
        node.op_type = other[node.op_type]

    return change
