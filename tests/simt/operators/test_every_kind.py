"""Every operator, kind and dtype, from the text that goes into its artifact, against float64.

Between them the sizes launch every kernel of an artifact, which the tests see to: each width of
vectors, each number of threads, slices within a warp, in a block, over several blocks, columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from normgraph import NormSpec

IMAGE = ("N", 6, "H", "W")
OPERATORS = {
    "batch_norm": NormSpec("batch_norm"),
    "instance_norm": NormSpec("instance_norm", track_running_stats=True),
    "group_norm": NormSpec("group_norm", groups=2),
    "layer_norm": NormSpec("layer_norm"),
    "rms_norm": NormSpec("rms_norm"),
}
KINDS = ("forward", "inference", "backward", "backward_frozen", "backward_from_output")
DTYPES = ("float32", "float16", "bfloat16")


def kinds_of(op: str) -> list[str]:
    return [
        kind for kind in KINDS if kind != "backward_frozen" or op in ("batch_norm", "instance_norm")
    ]


# Primes; planes smaller than a vector; of 4 elements a vector; one odd row; one sample.
IMAGES = (
    (3, 6, 5, 7), (2, 6, 1, 3), (5, 6, 14, 14), (2, 6, 2, 2), (1, 6, 1, 127), (2, 6, 8, 16),
    (2, 6, 6, 6), (2, 6, 4, 128), (1, 6, 4, 64), (1, 6, 2, 64),
    # Longer and longer ones, whole vectors and single elements.
    (1, 6, 10, 100), (1, 6, 2, 1000), (1, 6, 29, 31), (1, 6, 37, 41), (1, 6, 1, 4095),
    (2, 6, 64, 64),
    (1, 6, 1, 4004), (1, 6, 1, 8004), (1, 6, 1, 8192), (1, 6, 128, 128),
    (1, 6, 1, 32768),
    # Too long for a block: odd, whole vectors of 4 elements, whole vectors of 16 bytes.
    (1, 6, 91, 91), (1, 6, 1, 16004), (1, 6, 1, 32776),
)  # fmt: skip

# Parts of a warp; longer than a block's registers on any device.
LONGER = ((3, 2, 5, 7), (3, 2, 106, 106))


def check_all(
    check_kind: Any,
    device: Any,
    artifact: Any,
    kind: str,
    sizes: Sequence[tuple[int, ...]],
    misaligned: tuple[int, ...] = (),
) -> None:
    """Hold a kind to float64 at every size, and see that none of its kernels was left out.

    misaligned: those of the sizes, by number, at which all arrays are at odd addresses as well.
    """
    launched: set[str] = set()

    def run(number: int) -> None:
        mean = 100.0 * (number % 2)
        came = check_kind(artifact, kind, sizes[number], mean=mean, seed=number)
        launched.update(launch.kernel for launch in came.launches)
        if number in misaligned:
            item = 4 if artifact.dtype == "float32" else 2
            off = {p["name"]: item for p in artifact.ports[kind]["inputs"] if p["name"] == "x"}
            off |= {p["name"]: item for p in artifact.ports[kind]["outputs"] if p["name"] == "dx"}
            came = check_kind(artifact, kind, sizes[number], mean=mean, seed=number, misaligned=off)
            launched.update(launch.kernel for launch in came.launches)

    for number in range(len(sizes)):
        run(number)
    own = {name for name in artifact.program.kernels if name.rsplit("_kernel")[0] == kind}
    # The rest is for devices on which several blocks hold a long slice together.
    device(3)
    for number in reversed(range(len(sizes))):
        if not launched >= own:
            run(number)
    assert launched == own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "kind"),
    [(op, kind) for op in ("batch_norm", "instance_norm", "group_norm") for kind in kinds_of(op)],
)
def test_images(
    op: str, kind: str, dtype: str, build_emulated: Any, check_kind: Any, device: Any
) -> None:
    check_all(check_kind, device, build_emulated(OPERATORS[op], IMAGE, dtype), kind, IMAGES)


# Channels last: slices are columns. Fewer columns than a warp has threads, as many, more; more
# rows than a block goes through at a time.
MATRICES = {
    5: ((3, 5), (1000, 5), (2311, 5)),
    64: ((2, 64), (129, 64), (1, 64)),
    131: ((37, 131), (70, 131)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds_of("batch_norm"))
@pytest.mark.parametrize("columns", MATRICES)
def test_channels_last(
    columns: int, kind: str, dtype: str, build_emulated: Any, check_kind: Any, device: Any
) -> None:
    artifact = build_emulated(OPERATORS["batch_norm"], ("N", columns), dtype)
    check_all(check_kind, device, artifact, kind, MATRICES[columns], misaligned=(0, 1))


# Rows of these lengths, each of its own graph: parts of a warp, a warp, blocks of each size, and
# several blocks. Odd ones take single elements, the others vectors where pointers are aligned.
LENGTHS = {
    37: ((3, 37), (1, 37), (122, 37)),
    256: ((9, 256),),
    1000: ((3, 1000),),
    1371: ((2, 1371),),
    4096: ((3, 4096),),
    8209: ((2, 8209),),
    32776: ((2, 32776),),
}


# Half types at those of each way alone, in turns: between them there is no difference but the type.
HALF_LENGTHS = {"float16": (37, 4096), "bfloat16": (1371, 32776)}


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        (length, dtype)
        for length in LENGTHS
        for dtype in DTYPES
        if length in HALF_LENGTHS.get(dtype, LENGTHS)
    ],
)
@pytest.mark.parametrize(
    ("op", "kind"), [(op, kind) for op in ("layer_norm", "rms_norm") for kind in kinds_of(op)]
)
def test_rows(
    length: int, op: str, kind: str, dtype: str, build_emulated: Any, check_kind: Any, device: Any
) -> None:
    artifact = build_emulated(OPERATORS[op], ("N", length), dtype)
    check_all(check_kind, device, artifact, kind, LENGTHS[length], misaligned=(0,))


@pytest.mark.parametrize(
    ("spec", "shape", "sizes"),
    [
        (NormSpec("batch_norm", momentum=None), ("N", 2, "H", "W"), LONGER),
        (
            NormSpec("instance_norm", momentum=None, track_running_stats=True),
            ("N", 2, "H", "W"),
            LONGER,
        ),
        (NormSpec("batch_norm", momentum=None), ("N", 5), ((3, 5), (1000, 5))),
    ],
    ids=["batch_norm", "instance_norm", "channels last"],
)
def test_a_momentum_of_the_call(
    spec: NormSpec,
    shape: tuple[int | str, ...],
    sizes: Sequence[tuple[int, ...]],
    build_emulated: Any,
    check_kind: Any,
    device: Any,
) -> None:
    """An array of no axes, which kernels read."""
    artifact = build_emulated(spec, shape, kinds=("forward",))
    assert [p["shape"] for p in artifact.ports["forward"]["inputs"]][-1] == []
    for multiprocessors in (0, 3):
        device(multiprocessors)
        for size in sizes:
            check_kind(artifact, "forward", size)
