"""What Linux says of a CPU, under LLVM's names."""

from __future__ import annotations

import platform
import struct
from pathlib import Path

import pytest

from normgraph import cpu


def _auxiliary(**values: int) -> bytes:
    keys = {"phdr": 3, "hwcap": 16, "hwcap2": 26, "end": 0}
    return b"".join(struct.pack("=QQ", keys[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "has", "lacks"),
    [
        (0b11, 0, ("neon", "fp-armv8"), ("fullfp16", "lse", "sve")),
        (1 << 1 | 1 << 8 | 1 << 20, 0, ("neon", "lse", "dotprod"), ("rdm", "sve2")),
        (1 << 10 | 1 << 22, 1 << 1 | 1 << 13, ("fullfp16", "sve", "sve2", "i8mm"), ("neon",)),
        (0, 1 << 14 | 1 << 43, ("bf16", "mops"), ("sve", "fullfp16")),
    ],
)
def test_the_bits_of_an_aarch64_process(
    hwcap: int, hwcap2: int, has: tuple[str, ...], lacks: tuple[str, ...]
) -> None:
    flags = cpu.hwcap_flags(_auxiliary(phdr=64, hwcap=hwcap, hwcap2=hwcap2, end=0))
    assert all(cpu.has_feature(name, flags) for name in has)
    assert not any(cpu.has_feature(name, flags) for name in lacks)


def test_an_auxiliary_vector_without_the_bits() -> None:
    assert cpu.hwcap_flags(b"") == frozenset()
    assert cpu.hwcap_flags(_auxiliary(phdr=1, end=0) + b"cut") == frozenset()


def test_this_machine_says_something() -> None:
    assert cpu.has_feature(
        {"x86_64": "sse2", "aarch64": "neon"}[platform.machine()], cpu.cpu_flags()
    )


@pytest.mark.parametrize(
    ("features", "size"),
    [((), 16), (("neon", "sve"), 16), (("sse4.2", "avx"), 32), (("avx", "avx512f"), 64)],
)
def test_the_size_of_a_vector(features: tuple[str, ...], size: int) -> None:
    assert cpu.vector_bytes(features) == size


def test_no_level_of_an_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine", lambda: "riscv64")
    assert cpu.levels() == []


@pytest.mark.parametrize("name", ["x86_64", "aarch64", "riscv64"])
def test_a_machine_that_tells_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"x86_64": str(tmp_path / "none"), "aarch64": str(tmp_path)}
    monkeypatch.setattr(cpu, "machine", lambda: name)
    monkeypatch.setattr(cpu, "FLAGS_FILES", files)
    cpu.cpu_flags.cache_clear()
    try:
        assert cpu.cpu_flags() == frozenset()
    finally:
        cpu.cpu_flags.cache_clear()
