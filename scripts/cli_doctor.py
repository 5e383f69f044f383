"""`normgraph doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass

from normgraph import __version__
from normgraph.scripts.console import table

# The distributions behind each extra; the first line is the bare install.
_PACKAGES = {
    "": ("numpy", "apache-tvm-ffi"),
    "compile": ("onnx", "apache-tvm", "ml_dtypes"),
    "verify": ("onnx", "onnxruntime", "ml_dtypes"),
    "torch": ("torch",),
    "cuda": ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"),
    "plot": ("matplotlib", "pillow"),
}
_TOOLS = {
    "C compiler": ("compiling", (os.environ.get("CC") or "cc", "gcc", "clang")),
    "nvcc": ("compiling for CUDA, where the extra cuda is not installed", ("nvcc",)),
    "aarch64 linker": ("linking for aarch64 on another machine", ("aarch64-linux-gnu-gcc",)),
}
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "asimd", "asimdhp", "sve")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `status` is ok, missing or unknown; `advice` is what is to be done."""

    topic: str
    name: str
    found: str
    status: str = "ok"
    advice: str = ""


def doctor(options: argparse.Namespace) -> int:
    """Print what was found. Missing optional things are no failure."""
    found = [*_host(), *_cuda(), *_tools(), *_packages()]
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
        return 0
    rows = [(each.topic, each.name, each.found, each.status, each.advice) for each in found]
    print(table(rows, ("topic", "name", "found", "status", "what to do")))
    return 0


def _host() -> list[Finding]:
    """Of a host that is not supported nothing is said here: there `import normgraph` refuses."""
    from normgraph.cpu import FLAGS_FILES, cpu_flags, levels, machine
    from normgraph.runtime.library import VARIABLE

    flags = cpu_flags()
    features = " ".join(name for name in _CPU_FEATURES if name in flags) or "none of those asked"
    told = ("ok", "") if flags else ("unknown", f"have {FLAGS_FILES[machine()]} readable")
    libc = " ".join(platform.libc_ver()) or "unknown C library"
    return [
        Finding("host", "normgraph", __version__),
        Finding("host", "python", f"{platform.python_version()} ({sys.executable})"),
        Finding("host", "system", f"{platform.system()} {platform.machine()}, {libc}"),
        Finding("host", "cpu", f"{len(os.sched_getaffinity(0))} usable cores, {features}", *told),
        Finding("host", "targets", ", ".join(levels()) or "none of those with a name"),
        Finding(
            "host", VARIABLE, os.environ.get(VARIABLE) or "not set: the best library is loaded"
        ),
    ]


def _cuda() -> list[Finding]:
    """The driver and its devices; that there are none is nothing to be mended."""
    from normgraph.cuda import state

    here = state()
    if here.problem:
        return [Finding("cuda", "driver", here.problem)]
    major, minor = here.version
    return [
        Finding("cuda", "driver", f"supports CUDA {major}.{minor}"),
        *(
            Finding("cuda", f"device {each.index}", f"{each.name}, {each.arch}")
            for each in here.devices
        ),
    ]


def _tools() -> list[Finding]:
    findings = []
    for name, (purpose, programs) in _TOOLS.items():
        path = next((path for path in map(shutil.which, programs) if path), None)
        if path is not None:
            findings.append(Finding("tool", name, path))
        else:
            advice = f"needed for {purpose}: install one of {', '.join(programs)}"
            findings.append(Finding("tool", name, "-", "missing", advice))
    return findings


def _packages() -> list[Finding]:
    findings = []
    for extra, names in _PACKAGES.items():
        for name in names:
            wish = f"pip install 'normgraph[{extra}]'" if extra else "pip install normgraph"
            version = _version(name)
            topic = f"extra {extra}" if extra else "runtime"
            if version is None:
                findings.append(Finding(topic, name, "-", "missing", wish))
            else:
                findings.append(Finding(topic, name, version))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
