"""What the assembler and the PTX say of kernels: registers, spills, and how wide accesses are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
# ld.global.nc.v4.f32: modifiers in between, the type at the end.
_GLOBAL = re.compile(r"\b(ld|st)\.(?:volatile\.|weak\.)?global(\.[\w.:]+)?\.[a-z]+(\d+)\b")
_PTX_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers a thread, bytes of stack and of spills, of shared memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        """Whether registers were too few, so that some are kept in memory at times."""
        return self.spill_stores > 0 or self.spill_loads > 0


@dataclass(frozen=True)
class Accesses:
    """How many instructions of one kernel access global memory, and how many of 16 bytes."""

    loads: int
    stores: int
    wide_loads: int
    wide_stores: int


def usage(log: str) -> dict[str, Usage]:
    """By kernel, from what `ptxas -v` says."""
    found: dict[str, Usage] = {}
    parts = _ENTRY.split(log)
    for name, text in zip(parts[1::3], parts[3::3], strict=True):
        spills, used, shared = _SPILLS.search(text), _USED.search(text), _SHARED.search(text)
        stack, stores, loads = map(int, spills.groups()) if spills else (0, 0, 0)
        found[name] = Usage(
            int(used[1]) if used else 0, stack, stores, loads, int(shared[1]) if shared else 0
        )
    return found


def assembled(logs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By architecture: how many kernels were assembled, and the names of those that spill.

    logs: what `ptxas -v` said, by architecture; those without machine code are left out.
    """
    found = {arch: usage(log) for arch, log in logs.items() if arch.startswith("sm_")}
    return {
        arch: {"count": len(each), "spilling": sorted(k for k, u in each.items() if u.spills)}
        for arch, each in found.items()
    }


def accesses(ptx: str) -> dict[str, Accesses]:
    """By kernel, from its PTX."""
    found: dict[str, Accesses] = {}
    parts = _PTX_ENTRY.split(ptx)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        counts = {"ld": [0, 0], "st": [0, 0]}
        for way, modifiers, bits in _GLOBAL.findall(text):
            lanes = re.search(r"\.v(\d)", modifiers or "")
            nbytes = int(lanes[1] if lanes else 1) * int(bits) // 8
            counts[way][0] += 1
            counts[way][1] += nbytes == 16
        found[name] = Accesses(counts["ld"][0], counts["st"][0], counts["ld"][1], counts["st"][1])
    return found
