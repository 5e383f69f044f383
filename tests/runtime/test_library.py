"""Which library of an artifact is loaded: the best one that runs, or the one that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from normgraph import cpu
from normgraph.errors import ArtifactIncompatible, TargetError
from normgraph.runtime import host
from normgraph.runtime.library import VARIABLE, Library, choose

On = Callable[[str, str], None]

V2 = "pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
MORE = "gfni vaes vpclmulqdq avx_vnni avxvnniint8 avxifma avxneconvert cmpccxadd"


def _library(target: str, machine: str, features: tuple[str, ...], suffix: str = ".so") -> Library:
    path = Path(f"kernels-{target}{suffix}")
    return Library(path, target, "llvm", f"{machine}-linux-gnu", features, "passed")


EVERY = [
    _library(level, machine, features)
    for machine, levels in cpu.LEVELS.items()
    for level, features in levels.items()
]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """on(machine, flags): the host is another one."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def change(machine: str, flags: str) -> None:
        for module in (cpu, host):
            monkeypatch.setattr(module, "machine", lambda: machine)
            monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags.split()))

    return change


@pytest.mark.parametrize(
    ("machine", "flags", "best"),
    [
        ("x86_64", V2, "x86-64-v2"),
        ("x86_64", V3, "x86-64-v3"),
        ("x86_64", V4, "x86-64-v4"),
        ("x86_64", f"{V4} {MORE}", "x86-64-v4"),
        ("x86_64", V4.replace("avx512vl", ""), "x86-64-v3"),
        ("x86_64", V3.replace("movbe", ""), "x86-64-v2"),
        ("aarch64", "fp asimd", "aarch64"),
        ("aarch64", "fp asimd sve sve2", "aarch64"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_best_library_that_runs(
    on: On, machine: str, flags: str, best: str, turned: bool
) -> None:
    on(machine, flags)
    assert cpu.levels()[-1] == best
    assert choose(Path("a"), EVERY[::-1] if turned else EVERY).target == best


def test_wide_vectors_come_before_many_features(on: On) -> None:
    """A CPU with more instruction sets than x86-64-v4 names and no AVX-512."""
    narrow = ("avxvnni", "avxvnniint8", "avxifma", "avxneconvert", "cmpccxadd", "gfni", "vaes")
    other = _library("sierraforest", "x86_64", (*cpu.LEVELS["x86_64"]["x86-64-v3"], *narrow))
    on("x86_64", f"{V4} {MORE}")
    assert choose(Path("a"), [*EVERY, other]).target == "x86-64-v4"
    on("x86_64", f"{V3} {MORE}")
    assert choose(Path("a"), [*EVERY, other]).target == "sierraforest"


def test_the_variable_names_the_target(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    on("x86_64", V4)
    for level in cpu.LEVELS["x86_64"]:
        monkeypatch.setenv(VARIABLE, level)
        assert choose(Path("a"), EVERY).target == level
    monkeypatch.setenv(VARIABLE, "")
    assert choose(Path("a"), EVERY).target == "x86-64-v4"


def test_the_variable_names_what_is_not_there(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    on("x86_64", V4)
    for name in ("x86-64-v9", "X86-64-V3", "x86-64-levels", " "):
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(TargetError, match=rf"{VARIABLE}.*x86-64-v2, .*aarch64.*unset") as found:
            choose(Path("a"), EVERY)
        assert repr(name) in str(found.value)


def test_the_variable_names_what_does_not_run(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    on("x86_64", V3)
    monkeypatch.setenv(VARIABLE, "x86-64-v4")
    with pytest.raises(ArtifactIncompatible, match=rf"{VARIABLE} asks for.*avx512f.*Unset"):
        choose(Path("a"), EVERY)
    monkeypatch.setenv(VARIABLE, "aarch64")
    with pytest.raises(ArtifactIncompatible, match="for aarch64, and this host is x86_64"):
        choose(Path("a"), EVERY)


def test_none_runs(on: On) -> None:
    """Every library is named with what it lacks."""
    on("x86_64", V2.replace("popcnt", ""))
    with pytest.raises(ArtifactIncompatible) as found:
        choose(Path("a"), EVERY)
    message = str(found.value)
    assert "x86-64-v2: it needs the CPU features popcnt, which this host lacks" in message
    assert "x86-64-v4: it needs the CPU features popcnt, avx," in message
    assert "aarch64: it is for aarch64, and this host is x86_64" in message


def test_an_object_file_is_passed_over(on: On) -> None:
    on("aarch64", "fp asimd")
    neon = cpu.LEVELS["aarch64"]["aarch64"]
    better = _library("neoverse-n1", "aarch64", (*neon, "dotprod"), ".o")
    on("aarch64", "fp asimd asimddp")
    assert choose(Path("a"), [*EVERY, better]).target == "aarch64"
    with pytest.raises(ArtifactIncompatible, match="still to be linked"):
        choose(Path("a"), [better])


def test_a_host_that_does_not_tell_its_features(on: On) -> None:
    """Without /proc nothing is known, which is not the CPU's fault."""
    for machine, file in (("x86_64", "/proc/cpuinfo"), ("aarch64", "/proc/self/auxv")):
        on(machine, "")
        with pytest.raises(ArtifactIncompatible) as caught:
            choose(Path("a"), EVERY)
        assert f"cannot be told: {file} cannot be read, or says nothing" in str(caught.value)
        assert str(caught.value).endswith("Have /proc mounted, also in a container or a chroot.")
        assert "lacks" not in str(caught.value)
