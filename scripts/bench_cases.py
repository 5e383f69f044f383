"""The standard cases, and the goal each is held to."""

from __future__ import annotations

from dataclasses import dataclass

from normgraph import NormSpec

KINDS = ("forward", "inference", "backward")
IN_CACHE, MEMORY = "cache", "memory"
SMALL = "small rows"


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    place    where the arrays are: "cache" (they fit the last level), "memory", or "small rows" (in
             the cache, and 7x7 or 14x14 elements a channel)
    """

    spec: NormSpec
    shape: tuple[int, ...]
    dtype: str
    place: str

    @property
    def declared(self) -> tuple[int | str, ...]:
        """The shape the artifact is built for: open where no parameter has the extent."""
        if self.spec.op in ("layer_norm", "rms_norm"):
            return ("N", self.shape[-1])
        return ("N", self.shape[1], *("H", "W")[: len(self.shape) - 2])

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))


@dataclass(frozen=True)
class Goal:
    """At most `limit` times the copy or the add; the best peer takes at least `peer` times ours.

    blocked  the peers that have their arrays in a blocked layout count too
    """

    limit: float | None
    peer: float
    blocked: bool = False


_IMAGES = (
    ((8, 64, 56, 56), IN_CACHE),
    ((32, 128, 56, 56), MEMORY),
    ((16, 256, 14, 14), SMALL),
    ((64, 512, 7, 7), SMALL),
    ((2, 32, 512, 512), MEMORY),
)
_ROWS = (((4096, 1024), IN_CACHE), ((8192, 4096), MEMORY))


def standard_cases() -> list[Case]:
    """float32 at every shape; float16 and bfloat16 at one in cache and one in memory."""
    found = [
        Case(NormSpec(op), shape, "float32", place)
        for op in ("instance_norm", "batch_norm")
        for shape, place in _IMAGES
    ]
    found += [
        Case(NormSpec(op), shape, "float32", place)
        for op in ("layer_norm", "rms_norm")
        for shape, place in _ROWS
    ]
    found.append(Case(NormSpec("group_norm", groups=32), (8, 256, 32, 32), "float32", IN_CACHE))
    for dtype in ("float16", "bfloat16"):
        for op, shapes in (
            ("instance_norm", _IMAGES[:2]),
            ("batch_norm", _IMAGES[:2]),
            ("layer_norm", _ROWS),
        ):
            found += [Case(NormSpec(op), shape, dtype, place) for shape, place in shapes]
    return found


_NORMS = ("layer_norm", "rms_norm")
_GOALS = {
    ("instance_norm", "forward", IN_CACHE): Goal(1.10, 2.2),
    ("instance_norm", "forward", MEMORY): Goal(0.90, 2.2),
    ("instance_norm", "forward", SMALL): Goal(1.4, 1.2, True),
    ("instance_norm", "backward", IN_CACHE): Goal(1.15, 1.7),
    ("instance_norm", "backward", MEMORY): Goal(0.95, 1.3),
    ("instance_norm", "backward", SMALL): Goal(1.2, 1.2, True),
    ("batch_norm", "forward", IN_CACHE): Goal(1.30, 2.0),
    ("batch_norm", "forward", MEMORY): Goal(1.05, 2.0),
    ("batch_norm", "forward", SMALL): Goal(1.5, 1.2, True),
    ("batch_norm", "backward", IN_CACHE): Goal(1.4, 1.3),
    ("batch_norm", "backward", MEMORY): Goal(1.1, 1.3),
    ("batch_norm", "backward", SMALL): Goal(1.6, 1.2, True),
    ("group_norm", "forward", IN_CACHE): Goal(1.2, 1.5),
    ("group_norm", "backward", IN_CACHE): Goal(1.4, 1.3),
    **{(op, "forward", place): Goal(1.0, 1.5) for op in _NORMS for place in (IN_CACHE, MEMORY)},
    **{(op, "backward", place): Goal(1.2, 1.5) for op in _NORMS for place in (IN_CACHE, MEMORY)},
}
# In cache a half type moves half the bytes and computes as much.
_HALF_IN_CACHE = 1.6


def goal_of(case: Case, kind: str) -> Goal:
    """The goal of one kind; inference, and what has none, is not to be slower than any peer.

    A half type has float32's ratio to its own copy or add in memory and 1.6 times it in cache, and
    is not to be slower than any peer.
    """
    goal = _GOALS.get((case.spec.op, kind, case.place))
    if goal is None or goal.limit is None:
        return Goal(None, 1.0)
    if case.dtype == "float32":
        return goal
    wider = _HALF_IN_CACHE if case.place == IN_CACHE else 1.0
    return Goal(round(goal.limit * wider, 3), 1.0)


def verdict(goal: Goal, over_limit: float | None, peer: float | None) -> str:
    """ "met", or by how much each half of the goal is missed."""
    missed = []
    if goal.limit is not None and over_limit is not None and over_limit > goal.limit:
        missed.append(f"limit {over_limit / goal.limit - 1.0:+.0%}")
    if peer is not None and peer < goal.peer:
        missed.append(f"peer {peer / goal.peer - 1.0:+.0%}")
    return ", ".join(missed) or "met"
