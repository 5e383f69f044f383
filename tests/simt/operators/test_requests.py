"""Outputs that are added to, and outputs that nobody asked for, which have no memory."""

from __future__ import annotations

from typing import Any

import pytest

from normgraph import NormSpec

WRITE, ADD = 1, 2
DTYPES = ("float32", "float16", "bfloat16")
IMAGE = ("N", 6, "H", "W")
Sizes = tuple[tuple[int, ...], ...]
# Parts of a warp, blocks, several blocks a slice; columns.
IMAGES: Sizes = ((3, 6, 5, 7), (2, 6, 8, 16), (1, 6, 91, 91))
CASES: dict[str, tuple[NormSpec, tuple[int | str, ...], Sizes]] = {
    "batch_norm": (NormSpec("batch_norm"), IMAGE, IMAGES),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), IMAGE, IMAGES),
    "group_norm": (NormSpec("group_norm", groups=2), IMAGE, IMAGES),
    "layer_norm": (NormSpec("layer_norm"), ("N", 1000), ((3, 1000),)),
    "layer_norm of long rows": (NormSpec("layer_norm"), ("N", 8209), ((2, 8209),)),
    "rms_norm": (NormSpec("rms_norm"), ("N", 37), ((3, 37), (70, 37))),
    "rms_norm of long rows": (NormSpec("rms_norm"), ("N", 8209), ((2, 8209),)),
    "channels last": (NormSpec("batch_norm"), ("N", 5), ((3, 5), (1000, 5))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_output_can_be_added_to(
    name: str, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype)
    for kind, ports in artifact.ports.items():
        outputs = [port["name"] for port in ports["outputs"]]
        # All, then in turns, so that each is added to beside others that are written.
        mixed = {output: (WRITE, ADD)[k % 2] for k, output in enumerate(outputs)}
        for size in sizes:
            check_kind(artifact, kind, size, requests=dict.fromkeys(outputs, ADD))
        check_kind(artifact, kind, sizes[0], requests=mixed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_output_can_be_had_alone(
    name: str, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    spec, shape, sizes = CASES[name]
    artifact = build_emulated(spec, shape, dtype)
    for kind, ports in artifact.ports.items():
        outputs = [port["name"] for port in ports["outputs"]]
        for number, output in enumerate(outputs):
            for size in (sizes[0], sizes[-1]):
                check_kind(artifact, kind, size, requests={output: (WRITE, ADD)[number % 2]})
        nothing = check_kind(artifact, kind, sizes[0], requests={})
        assert not nothing.arrays.keys() & set(outputs)
