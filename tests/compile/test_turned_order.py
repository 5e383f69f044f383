"""Outputs taken from the end of their slice: the same numbers, in the order that is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from normgraph import NormSpec
from normgraph.compile import cache_size, pipeline
from normgraph.compile.knobs import knobs, tried
from normgraph.compile.targets import resolve
from normgraph.graphs import build

# Rows alone, rows side by side (layer and rms norm backward), rows apart (batch norm).
SHAPES: dict[str, tuple[tuple[int | str, ...], tuple[dict[str, int], ...]]] = {
    "instance_norm": (("N", 2, "L"), ({"N": 2, "L": 1061}, {"N": 2, "L": 4096}, {"N": 3, "L": 9})),
    "batch_norm": (("N", 2, "L"), ({"N": 5, "L": 3001}, {"N": 67, "L": 2048}, {"N": 1, "L": 2})),
    "group_norm": (("N", 4, "L"), ({"N": 3, "L": 2050}, {"N": 2, "L": 7})),
    "layer_norm": (("N", 3000), ({"N": 9}, {"N": 70})),
    "rms_norm": (("N", 4096), ({"N": 9}, {"N": 70})),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("op", sorted(SHAPES))
def test_every_operator(
    op: str,
    streamed: bool,
    compile_models: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if streamed:
        monkeypatch.setattr(cache_size, "last_level_cache", lambda: 0)
    declared, sizes = SHAPES[op]
    spec = NormSpec(op, groups=2 if op == "group_norm" else None)
    models = {kind: build(spec, kind, shape=declared) for kind in ("forward", "backward")}
    with tried(turned=8192):
        kernels = compile_models(spec, models)
    for kind in models:
        for each in sizes:
            kernels.check(kind, kernels.inputs(kind, each))


def _turns(op: str, kind: str, shape: tuple[int | str, ...]) -> bool:
    made = pipeline.schedule(
        kind,
        build(NormSpec(op), kind, shape=shape),
        resolve("x86-64-v3"),
        pipeline.Dump(None),
        lambda line: None,
    )
    return re.search(r"\bway\b|- (?:line|vector)(?:_\d+)?\b", str(made.func.script())) is not None


@pytest.mark.parametrize(
    ("kind", "bytes_each"), [("forward", 4), ("backward", 8), ("inference", 4)]
)
def test_what_l2_keeps_is_taken_in_the_usual_order(kind: str, bytes_each: int) -> None:
    """All of the inputs count; where the size is open, it is looked at by the kernel."""
    least = knobs().turned // bytes_each
    assert _turns("instance_norm", kind, ("N", 2, least))
    assert not _turns("instance_norm", kind, ("N", 2, least - 1))
    assert _turns("instance_norm", kind, ("N", 2, "L"))


def test_nothing_is_read_again_without_sums() -> None:
    assert not _turns("batch_norm", "inference", (2, 3, 1 << 20))
    assert not _turns("batch_norm", "inference", ("N", 3, "L"))
