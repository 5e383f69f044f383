"""The rule's knobs: each decides something, none of them what a kernel computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import normgraph
from normgraph import NormSpec
from normgraph.compile import graph_files, pipeline
from normgraph.compile.cache_key import build_key
from normgraph.compile.knobs import Knobs, knobs, tried
from normgraph.compile.targets import resolve
from normgraph.graphs import build
from normgraph.scripts.bench_knobs import TRIALS

NAMES = sorted(asdict(Knobs()))
SHAPE = ("N", 6, "H", "W")
# Where it is not the backward of batch norm that a knob is for.
ELSEWHERE = {
    "slices": ("instance_norm", "forward"),
    "slices_of_two": ("instance_norm", "backward"),
    "exact_row": ("instance_norm", "forward"),
    "ahead_short": ("instance_norm", "backward"),
    "ahead_long": ("instance_norm", "backward"),
    "ahead_bytes_of_two": ("instance_norm", "backward"),
    "far_run_bytes": ("instance_norm", "backward"),
    "far_long_row": ("instance_norm", "backward"),
    "streamed_run": ("instance_norm", "forward"),
    "streamed_run_of_two": ("instance_norm", "backward"),
    "streamed_long_row": ("layer_norm", "forward"),
    "streamed_ragged": ("instance_norm", "forward"),
    "staged_columns": ("layer_norm", "backward"),
}


def _scheduled(op: str, kind: str) -> str:
    made = pipeline.schedule(
        kind,
        build(NormSpec(op), kind, shape=("N", 300) if op == "layer_norm" else SHAPE),
        resolve("x86-64-v3"),
        pipeline.Dump(None),
        lambda line: None,
    )
    assert made.rule == "slices"
    return str(made.func.script())


_usual = lru_cache(_scheduled)


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_decides_something(name: str) -> None:
    where = ELSEWHERE.get(name, ("batch_norm", "backward"))
    usual = _usual(*where)
    with tried(**{name: getattr(knobs(), name) // 2}):
        assert _scheduled(*where) != usual
    assert knobs() == Knobs()


def test_the_same_values_give_the_same_kernel() -> None:
    assert _scheduled("instance_norm", "forward") == _usual("instance_norm", "forward")


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("share", [1, 2, 16])
def test_kernels_of_small_values_are_right(
    op: str, share: int, compile_models: Callable[..., Any]
) -> None:
    """With all of them small, shapes of a few elements take the ways of large ones."""
    spec = NormSpec(op)
    models = {kind: build(spec, kind, shape=SHAPE) for kind in ("forward", "backward")}
    small = {name: max(value // (64 * share), 1) for name, value in asdict(Knobs()).items()}
    # Rows that are longer than a block is wide are among them.
    small["short_row"] = 4 * small["columns"]
    with tried(**{**small, "short_row_vector": 16}):
        kernels = compile_models(spec, models)
    for kind in models:
        for sizes in ({"N": 5, "H": 3, "W": 11}, {"N": 70, "H": 2, "W": 2}):
            kernels.check(kind, kernels.inputs(kind, sizes))


def test_every_knob_is_measured() -> None:
    assert sorted({each.knob for each in TRIALS}) == NAMES
    for each in TRIALS:
        assert getattr(knobs(), each.knob) not in each.values


def test_a_name_that_is_none() -> None:
    with pytest.raises(TypeError, match="speed"), tried(speed=3):
        pass


def test_a_build_with_other_values_is_another_build(tmp_path: Path) -> None:
    normgraph.graphs.export(NormSpec("batch_norm"), shape=SHAPE, out=tmp_path, kinds=["backward"])
    graphs = graph_files.read(tmp_path)

    def key() -> str | None:
        return build_key(graphs, [resolve("x86-64-v3")], True)

    usual = key()
    assert usual is not None
    with tried(columns=1024):
        assert key() not in (usual, None)
    assert key() == usual
