"""Which hosts normgraph runs on. Checked once, when `normgraph` is imported."""

from __future__ import annotations

import os
import sys

from normgraph.errors import HostError

MACHINES = ("x86_64", "aarch64")
OLDEST_PYTHON = (3, 10)


def check_host(
    platform: str = sys.platform,
    machine: str | None = None,
    python: tuple[int, ...] = tuple(sys.version_info[:2]),
) -> None:
    """Raise `HostError` unless this is Linux on x86_64 or aarch64 with Python 3.10 or later."""
    if machine is None:
        machine = os.uname().machine if hasattr(os, "uname") else "an unknown machine"
    if platform != "linux" or machine not in MACHINES:
        raise HostError(
            f"normgraph runs on Linux on {' and '.join(MACHINES)}; this is {platform} on "
            f"{machine}. Use such a host, or a container or virtual machine with one."
        )
    if python < OLDEST_PYTHON:
        raise HostError(
            f"normgraph needs Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later; this is "
            f"{'.'.join(map(str, python))}. Use a newer Python."
        )
