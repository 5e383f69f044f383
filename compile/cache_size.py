"""How much of the last-level cache of this machine a kernel may count on."""

from __future__ import annotations

from pathlib import Path

USUAL = 32 << 20  # where the machine that will run the kernel is not known

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20}
# A virtual machine is told the size of a cache whose other CPUs and their owners it does not see.
# Measured on 2 CPUs that saw all 480 MB of a Granite Rapids: copies ran at the speed of memory from
# 48 to 64 MB on (both arrays together) on one thread, from 64 to 96 MB on two.
_MOST_A_CPU = 32 << 20


def last_level_cache(caches: Path = _CACHES) -> int:
    """Bytes of the largest cache, but no more than 32 MB for each CPU that is seen to share it."""
    known = []
    for size in sorted(caches.glob("index*/size")):
        try:
            text = size.read_text().strip()
        except OSError:  # a container may hide it
            continue
        if text[-1:] in _UNITS and text[:-1].isdigit():
            shared = _count(size.with_name("shared_cpu_list"))
            known.append(min(int(text[:-1]) * _UNITS[text[-1]], shared * _MOST_A_CPU))
    return max(known, default=0) or USUAL


def _count(cpus: Path) -> int:
    """The CPUs in a list such as 0-3,8; one where it cannot be read."""
    try:
        ranges = [part.split("-") for part in cpus.read_text().strip().split(",")]
        return max(1, sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges))
    except (OSError, ValueError):
        return 1
