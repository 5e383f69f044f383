"""This machine's CPU: its architecture, and its features under LLVM's names."""

from __future__ import annotations

import platform
import struct
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

# The levels of the x86-64 psABI: what each asks for beside the instructions every x86-64 CPU has,
# as LLVM names it.
_V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "sahf")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# By machine: the targets to pass on, lowest first, and the features each needs.
LEVELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4},
    "aarch64": {"aarch64": ("neon",)},
}

# LLVM's feature names where Linux uses another one.
LINUX_NAMES: Mapping[str, str] = {
    "64bit": "lm",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "crc32": "sse4_2",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "prfchw": "3dnowprefetch",
    "rdrnd": "rdrand",
    "sahf": "lahf_lm",
    "sha": "sha_ni",
    "shstk": "user_shstk",
    "sse3": "pni",
    "x87": "fpu",
    # aarch64
    "complxnum": "fcma",
    "crc": "crc32",
    "dotprod": "asimddp",
    "fp-armv8": "fp",
    "fptoint": "frint",
    "fp16fml": "asimdfhm",
    "fullfp16": "asimdhp",
    "jsconv": "jscvt",
    "lse": "atomics",
    "lse2": "uscat",
    "neon": "asimd",
    "rcpc": "lrcpc",
    "rdm": "asimdrdm",
}

MACHINE_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}

# Where Linux tells a machine's features.
FLAGS_FILES = {"x86_64": "/proc/cpuinfo", "aarch64": "/proc/self/auxv"}

# Of an aarch64 process: Linux's names of the bits of AT_HWCAP and AT_HWCAP2 in its auxiliary
# vector, <asm/hwcap.h>. Not from /proc/cpuinfo, in which an emulator may show its own host.
_HWCAP, _HWCAP2 = 16, 26
_HWCAP_NAMES = {
    (_HWCAP, 0): "fp",
    (_HWCAP, 1): "asimd",
    (_HWCAP, 7): "crc32",
    (_HWCAP, 8): "atomics",
    (_HWCAP, 9): "fphp",
    (_HWCAP, 10): "asimdhp",
    (_HWCAP, 12): "asimdrdm",
    (_HWCAP, 13): "jscvt",
    (_HWCAP, 14): "fcma",
    (_HWCAP, 15): "lrcpc",
    (_HWCAP, 17): "sha3",
    (_HWCAP, 20): "asimddp",
    (_HWCAP, 22): "sve",
    (_HWCAP, 23): "asimdfhm",
    (_HWCAP, 25): "uscat",
    (_HWCAP, 27): "flagm",
    (_HWCAP2, 1): "sve2",
    (_HWCAP2, 8): "frint",
    (_HWCAP2, 13): "i8mm",
    (_HWCAP2, 14): "bf16",
    (_HWCAP2, 34): "cssc",
    (_HWCAP2, 43): "mops",
    (_HWCAP2, 50): "faminmax",
}


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU features Linux reports, under Linux's names; empty where it reports none."""
    try:
        content = Path(FLAGS_FILES[machine()]).read_bytes()
    except (KeyError, OSError):  # another machine, or /proc is not there
        return frozenset()
    if machine() == "aarch64":
        return hwcap_flags(content)
    for line in content.decode("utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def hwcap_flags(auxiliary: bytes) -> frozenset[str]:
    """The features in an aarch64 process's auxiliary vector, pairs of 64-bit keys and values."""
    pairs = dict(struct.iter_unpack("=QQ", auxiliary[: len(auxiliary) // 16 * 16]))
    return frozenset(
        name for (key, bit), name in _HWCAP_NAMES.items() if pairs.get(key, 0) >> bit & 1
    )


def machine() -> str:
    """This host's architecture in LLVM's spelling."""
    name = platform.machine().lower()
    return MACHINE_NAMES.get(name, name)


def has_feature(feature: str, flags: Collection[str]) -> bool:
    """Whether Linux's `flags` hold a feature that LLVM calls `feature`."""
    plain = feature.replace(".", "_").replace("-", "_")
    return LINUX_NAMES.get(feature, plain) in flags or plain in flags


def vector_bytes(features: Collection[str]) -> int:
    """The size of the widest vector register that code for these features uses."""
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


def levels() -> list[str]:
    """The levels of this machine's architecture that it runs, the lowest first."""
    flags = cpu_flags()
    return [
        level
        for level, features in LEVELS.get(machine(), {}).items()
        if all(has_feature(feature, flags) for feature in features)
    ]
