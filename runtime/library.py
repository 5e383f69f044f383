"""Which of an artifact's libraries this host runs, and which of those is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from normgraph.cpu import vector_bytes
from normgraph.errors import ArtifactIncompatible, TargetError
from normgraph.runtime import host

# Names the target whose library is loaded, in place of the best one.
VARIABLE = "NORMGRAPH_TARGET"


@dataclass(frozen=True)
class Library:
    """One library of an artifact. target: its name; kind, triple and features are those of it.

    self_test: "passed", or another word where the build could not run it. content: the code, whose
    sha256 is as stated.
    """

    path: Path
    target: str
    kind: str
    triple: str
    features: tuple[str, ...]
    self_test: str
    sha256: str = ""
    content: bytes = field(default=b"", repr=False)

    def obstacle(self) -> str | None:
        """Why this host cannot run it, or None where it can."""
        found = host.obstacle(self.kind, self.triple, self.features)
        if found is None and self.path.suffix != ".so":
            return "it is an object file, still to be linked into a library"
        return found

    @property
    def rank(self) -> tuple[int, int]:
        """Higher is better: first by the width of vectors, then by how much is used of the CPU."""
        return vector_bytes(self.features), len(self.features)


def choose(root: Path, libraries: Sequence[Library]) -> Library:
    """The best library this host runs, or the one of the target that NORMGRAPH_TARGET names.

    Raises ArtifactIncompatible where there is none, or the named one does not run here, and
    TargetError where the artifact has none of that name.
    """
    named = os.environ.get(VARIABLE, "")
    if named and libraries and named not in (each.target for each in libraries):
        raise TargetError(
            f"{root}: expected {VARIABLE} to name a target this artifact has a library for"
            f" ({', '.join(each.target for each in libraries)}); it is {named!r}. Set it to one of"
            f" these, or unset it to have the best one loaded."
        )
    asked = [each for each in libraries if named in ("", each.target)]
    found = [(each, each.obstacle()) for each in asked]
    usable = [each for each, obstacle in found if obstacle is None]
    if not usable:
        reasons = "; ".join(f"{each.target}: {obstacle}" for each, obstacle in found)
        what = f"the library that {VARIABLE} asks for does not run" if named else (
            "no library of the artifact runs"
        )  # fmt: skip
        advice = f"Unset {VARIABLE}" if named else "Compile it for a target this host runs"
        raise ArtifactIncompatible(
            f"{root}: {what} on this host ({reasons or 'it has none'}). {advice}."
        )
    return max(usable, key=lambda each: each.rank)
