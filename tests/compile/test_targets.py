"""Target names, what each needs of a host, and the numbers of older instruction sets."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.target import codegen

from normgraph import NormSpec
from normgraph.compile import build, known_targets, link, resolve, targets
from normgraph.cpu import LEVELS, LINUX_NAMES, cpu_flags, has_feature
from normgraph.errors import TargetError
from normgraph.graphs import build as build_graph
from normgraph.graphs import export

X86 = platform.machine() == "x86_64"
# CPUs of this architecture, older and newer ones, as LLVM may take this machine for one of them.
MODELS = ("nehalem", "x86-64-v2", "diamondrapids") if X86 else ("generic", "neoverse-v2")


def test_every_known_name_resolves() -> None:
    assert [t.name for t in targets()] == known_targets()
    assert known_targets()[0] == "cpu"
    assert {"x86-64-v3", "aarch64"} <= set(known_targets())
    for target in targets():
        assert target.description
        assert resolve(target.name) == target
        assert target.vector_bytes in (16, 32, 64)


def test_a_cpu_of_llvm_is_a_target() -> None:
    zen = resolve("znver4")
    assert (zen.triple, zen.mcpu, zen.vector_bytes) == ("x86_64-linux-gnu", "znver4", 64)
    arm = resolve("neoverse-n1")
    assert (arm.triple, arm.vector_bytes) == ("aarch64-linux-gnu", 16)
    assert not (zen.runs_here and arm.runs_here)


@pytest.mark.parametrize("name", ["", "gpu", "x86-64-v9", "CPU", "znver44", "-mcpu=native", "c pu"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        resolve(name)
    for known in known_targets():
        assert known in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(TargetError, match=r"Did you mean .*x86-64-v3"):
        resolve("x86-64-v33")
    with pytest.raises(TargetError, match=r"Did you mean .*znver4"):
        resolve("znver_4")


def test_a_target_is_a_name() -> None:
    with pytest.raises(TargetError, match="expected a name"):
        resolve(None)  # type: ignore[arg-type]


def test_an_unknown_target_stops_a_build_before_anything_is_written(tmp_path: Path) -> None:
    export(NormSpec("rms_norm"), shape=("N", 4), out=tmp_path / "g")
    with pytest.raises(TargetError):
        build(tmp_path / "g", "riscv", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def _flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def test_cpu_asks_for_nothing_this_machine_lacks() -> None:
    # What Linux calls by another name than LLVM.
    linux = {
        "sse3": "pni",
        "lzcnt": "abm",
        "bmi": "bmi1",
        "neon": "asimd",
        "fullfp16": "asimdhp",
        "dotprod": "asimddp",
        "avxvnni": "avx_vnni",
    }
    plain = {re.sub(r"[._]", "", flag) for flag in _flags()}
    for feature in resolve("cpu").features:
        flag = linux.get(feature, feature)
        assert re.sub(r"[._]", "", flag) in plain, feature
    assert resolve("cpu").runs_here


@pytest.mark.parametrize("model", MODELS)
def test_cpu_has_what_the_system_offers_whatever_model_llvm_sees(
    model: str, monkeypatch: pytest.MonkeyPatch, compile_models: Callable[..., Any]
) -> None:
    """A virtual machine may show an older CPU's number, or hide features of its own."""
    here = resolve("cpu")
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: model)
    target = resolve("cpu")
    assert (target.mcpu, target.features) == (model, here.features)
    assert {"avx2", "avx512f", "avx512bf16"} & set(target.features) == {
        feature.replace("_", "") for feature in {"avx2", "avx512f", "avx512_bf16"} & _flags()
    }
    known = {str(feature) for feature in codegen.llvm_get_cpu_features(target.to_tvm())}
    assert set(target.features) <= known
    assert not set(target.disabled) & known
    assert target.runs_here
    spec = NormSpec("layer_norm")
    models = {"backward": build_graph(spec, "backward", ("N", 67), "bfloat16")}
    kernels = compile_models(spec, models, target="cpu")
    kernels.check("backward", kernels.inputs("backward", {"N": 37}))


@pytest.mark.parametrize("model", ["nehalem", "x86-64-v3", "rocketlake", "znver4"])
@pytest.mark.parametrize(
    "hidden",
    [
        {"fma"},
        {"f16c"},
        {"avx"},
        {"avx2"},
        {"avx512f"},
        {"avx512bw", "avx512vl"},
        {"avx512_bf16"},
        {"sse4_2", "popcnt"},
    ],
    ids=lambda hidden: ",".join(sorted(hidden)),
)
def test_code_for_this_machine_uses_nothing_that_the_system_hides(
    model: str, hidden: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where LLVM takes one feature to imply another."""
    module = importlib.import_module("normgraph.compile.targets")
    monkeypatch.setattr(module, "machine", lambda: "x86_64")
    v4 = {LINUX_NAMES.get(f, f.replace(".", "_")) for f in LEVELS["x86_64"]["x86-64-v4"]}
    all_flags = v4 | {"avx512_bf16", "gfni"}
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(all_flags - hidden))
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: model)
    target = resolve("cpu")
    enabled = {str(feature) for feature in codegen.llvm_get_cpu_features(target.to_tvm())}
    assert not {flag.replace("_", ".", 1) for flag in hidden if flag.startswith("sse")} & enabled
    assert not {flag.replace("_", "") for flag in hidden} & enabled
    # What it says that it needs is what LLVM may use, of all that this project knows.
    for other in ("x86-64-v4", "znver4", "rocketlake", "diamondrapids"):
        known = set(resolve(other).features)
        assert known & set(target.features) == known & enabled
    assert (target.vector_bytes == 64) == ("avx512f" in enabled)


def test_x86_levels_need_more_and_more() -> None:
    levels = [set(resolve(f"x86-64-v{n}").features) for n in (2, 3, 4)]
    assert levels[0] < levels[1] < levels[2]
    assert "sse4.2" in levels[0]
    assert {"avx2", "fma", "f16c"} <= levels[1] - levels[0]
    assert "avx512f" in levels[2] - levels[1]
    assert [resolve(f"x86-64-v{n}").vector_bytes for n in (2, 3, 4)] == [16, 32, 64]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_older_levels_give_the_same_numbers(dtype: str, compile_models: Callable[..., Any]) -> None:
    """Every level this machine runs, against float64 (v2 has no FMA and no half conversion)."""
    spec = NormSpec("layer_norm")
    models = {"backward": build_graph(spec, "backward", ("N", 67), dtype)}
    names = [t.name for t in targets() if t.runs_here]
    if X86:
        assert "x86-64-v2" in names
    for name in names:
        kernels = compile_models(spec, models, target=name)
        for kind in models:
            kernels.check(kind, kernels.inputs(kind, {"N": 37}))


def test_a_level_below_the_host_is_built_and_tested(tmp_path: Path) -> None:
    export(NormSpec("rms_norm"), shape=("N", 4), out=tmp_path / "g", kinds=("forward",))
    name = "x86-64-v2" if X86 else "aarch64"
    build(tmp_path / "g", name, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text(encoding="utf-8"))
    (library,) = manifest["libraries"]
    assert library["file"].startswith(f"kernels-{name}-")
    assert library["target"]["features"] == list(resolve(name).features)
    assert manifest["self_test"]["status"] == "passed"


def test_another_machine_gets_an_object_or_with_its_linker_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "aarch64" if X86 else "x86-64-v2"
    export(NormSpec("rms_norm"), shape=("N", 4), out=tmp_path / "g", kinds=("forward",))
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    build(tmp_path / "g", other, tmp_path / "a")
    _is(tmp_path / "a", ".o", "object")
    machine = (tmp_path / "a" / _library(tmp_path / "a")["file"]).read_bytes()[18:20]
    assert machine == ((183).to_bytes(2, "little") if X86 else (62).to_bytes(2, "little"))
    # A cross linker that writes a fixed file, and whose nm lists nothing: the last step is its own.
    cross = empty / f"{resolve(other).triple}-gcc"
    cross.write_text(
        '#!/bin/sh\n[ "$1" != -print-prog-name=nm ] || { echo /bin/true; exit; }\n'
        'while [ "$1" != -o ]; do shift; done\necho linked > "$2"\n'
    )
    cross.chmod(0o755)
    build(tmp_path / "g", other, tmp_path / "a")
    _is(tmp_path / "a", ".so", "library")
    assert not list((tmp_path / "a").glob("*.o")), "the object of the first build is stale"
    assert link.compiler(resolve(other)) == str(cross)


def _library(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["self_test"]["status"] == "not run"
    (library,) = manifest["libraries"]
    return dict(library)


def _is(path: Path, suffix: str, form: str) -> None:
    library = _library(path)
    assert os.path.splitext(library["file"])[1] == suffix
    assert library["form"] == form
    assert np.dtype(np.uint8).itemsize * library["size"] == (path / library["file"]).stat().st_size


@pytest.mark.parametrize("name", ["i386", "pentium4", "yonah"])
def test_a_32_bit_cpu_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="32-bit"):
        resolve(name)


@pytest.mark.parametrize("name", ["bdver4", "diamondrapids"])
def test_instructions_the_host_lacks_keep_a_library_from_running(name: str) -> None:
    target = resolve(name)
    lacking = [f for f in target.features if not has_feature(f, cpu_flags())]
    assert target.runs_here == (not lacking)
    assert {"fma4", "xop"} <= set(target.features) or "egpr" in target.features
