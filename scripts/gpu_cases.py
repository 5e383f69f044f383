"""What is checked and timed on a GPU, and the goal each is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normgraph import NormSpec

KINDS = ("forward", "inference", "backward")
# The artifacts in a folder that was packed: machine code and PTX take a sixth of their size.
ARCHIVE = "artifacts.tar.xz"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# A tensor from here on is to reach a share of the copy bandwidth.
LARGE = 50e6
# Rows of more bytes than this do not stay in one block.
_MOST_HELD = 64 * 1024
# Floors below this are held to the floor plus one launch.
_SMALL_SECONDS = 5e-6


@dataclass(frozen=True)
class Case:
    """One operator at one shape. published: by kind, microseconds of another library on an H200."""

    spec: NormSpec
    shape: tuple[int, ...]
    dtype: str
    published: tuple[tuple[str, float], ...] = ()

    @property
    def declared(self) -> tuple[int | str, ...]:
        """The shape the artifact is built for: open where no parameter has the extent."""
        if self.spec.op in ("layer_norm", "rms_norm"):
            return ("N", self.shape[-1])
        return ("N", self.shape[1], *("H", "W")[: len(self.shape) - 2])

    @property
    def name(self) -> str:
        """The folder of its artifact, which other shapes may share."""
        extent = self.shape[-1] if self.spec.op in ("layer_norm", "rms_norm") else self.shape[1]
        return f"{self.spec.op}-{extent}-{self.dtype}"

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def moved(self, kind: str) -> int:
        """The least bytes a kind moves: each array once, x and y, or x, dy and dx."""
        return self.nbytes * (3 if kind == "backward" else 2)

    @property
    def row(self) -> int:
        """Bytes of the elements behind one mean, of one sample where there are several."""
        if self.spec.op in ("layer_norm", "rms_norm"):
            count = self.shape[-1]
        else:
            count = math.prod(self.shape[2:])
            if self.spec.groups:
                count *= self.shape[1] // self.spec.groups
        return count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Goal:
    """share: of the copy bandwidth. floor: the copy's time plus one launch. Both may be None."""

    share: float | None
    floor: bool

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.share:.0%} of copy"
        return "floor + launch" if self.floor else "ahead of PyTorch"


_IMAGES = (
    (8, 64, 56, 56),
    (32, 128, 56, 56),
    (16, 256, 14, 14),
    (64, 512, 7, 7),
    (2, 32, 512, 512),
)
_ROWS = ((4096, 1024), (8192, 4096))


def cases() -> list[Case]:
    """The CPU benchmark's shapes, larger ones of each goal, and those others published."""
    found = [
        Case(NormSpec(op), shape, "float32")
        for op in ("instance_norm", "batch_norm")
        for shape in (*_IMAGES, (64, 256, 56, 56))
    ]
    found += [
        Case(NormSpec(op), shape, "float32")
        for op in ("layer_norm", "rms_norm")
        for shape in (*_ROWS, (512, 131072))
    ]
    found += [
        Case(NormSpec("group_norm", groups=32), shape, "float32")
        for shape in ((8, 256, 32, 32), (64, 256, 56, 56))
    ]
    for dtype in ("float16", "bfloat16"):
        for op in ("instance_norm", "batch_norm"):
            shapes = (*_IMAGES[:2], (64, 256, 56, 56))
            found += [Case(NormSpec(op), shape, dtype) for shape in shapes]
        found += [Case(NormSpec("layer_norm"), shape, dtype) for shape in (*_ROWS, (16384, 4096))]
        found.append(Case(NormSpec("rms_norm"), _ROWS[1], dtype))
        found.append(Case(NormSpec("group_norm", groups=32), (64, 256, 56, 56), dtype))
    found += [
        # cuDNN frontend's benchmark and TileOPs', as they state them for an H200.
        Case(NormSpec("rms_norm"), (8192, 8192), "bfloat16",
             (("forward", _at(8192 * 8192 * 4, 4.18e12)),)),
        Case(NormSpec("rms_norm"), (16384, 4096), "bfloat16",
             (("backward", _at(16384 * 4096 * 6, 3.80e12)),)),
        Case(NormSpec("layer_norm"), (16384, 8192), "bfloat16"),
        Case(NormSpec("batch_norm"), (4, 128, 1024, 1024), "float16", (("forward", 912.0),)),
        Case(NormSpec("instance_norm"), (256, 128, 28, 28), "float32"),
    ]  # fmt: skip
    return found


def _at(nbytes: int, bandwidth: float) -> float:
    return 1e6 * nbytes / bandwidth


def goal_of(case: Case, kind: str, copy_bandwidth: float) -> Goal:
    """The goal of one kind at one case, where a copy moves that many bytes a second."""
    floor = case.moved(kind) / copy_bandwidth
    if floor < _SMALL_SECONDS:
        return Goal(None, floor=True)
    if case.nbytes < LARGE:
        return Goal(None, floor=False)
    backward = kind == "backward"
    if case.spec.op == "batch_norm" and kind != "inference":
        return Goal(0.80 if backward else 0.85, floor=False)
    if case.row > _MOST_HELD:
        return Goal(0.80, floor=False)
    return Goal(0.90 if backward else 0.92, floor=False)
