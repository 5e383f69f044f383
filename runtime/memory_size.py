"""How much memory this process may have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def memory_size(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the machine's memory, or what its control groups leave of it, such as a container's.

    `proc` and `groups` are where the system shows processes and control groups (versions 1 and 2).
    """
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _limit_files(proc, groups):
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue  # not there, or not for us to read
        if text.isdecimal():  # "max" where there is no limit
            size = min(size, int(text))
    return size


def _limit_files(proc: Path, groups: Path) -> Iterator[Path]:
    """The limits of the control groups this process is in, and of the groups around them."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, name = groups, "memory.max"
        if controllers:
            root, name = groups / "memory", "memory.limit_in_bytes"
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            yield root / group / name
