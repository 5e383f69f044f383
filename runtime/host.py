"""Whether this machine, and the loader that is installed, can run a library."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import tvm_ffi

from normgraph import cuda
from normgraph.cpu import FLAGS_FILES, MACHINE_NAMES, cpu_flags, has_feature, machine
from normgraph.runtime.files import listed

# The versions of tvm_ffi a library was made for: the first, and the first that is too new.
LoaderRange = tuple[tuple[int, ...], tuple[int, ...]]


def obstacle(
    kind: str,
    triple: str,
    features: Collection[str],
    archs: Sequence[str] = (),
    toolkit: tuple[int, ...] = (0, 0),
) -> str | None:
    """Why a library for this target cannot run here, or None where it can.

    archs, toolkit: of a CUDA library, the images it holds and the CUDA version they are of.
    """
    if kind not in ("llvm", "c", "cuda"):
        return f"it is for {kind:.60} devices, and this loader runs CPU and CUDA libraries"
    architecture, _, system = triple.partition("-")
    architecture = MACHINE_NAMES.get(architecture, architecture)
    if architecture != machine():
        return f"it is for {architecture:.60}, and this host is {machine()}"
    if "linux" not in system:
        return f"it is for {system or 'an unknown system':.60}, and this host runs Linux"
    flags = cpu_flags()
    missing = [name for name in features if not has_feature(name.removeprefix("+"), flags)]
    needed = listed(f"{name:.60}" for name in missing)
    if missing and not flags:
        source = FLAGS_FILES.get(machine(), "/proc")
        return (
            f"it needs the CPU features {needed}, and which of them this host has cannot be told:"
            f" {source} cannot be read, or says nothing"
        )
    if missing:
        return f"it needs the CPU features {needed}, which this host lacks"
    return cuda.obstacle(archs, (toolkit[0], toolkit[1])) if kind == "cuda" else None


def loader_obstacle(needed: LoaderRange, installed: str = tvm_ffi.__version__) -> str | None:
    """Why the tvm_ffi that is installed cannot load an artifact's libraries, or None."""
    first, below = needed
    leading = re.match(r"[0-9]+(\.[0-9]+)*", installed)
    version = tuple(int(part) for part in leading.group().split(".")) if leading else ()
    if first <= version < below:
        return None
    wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, below))}"
    return (
        f"its libraries are for apache-tvm-ffi {wanted}, and {installed} is installed. Install"
        f" another one (pip install 'apache-tvm-ffi{wanted}'), or build the artifact with this one."
    )
