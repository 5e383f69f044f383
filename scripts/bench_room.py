"""How much memory there is, and a process that gets an error where it asks for more."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

# Of what there is: the rest is for page tables and for what others take meanwhile.
_SHARE = 0.95


def room() -> int:
    """Bytes that processes can have without any being written out to a disk."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def no_more_than_there_is() -> Iterator[None]:
    """Memory is refused to this process where there is none left.

    Linux gives out more than there is and ends whoever touches it; a peer that is refused its
    memory raises, and the others go on.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # The sixth number is the pages of data and stacks, which the limit is for.
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    most = held + int(_SHARE * room())
    allowed = [each for each in before if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([most, *allowed]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
