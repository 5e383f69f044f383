"""Whether this machine can run a library: its architecture and CPU features."""

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
    "fp16fml": "asimdfhm",
    "fullfp16": "asimdhp",
    "jsconv": "jscvt",
    "lse": "atomics",
    "neon": "asimd",
    "rcpc": "lrcpc",
    "rdm": "asimdrdm",
}

_MACHINE_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


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
    return _MACHINE_NAMES.get(name, name)


def obstacle(kind: str, triple: str, features: Collection[str]) -> str | None:
    """Why a library for this target cannot run here, or None where it can."""
    if kind not in ("llvm", "c"):
        return f"it is for {kind} devices, and this loader runs CPU libraries"
    architecture, _, system = triple.partition("-")
    architecture = _MACHINE_NAMES.get(architecture, architecture)
    if architecture != machine():
        return f"it is for {architecture}, and this host is {machine()}"
    if "linux" not in system:
        return f"it is for {system or 'an unknown system'}, and this host runs Linux"
    flags = cpu_flags()
    missing = [name for name in features if not _has(name.removeprefix("+"), flags)]
    if missing:
        return f"it needs the CPU features {', '.join(missing)}, which this host lacks"
    return None


def _has(feature: str, flags: frozenset[str]) -> bool:
    plain = feature.replace(".", "_").replace("-", "_")
    return bool(flags & {_LINUX_NAMES.get(feature, plain), plain})
