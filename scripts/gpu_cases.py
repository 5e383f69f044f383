"""What is checked and timed on a GPU, and the goal each is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from normgraph import NormSpec

KINDS = ("forward", "inference", "backward")
Shape = tuple[int, ...]
# The artifacts in a folder that was packed: machine code and PTX take a sixth of their size.
ARCHIVE = "artifacts.tar.xz"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# A tensor from here on is to reach a share of the copy bandwidth.
LARGE = 50e6
# Rows of more bytes than this do not stay in one block.
_MOST_HELD = 64 * 1024
# Floors below this are held to the floor plus one launch.
_SMALL_SECONDS = 5e-6
# Sizes of the open extents beside the benchmark's: tails, single rows, rows shorter than a warp.
_AWKWARD = ({"N": 3, "H": 5, "W": 7}, {"N": 1, "H": 1, "W": 13}, {"N": 37, "H": 3, "W": 1})
# Odd planes, longer than a block holds and not aligned, of a tensor that L2 does not hold.
_LONG_PLANE, _LONG_BYTES = {"H": 181, "W": 183}, 300e6


@dataclass(frozen=True)
class Case:
    """One operator at one shape. published: by kind, microseconds of another library on an H200."""

    spec: NormSpec
    shape: Shape
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
        return size_of(self.shape)

    @property
    def title(self) -> str:
        """What it is called in keys and reports."""
        return f"{self.spec.op} {self.size} {self.dtype}"

    @property
    def awkward(self) -> list[Shape]:
        """Shapes of its artifact that no benchmark has; the last one of images is long."""
        found = [self._bound(sizes) for sizes in _AWKWARD]
        if "H" in self.declared:
            one = math.prod(self._bound({"N": 1, **_LONG_PLANE})) * ITEM_BYTES[self.dtype]
            samples = max(3, math.ceil(_LONG_BYTES / one) | 1)
            found.append(self._bound({"N": samples, **_LONG_PLANE}))
        return list(dict.fromkeys(found))

    def _bound(self, sizes: dict[str, int]) -> Shape:
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.declared)

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


def size_of(shape: Shape) -> str:
    return "×".join(map(str, shape))


@dataclass(frozen=True)
class Goal:
    """share: of the copy bandwidth, or None. floor: the copy's time plus one launch.

    what: the kernels that have this goal.
    """

    share: float | None
    floor: bool
    what: str = field(default="", compare=False)

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
_LONG_ROWS = 131072
_LARGE_IMAGES = (64, 256, 56, 56)
# One of each goal and of each way to compute, before all others.
_TELLING = (
    ("instance_norm", _LARGE_IMAGES, "float32"),
    ("batch_norm", _LARGE_IMAGES, "float32"),
    ("layer_norm", (8192, 4096), "float32"),
    ("batch_norm", (32, 128, 56, 56), "float32"),
    ("layer_norm", (512, _LONG_ROWS), "float32"),
    ("group_norm", _LARGE_IMAGES, "float32"),
    ("instance_norm", (2, 32, 512, 512), "float32"),
    ("rms_norm", (8192, 8192), "bfloat16"),
    ("instance_norm", (16, 256, 14, 14), "float32"),
    ("batch_norm", (4, 128, 1024, 1024), "float16"),
)
# Called in every way callers do: a slice a block, and a slice a team of blocks.
BEHAVED = (
    ("instance_norm", (8, 64, 56, 56), "float32"),
    ("batch_norm", (32, 128, 56, 56), "float32"),
)


def identity(case: Case) -> tuple[str, Shape, str]:
    """How `BEHAVED` names a case."""
    return case.spec.op, case.shape, case.dtype


def is_telling(case: Case) -> bool:
    """Whether it comes before all others."""
    return identity(case) in _TELLING


def cases() -> list[Case]:
    """The CPU benchmark's shapes, larger ones of each goal, and those others published.

    The most telling ones come first, each shape once.
    """
    listed = {identity(case): case for case in _all()}
    first = [listed.pop(each) for each in _TELLING]
    return [*first, *listed.values()]


def _all() -> list[Case]:
    found = [
        Case(NormSpec(op), shape, "float32")
        for op in ("instance_norm", "batch_norm")
        for shape in (*_IMAGES, _LARGE_IMAGES)
    ]
    found += [
        Case(NormSpec(op), shape, "float32")
        for op in ("layer_norm", "rms_norm")
        for shape in (*_ROWS, (512, _LONG_ROWS))
    ]
    found += [
        Case(NormSpec("group_norm", groups=32), shape, "float32")
        for shape in ((8, 256, 32, 32), _LARGE_IMAGES)
    ]
    for dtype in ("float16", "bfloat16"):
        for op in ("instance_norm", "batch_norm"):
            shapes = (*_IMAGES[:2], _LARGE_IMAGES)
            found += [Case(NormSpec(op), shape, dtype) for shape in shapes]
        found += [Case(NormSpec("layer_norm"), shape, dtype) for shape in (*_ROWS, (16384, 4096))]
        found.append(Case(NormSpec("rms_norm"), _ROWS[1], dtype))
        found.append(Case(NormSpec("group_norm", groups=32), _LARGE_IMAGES, dtype))
        found += [
            Case(NormSpec(op), (1024, _LONG_ROWS), dtype) for op in ("layer_norm", "rms_norm")
        ]
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
        return Goal(None, floor=True, what="floors under 5 µs")
    if case.nbytes < LARGE:
        return Goal(None, floor=False)
    if case.spec.op == "batch_norm":
        share = {"forward": 0.85, "inference": 0.92, "backward": 0.80}[kind]
        return Goal(share, floor=False, what=f"BatchNorm {kind}")
    if case.row > _MOST_HELD:
        return Goal(0.80, floor=False, what="slices longer than a block")
    if kind == "backward":
        return Goal(0.90, floor=False, what="slices of one block, backward")
    return Goal(0.92, floor=False, what="slices of one block, forward and inference")
