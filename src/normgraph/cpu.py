"""This machine's CPU: its architecture, and its features under LLVM's names."""

from __future__ import annotations

import platform
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

# LLVM's feature names where the kernel's /proc/cpuinfo uses another one.
_LINUX_NAMES = {
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


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU features Linux reports; empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def machine() -> str:
    """This host's architecture in LLVM's spelling."""
    name = platform.machine().lower()
    return MACHINE_NAMES.get(name, name)


def has_feature(feature: str, flags: Collection[str]) -> bool:
    """Whether Linux's `flags` hold a feature that LLVM calls `feature`."""
    plain = feature.replace(".", "_").replace("-", "_")
    return _LINUX_NAMES.get(feature, plain) in flags or plain in flags
