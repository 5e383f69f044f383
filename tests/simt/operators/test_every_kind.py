"""Every operator, kind and dtype, from the text that goes into its artifact, against float64."""

from __future__ import annotations

from typing import Any

import pytest

from normgraph import NormSpec

IMAGE, LINE = ("N", 6, "H", "W"), ("N", "T", 37)
OPERATORS: dict[str, tuple[NormSpec, tuple[int | str, ...]]] = {
    "batch_norm": (NormSpec("batch_norm"), IMAGE),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), IMAGE),
    "group_norm": (NormSpec("group_norm", groups=2), IMAGE),
    "layer_norm": (NormSpec("layer_norm"), LINE),
    "rms_norm": (NormSpec("rms_norm"), LINE),
}
RUNNING = ("batch_norm", "instance_norm")
KINDS = ("forward", "inference", "backward", "backward_frozen", "backward_from_output")
DTYPES = ("float32", "float16", "bfloat16")
# Primes; a plane smaller than a vector; one long odd row; whole vectors.
IMAGES = ((3, 6, 5, 7), (2, 6, 1, 3), (1, 6, 1, 127), (2, 6, 8, 16))
LINES = ((3, 5, 37), (1, 1, 37), (2, 61, 37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (op, kind)
        for op in OPERATORS
        for kind in KINDS
        if kind != "backward_frozen" or op in RUNNING
    ],
)
def test_a_kind(op: str, kind: str, dtype: str, build_emulated: Any, check_kind: Any) -> None:
    spec, shape = OPERATORS[op]
    artifact = build_emulated(spec, shape, dtype)
    for seed, size in enumerate(IMAGES if shape is IMAGE else LINES):
        check_kind(artifact, kind, size, mean=100.0 * (seed % 2), seed=seed)
