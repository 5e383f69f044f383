"""Whether this machine can run a library."""

from __future__ import annotations

from collections.abc import Collection

from normgraph.cpu import MACHINE_NAMES, cpu_flags, has_feature, machine


def obstacle(kind: str, triple: str, features: Collection[str]) -> str | None:
    """Why a library for this target cannot run here, or None where it can."""
    if kind not in ("llvm", "c"):
        return f"it is for {kind} devices, and this loader runs CPU libraries"
    architecture, _, system = triple.partition("-")
    architecture = MACHINE_NAMES.get(architecture, architecture)
    if architecture != machine():
        return f"it is for {architecture}, and this host is {machine()}"
    if "linux" not in system:
        return f"it is for {system or 'an unknown system'}, and this host runs Linux"
    flags = cpu_flags()
    missing = [name for name in features if not has_feature(name.removeprefix("+"), flags)]
    if missing:
        return f"it needs the CPU features {', '.join(missing)}, which this host lacks"
    return None
