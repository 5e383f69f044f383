"""Which of an artifact's libraries this host runs, and which of those is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from normgraph import cpu
from normgraph.cpu import vector_bytes
from normgraph.cuda import capability_of, image_for, state
from normgraph.errors import ArtifactIncompatible, TargetError
from normgraph.runtime import host
from normgraph.runtime.files import listed, short

# Names the target whose library is loaded, in place of the best one.
VARIABLE = "NORMGRAPH_TARGET"


@dataclass(frozen=True)
class Library:
    """One library of an artifact. target: its name; kind, triple and features are those of it.

    self_test: "passed", or another word where the build could not run it. content: the code, whose
    sha256 is as stated. archs, toolkit: of a CUDA library, the images it holds and the CUDA version
    they are of.
    """

    path: Path
    target: str
    kind: str
    triple: str
    features: tuple[str, ...]
    self_test: str
    sha256: str = ""
    content: bytes = field(default=b"", repr=False)
    archs: tuple[str, ...] = ()
    toolkit: tuple[int, ...] = (0, 0)

    def obstacle(self) -> str | None:
        """Why this host cannot run it, or None where it can."""
        found = host.obstacle(self.kind, self.triple, self.features, self.archs, self.toolkit)
        if found is None and self.path.suffix != ".so":
            return "it is an object file, still to be linked into a library"
        return found

    @property
    def device(self) -> int | None:
        """Of a CUDA library the first device that runs it best; None for a CPU library."""
        if self.kind != "cuda":
            return None
        usable = [
            (image.startswith("sm_"), -each.index)
            for each in state().devices
            if (image := image_for(each.capability, self.archs))
        ]
        return -max(usable)[1] if usable else 0

    @property
    def rank(self) -> tuple[int, int]:
        """Higher is better: first by the width of vectors, then by how much is used of the CPU.

        Of CUDA libraries, first one with machine code for a device that is here.
        """
        if self.kind == "cuda":
            images = [image_for(each.capability, self.archs) or "" for each in state().devices]
            latest = max((capability_of(image) or (0, 0) for image in images), default=(0, 0))
            return sum(image.startswith("sm_") for image in images), 10 * latest[0] + latest[1]
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
            f" ({listed(f'{each.target:.60}' for each in libraries)}); it is {short(named)}. Set it"
            f" to one of these, or unset it to have the best one loaded."
        )
    asked = [each for each in libraries if named in ("", each.target)]
    found = [(each, each.obstacle()) for each in asked]
    usable = [each for each, obstacle in found if obstacle is None]
    if not usable:
        reasons = listed((f"{each.target:.60}: {why}" for each, why in found), between="; ")
        what = f"the library that {VARIABLE} asks for does not run" if named else (
            "no library of the artifact runs"
        )  # fmt: skip
        advice = f"Unset {VARIABLE}" if named else "Compile it for a target this host runs"
        if not cpu.cpu_flags():
            advice = "Have /proc mounted, also in a container or a chroot"
        raise ArtifactIncompatible(
            f"{root}: {what} on this host ({reasons or 'it has none'}). {advice}."
        )
    return max(usable, key=lambda each: each.rank)
