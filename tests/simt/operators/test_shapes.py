"""Awkward shapes: rows of every short length, one element, one sample, static and open extents."""

from __future__ import annotations

from typing import Any

import pytest

from normgraph import NormSpec

DTYPES = ("float32", "float16", "bfloat16")
IMAGE = ("N", 6, "H", "W")
OPERATORS = {
    "batch_norm": NormSpec("batch_norm"),
    "instance_norm": NormSpec("instance_norm", track_running_stats=True),
    "group_norm": NormSpec("group_norm", groups=2),
    "layer_norm": NormSpec("layer_norm"),
    "rms_norm": NormSpec("rms_norm"),
}
OF_IMAGES = ("batch_norm", "instance_norm", "group_norm")
OF_ROWS = ("layer_norm", "rms_norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OF_IMAGES)
def test_planes_of_1_to_33_elements(
    op: str, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    artifact = build_emulated(OPERATORS[op], IMAGE, dtype)
    # The running variance of one value a channel is 0/0: the runtime refuses such a forward.
    least = 2 if op == "instance_norm" else 1
    for width in range(least, 34):
        size = (2, 6, 1, width)
        check_kind(artifact, "forward", size, mean=100.0, seed=width)
        check_kind(artifact, "backward", size, mean=100.0, seed=width)


# Kernels of the half types differ in the type alone: each takes the lengths in turn.
@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        (length, dtype)
        for number, length in enumerate((1, 2, 3, 7, 8, 12, 31, 33))
        for dtype in ("float32", DTYPES[1 + number % 2])
    ],
)
@pytest.mark.parametrize("op", OF_ROWS)
def test_rows_of_1_to_33_elements(
    length: int, op: str, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    artifact = build_emulated(OPERATORS[op], ("N", length), dtype, ("forward", "backward"))
    for rows in (1, 2, 67):
        for kind in ("forward", "backward"):
            check_kind(artifact, kind, (rows, length), seed=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OF_IMAGES)
def test_one_sample_and_one_element(
    op: str, dtype: str, build_emulated: Any, check_kind: Any
) -> None:
    artifact = build_emulated(OPERATORS[op], IMAGE, dtype)
    for kind in artifact.ports:
        if kind == "forward" and op != "group_norm":
            continue  # refused, see above
        check_kind(artifact, kind, (1, 6, 1, 1))


# Whole vectors of 16 bytes, of 4 elements and single elements; a group or row of each rule.
STATIC: dict[str, tuple[tuple[int, ...], ...]] = {
    "batch_norm": ((3, 6, 5, 7), (2, 4, 8, 8), (1, 2, 91, 91), (1000, 5), (64, 64)),
    "instance_norm": ((3, 6, 5, 7), (2, 4, 14, 14), (1, 2, 1, 32776), (1, 3, 11)),
    "group_norm": ((3, 6, 5, 7), (2, 4, 8, 8), (1, 2, 91, 91), (5, 12)),
    "layer_norm": ((3, 5, 37), (1, 64), (2, 8216)),
    "rms_norm": ((3, 5, 37), (1, 64), (2, 8216)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPERATORS)
def test_static_graphs(op: str, dtype: str, build_emulated: Any, check_kind: Any) -> None:
    """Every shape in float32, and in one of the half types, which differ in the type alone."""
    shapes = {"float32": STATIC[op], "float16": STATIC[op][::2], "bfloat16": STATIC[op][1::2]}
    for shape in shapes[dtype]:
        artifact = build_emulated(OPERATORS[op], shape, dtype, ("forward", "backward"))
        for kind in ("forward", "backward"):
            check_kind(artifact, kind, shape, mean=100.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["instance_norm", "rms_norm"])
def test_every_extent_open(op: str, dtype: str, build_emulated: Any, check_kind: Any) -> None:
    bias = None if op == "rms_norm" else False
    bare = NormSpec(op, weight=False, bias=bias)
    shape = ("N", "C", "H", "W") if op == "instance_norm" else ("N", "D")
    artifact = build_emulated(bare, shape, dtype, ("forward", "backward"))
    images = ((3, 5, 4, 7), (1, 1, 1, 13), (2, 3, 16, 64), (1, 1, 91, 91))
    lines = ((3, 28), (1, 13), (2, 1024), (1, 8209), (1, 32776))
    for size in images if op == "instance_norm" else lines:
        for kind in ("forward", "backward"):
            check_kind(artifact, kind, size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_arrays_at_odd_addresses(op: str, dtype: str, build_emulated: Any, check_kind: Any) -> None:
    """Sizes of whole vectors, with one array at a time off their alignment."""
    shape, size = (IMAGE, (2, 6, 8, 16)) if op in OF_IMAGES else (("N", 1000), (3, 1000))
    if op == "batch_norm":
        shape, size = ("N", 64), (129, 64)  # its parameters lie along the rows there
    artifact = build_emulated(OPERATORS[op], shape, dtype)
    for kind in ("forward", "backward"):
        ports = artifact.ports[kind]
        for port in (*ports["inputs"], *ports["outputs"]):
            item = 2 if port["dtype"] == dtype else 4
            check_kind(artifact, kind, size, misaligned={port["name"]: item})
