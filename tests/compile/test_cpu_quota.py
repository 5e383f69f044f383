"""The CPU quota of control groups, as the library reads it and as Python does."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import tvm_ffi

from normgraph.runtime import threads

# Files below a root, and the CPUs they allow.
_GROUPS: dict[str, tuple[dict[str, str], int | None]] = {
    "nothing": ({}, None),
    "v2 without a limit": ({"proc": "0::/\n", "cpu.max": "max 100000\n"}, None),
    "v2": ({"proc": "0::/\n", "cpu.max": "150000 100000\n"}, 2),
    "v2 exact": ({"proc": "0::/\n", "cpu.max": "300000 100000\n"}, 3),
    "v2 below": (
        {"proc": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "20000 100000\n"},
        1,
    ),
    "v2 of the host's path": ({"proc": "0::/docker/x\n", "cpu.max": "400000 100000\n"}, 4),
    "v2 smallest": (
        {"proc": "0::/a\n", "a/cpu.max": "500000 100000\n", "cpu.max": "200000 100000\n"},
        2,
    ),
    "v1": (
        {
            "proc": "4:memory:/m\n2:cpu,cpuacct:/c\n1:name=systemd:/\n",
            "cpu,cpuacct/c/cpu.cfs_quota_us": "250000\n",
            "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "v1 without a limit": (
        {"proc": "3:cpu:/\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1 of another controller": (
        {
            "proc": "3:cpuset:/\n",
            "cpu/cpu.cfs_quota_us": "100000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "both": (
        {
            "proc": "3:cpu:/a\n0::/b\n",
            "cpu/a/cpu.cfs_quota_us": "700000\n",
            "cpu/a/cpu.cfs_period_us": "100000\n",
            "unified/b/cpu.max": "600000 100000\n",
        },
        6,
    ),
    "nonsense": ({"proc": "x\n0::/\n::\n", "cpu.max": "many 0\n"}, None),
}


@pytest.mark.parametrize("name", _GROUPS)
def test_the_quota_of_control_groups(name: str, probe_library: Path, tmp_path: Path) -> None:
    """Read by the library, and by Python before there is one."""
    files, limit = _GROUPS[name]
    for file, text in files.items():
        place = tmp_path / ("proc/self/cgroup" if file == "proc" else f"sys/fs/cgroup/{file}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    probe = tvm_ffi.load_module(str(probe_library))
    path = ctypes.create_string_buffer(os.fsencode(tmp_path))
    assert probe["quota"](ctypes.addressof(path)) == (limit or 0)
    assert threads.cpu_quota(tmp_path) == limit
