"""Values where a*b + c is rounded once, as CUDA's compilers do wherever they find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normgraph import NormSpec

Case = tuple[NormSpec, tuple[int | str, ...], str, tuple[tuple[int, ...], ...]]
# Parts of a warp and a block a slice; several blocks, which hold it or read it twice; columns.
CASES: dict[str, Case] = {
    "group_norm": (
        NormSpec("group_norm", groups=2),
        ("N", 6, 14, 14),
        "float32",
        ((5, 6, 14, 14),),
    ),
    "instance_norm": (
        NormSpec("instance_norm", track_running_stats=True),
        ("N", 2, 181, 183),
        "float16",
        ((1, 2, 181, 183),),
    ),
    "layer_norm": (NormSpec("layer_norm"), ("N", 36000), "float32", ((3, 36000),)),
    "channels last": (NormSpec("batch_norm"), ("N", 5), "float32", ((3, 5), (1000, 5))),
}


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_kind(
    name: str, kind: str, device: Callable[..., None], build_emulated: Any, check_kind: Any
) -> None:
    spec, shape, dtype, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype, ("forward", "backward"), fused=True)
    for multiprocessors in (0, 3):
        device(multiprocessors)
        for size in sizes:
            for seed, mean in enumerate((0.0, 100.0)):
                check_kind(artifact, kind, size, mean=mean, seed=seed)
