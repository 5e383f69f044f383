"""The targets: names, the LLVM target behind each, and what a host must have to run the result."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target import codegen

from normgraph import cuda
from normgraph.cpu import LEVELS, cpu_flags, has_feature, machine, vector_bytes
from normgraph.errors import TargetError

# Instruction sets that generated code may use, as LLVM names them. Features of tuning and of the
# operating system (fast-bextr, pku) do not restrict where code runs.
_X86_FEATURES = """
    sse3 ssse3 sse4.1 sse4.2 sse4a popcnt lzcnt movbe bmi bmi2 tbm avx avx2 fma fma4 xop f16c gfni
    vaes vpclmulqdq avxvnni avxvnniint8 avxvnniint16 avxifma avxneconvert avx512f avx512cd avx512bw
    avx512dq avx512vl avx512ifma avx512vbmi avx512vbmi2 avx512vnni avx512bitalg avx512vpopcntdq
    avx512bf16 avx512fp16 avx512vp2intersect avx10.1 avx10.2 egpr ndd ccmp nf ppx push2pop2 zu
    cmpccxadd
"""
_ARM_FEATURES = """
    neon fullfp16 fp16fml dotprod i8mm bf16 complxnum jsconv fptoint rdm lse lse2 rcpc flagm sha3
    sve sve2 cssc mops faminmax
"""
_X86_TRIPLE = "x86_64-linux-gnu"
_ARM_TRIPLE = "aarch64-linux-gnu"
# What the host's part of a CUDA library is compiled for: it runs beside every GPU.
_BASELINE = {"x86_64": (_X86_TRIPLE, "x86-64"), "aarch64": (_ARM_TRIPLE, "generic")}


@dataclass(frozen=True)
class Target:
    """What `compile.build` compiles for.

    name: as given to `build`. triple, mcpu: as LLVM has them. features: the instruction sets a
    host must have. added, disabled: what makes LLVM's model of mcpu one of a CPU with those alone.
    vector_bytes: size of a vector register, or of a CUDA thread's widest access.
    archs: of a CUDA target what it has machine code for; triple and mcpu are then the host's.
    """

    name: str
    description: str
    triple: str
    mcpu: str
    features: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of code generator."""
        return "cuda" if self.archs else "llvm"

    @property
    def images(self) -> tuple[str, ...]:
        """What a CUDA library holds: machine code for each of `archs`, PTX for the last one."""
        return (*self.archs, *(f"compute_{arch[3:]}" for arch in self.archs[-1:]))

    @property
    def vector_bytes(self) -> int:
        """The size of a vector register."""
        return 16 if self.archs else vector_bytes(self.features)

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run code for the target."""
        if self.obstacle() is not None:
            return False
        if self.triple.split("-")[0] != machine():
            return False
        return all(has_feature(feature, cpu_flags()) for feature in self.features)

    def obstacle(self, toolkit: tuple[int, int] = (0, 0)) -> str | None:
        """Why no device here runs a CUDA target, compiled with that CUDA version, or None."""
        return cuda.obstacle(self.images, toolkit) if self.archs else None

    @property
    def device(self) -> int | None:
        """Of a CUDA target the first device here that runs it; None for a CPU's, or without one.

        One with machine code comes before one that needs the driver's compiler for the PTX.
        """
        usable = [
            (not image.startswith("sm_"), each.index)
            for each in (cuda.state().devices if self.archs else ())
            if (image := cuda.image_for(each.capability, self.images))
        ]
        return min(usable)[1] if usable else None

    def to_tvm(self) -> Any:
        """The target as TVM takes it, of a CUDA target with its host."""
        if self.archs:
            device = tvm.target.Target({"kind": "cuda", "arch": self.archs[0]})
            return device.with_host(tvm.target.Target(_llvm(self.triple, self.mcpu)))
        config = _llvm(self.triple, self.mcpu, self.added, self.disabled)
        return tvm.target.Target(config)


_NAMED = {
    "cpu": ("the CPU of this machine", None, None),
    "x86-64-v2": ("x86-64 with SSE4.2 (2009 on)", _X86_TRIPLE, "x86-64-v2"),
    "x86-64-v3": ("x86-64 with AVX2, FMA and F16C (2013 on)", _X86_TRIPLE, "x86-64-v3"),
    "x86-64-v4": ("x86-64 with AVX-512 (2017 on)", _X86_TRIPLE, "x86-64-v4"),
    "aarch64": ("64-bit Arm with NEON; a library where a cross linker is found, else an object",
                _ARM_TRIPLE, "generic"),
}  # fmt: skip
_CUDA = {
    "cuda": ("NVIDIA GPUs from Ampere on: sm_80, sm_90, and PTX for later ones",
             ("sm_80", "sm_90")),
    "sm_80": ("NVIDIA A100 and others of its generation; PTX for later ones", ("sm_80",)),
    "sm_90": ("NVIDIA H100, H200; PTX for later ones", ("sm_90",)),
    "sm_100": ("NVIDIA B100, B200; PTX for later ones", ("sm_100",)),
}  # fmt: skip
_GROUPS = {"x86-64-levels": tuple(LEVELS["x86_64"])}


def targets() -> list[Target]:
    """Every named target, this machine's first."""
    return [resolve(name) for name in (*_NAMED, *_CUDA)]


def known_targets() -> list[str]:
    """The names `build` takes, beside the name of any CPU that LLVM knows."""
    return [*_NAMED, *_CUDA]


def target_groups() -> dict[str, tuple[str, ...]]:
    """The names that stand for several targets, and those targets."""
    return dict(_GROUPS)


def resolve_all(names: str | Sequence[str]) -> tuple[Target, ...]:
    """The targets of one name or of several, a group's name taken for all of its targets.

    A target that is named twice comes once. Raises TargetError as `resolve` does, for none, and
    for CPUs and CUDA devices together: an artifact takes the arrays of one of the two.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        names = (names,)
    found = [resolve(each) for name in names for each in _expanded(name)]
    if not found:
        raise TargetError(
            f"target: expected at least one name, got none. Known targets: {_known()}."
        )
    if len({target.kind for target in found}) > 1:
        raise TargetError(
            f"targets {', '.join(target.name for target in found)}: expected CPUs or CUDA devices, "
            "got both, and an artifact takes arrays of one of the two. Build one artifact for each."
        )
    return tuple({target.name: target for target in found}.values())


def _expanded(name: object) -> tuple[Any, ...]:
    return _GROUPS.get(name, (name,)) if isinstance(name, str) else (name,)


def _known() -> str:
    return ", ".join((*_NAMED, *_CUDA, *_GROUPS))


def resolve(name: str) -> Target:
    """The target of that name: one of `known_targets()`, or a CPU as LLVM names it (znver4).

    Raises TargetError for a name that is neither; the message lists the known ones.
    """
    if not isinstance(name, str):
        raise TargetError(
            f"target: expected a name such as 'cpu' or several, got {type(name).__name__}. "
            f"Known targets: {_known()}."
        )
    if name in _NAMED:
        description, triple, mcpu = _NAMED[name]
        if triple is None or mcpu is None:
            return _host(name, description)
        return _described(name, description, triple, mcpu)
    if name in _CUDA:
        text, archs = _CUDA[name]
        triple, mcpu = _BASELINE[machine()]
        return Target(name, text, triple, mcpu, archs=archs)
    for triple in (_X86_TRIPLE, _ARM_TRIPLE):
        if name in _cpus(triple):
            if triple == _X86_TRIPLE and "64bit" not in _enabled(triple, name):
                raise TargetError(
                    f"target {name!r} is a 32-bit CPU, and libraries are 64-bit. Known targets: "
                    f"{_known()}; or a 64-bit CPU that LLVM names."
                )
            return _described(name, f"LLVM's CPU {name}", triple, name)
    every = [*_NAMED, *_CUDA, *_GROUPS, *_cpus(_X86_TRIPLE), *_cpus(_ARM_TRIPLE)]
    close = difflib.get_close_matches(name, every, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise TargetError(
        f"unknown target {name!r}.{hint} Known targets: {_known()}; or a CPU that LLVM "
        f"names, such as znver4 or neoverse-n1."
    )


def _llvm(
    triple: str, mcpu: str, added: Sequence[str] = (), disabled: Sequence[str] = ()
) -> dict[str, Any]:
    config: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": mcpu}
    if changes := [*(f"+{f}" for f in added), *(f"-{f}" for f in disabled)]:
        config["mattr"] = changes
    return config


def _described(name: str, description: str, triple: str, mcpu: str) -> Target:
    return Target(name, description, triple, mcpu, _features(triple, mcpu))


def _host(name: str, description: str) -> Target:
    """This machine: LLVM's model of its CPU, with the features that the system offers.

    A virtual machine may hide some of a CPU's and show a model's number that has fewer.
    """
    triple = _X86_TRIPLE if machine() == "x86_64" else _ARM_TRIPLE
    mcpu = str(codegen.llvm_get_system_cpu())
    modelled = _features(triple, mcpu)
    offered = [f for f in _known_features(triple) if has_feature(f, cpu_flags())]
    added = tuple(f for f in offered if f not in modelled)
    # To LLVM one feature may imply another, and to lack one, that others are lacking as well.
    more = _features(triple, mcpu, added)
    disabled = tuple(f for f in more if f not in offered)
    features = _features(triple, mcpu, added, disabled)
    return Target(name, description, triple, mcpu, features, added, disabled)


def _features(
    triple: str, mcpu: str, added: Sequence[str] = (), disabled: Sequence[str] = ()
) -> tuple[str, ...]:
    """What code for such a CPU may use, of the known features."""
    enabled = _enabled(triple, mcpu, added, disabled)
    return tuple(feature for feature in _known_features(triple) if feature in enabled)


def _known_features(triple: str) -> list[str]:
    return (_X86_FEATURES if triple == _X86_TRIPLE else _ARM_FEATURES).split()


def _enabled(
    triple: str, mcpu: str, added: Sequence[str] = (), disabled: Sequence[str] = ()
) -> set[str]:
    target = tvm.target.Target(_llvm(triple, mcpu, added, disabled))
    return {str(feature) for feature in codegen.llvm_get_cpu_features(target)}


def _cpus(triple: str) -> list[str]:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
    return sorted(str(cpu) for cpu in codegen.llvm_get_cpu_archlist(target))
