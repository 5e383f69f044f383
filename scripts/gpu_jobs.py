"""What a GPU check consists of, in the order it is done: the most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normgraph.scripts.gpu_behaviour import CHECKS, Behaviour
from normgraph.scripts.gpu_cases import (
    BEHAVED,
    KINDS,
    Case,
    Shape,
    cases,
    identity,
    is_telling,
    size_of,
)
from normgraph.scripts.gpu_run import Bench

ACCURACY, BEHAVIOUR, TIME, COMPILED = "accuracy", "behaviour", "time", "compiled"
# By task the seconds after which there will be no answer, and those one usually takes.
_LIMITS = {ACCURACY: 40.0, BEHAVIOUR: 40.0, TIME: 60.0, COMPILED: 150.0}
_USUAL = {ACCURACY: 2.0, BEHAVIOUR: 2.0, TIME: 4.0, COMPILED: 15.0}
_TRAINED = ("forward", "backward")


@dataclass(frozen=True)
class Job:
    """One answer of a worker. about: the kind, or the check of a behaviour."""

    task: str
    case: Case
    shape: Shape
    about: str

    @property
    def key(self) -> str:
        """Its name, from which a worker knows it, in reports too."""
        case = self.case
        return f"{self.task} {case.spec.op} {size_of(self.shape)} {case.dtype} {self.about}"

    @property
    def limit(self) -> float:
        """Seconds after which it hangs."""
        return _LIMITS[self.task]

    @property
    def usual(self) -> float:
        """Seconds it takes as a rule."""
        return _USUAL[self.task]

    def spoils(self, other: Job) -> bool:
        """Whether the other calls a kernel that did not come back from this one.

        A backward takes the statistics of a forward.
        """
        return (
            self.task in (ACCURACY, TIME)
            and other.task != BEHAVIOUR
            and (self.case, self.shape) == (other.case, other.shape)
            and (self.about == other.about or (self.about, other.about) == ("forward", "backward"))
        )

    def perform(self, bench: Bench) -> dict[str, Any]:
        """numeric: a result against float64, or us and failures: see `Bench.time`."""
        if self.task == ACCURACY:
            return {"numeric": bench.numeric(self.case, self.shape, self.about)}
        if self.task == BEHAVIOUR:
            return {"numeric": Behaviour(bench).check(self.about, self.case)}
        peer = "compiled" if self.task == COMPILED else "eager"
        return bench.time(self.case, self.about, peer)


def jobs(chosen: Sequence[Case] | None = None) -> list[Job]:
    """All jobs of these cases, each once; by default of all cases.

    The telling cases are done whole, torch.compile included, before the others begin; inference by
    torch.compile, which is mostly its forward again, comes last.
    """
    listed = list(cases() if chosen is None else chosen)
    behaved = [case for case in listed if identity(case) in BEHAVED]
    made: list[Job] = []
    for telling in (True, False):
        group = [case for case in listed if is_telling(case) == telling]
        for case in group:
            made += [Job(ACCURACY, case, case.shape, kind) for kind in KINDS]
            made += [Job(TIME, case, case.shape, kind) for kind in KINDS]
        if telling:
            made += [Job(BEHAVIOUR, case, case.shape, what) for case in behaved for what in CHECKS]
        first = {case.name: case for case in reversed(group)}
        for case in reversed(first.values()):
            made += [Job(ACCURACY, case, s, kind) for s in case.awkward for kind in KINDS]
        made += [Job(COMPILED, case, case.shape, kind) for case in group for kind in _TRAINED]
    made += [Job(COMPILED, case, case.shape, kind) for kind in KINDS for case in listed]
    return list({job.key: job for job in made}.values())
