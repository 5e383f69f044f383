"""Shapes that are too large for a self-test: the bound is that of the runtime, which reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

import normgraph as ng
from normgraph.compile import vectors
from normgraph.compile.vectors import Port
from normgraph.runtime.manifest import MOST_TESTED


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((4, 6), 24),
        (("N", 2**24), 2**25),
        (("N", 2**25), 2**26),
        (("N", "C", 2**22), 14 * 2**22),
        (("N", 7), 6143 * 7),
    ],
)
def test_the_elements_of_a_self_test(shape: tuple[int | str, ...], count: int) -> None:
    """Symbolic dims are 2, 7, 13, ..., and the last one of them is grown for several threads."""
    inputs = [Port("x", "float32", shape), Port("gamma", "float32", shape[1:])]
    assert vectors.most_elements(inputs) == count


def test_no_self_test_that_would_not_be_loaded(tmp_path: Path) -> None:
    said: list[str] = []
    spec = ng.NormSpec("rms_norm")
    ng.graphs.export(spec, shape=("N", "C", 2**22), out=tmp_path / "in", kinds=("inference",))
    path = ng.compile.build(tmp_path / "in", out=tmp_path / "out", progress=said.append)
    assert MOST_TESTED < 14 * 2**22
    assert f"no self-test: inputs of {14 * 2**22} elements are too many" in said[0]
    assert ng.load(path).self_test() == ()
