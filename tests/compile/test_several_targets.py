"""One artifact with a library for each of several targets."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import normgraph as ng
from normgraph.compile import Target, build, resolve, resolve_all, self_test, target_groups
from normgraph.cpu import LEVELS, levels
from normgraph.errors import ArtifactIncompatible, CompileError, TargetError
from normgraph.graphs import export
from normgraph.runtime.library import VARIABLE

SPEC = ng.NormSpec("rms_norm")
# The targets of another machine, of which this one can make object files.
OTHER = tuple(LEVELS["aarch64" if platform.machine() == "x86_64" else "x86_64"])


@pytest.fixture(autouse=True)
def best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best library is loaded unless a test says otherwise; no cross linker is at hand."""
    monkeypatch.delenv(VARIABLE, raising=False)
    found = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **more: None if "-linux-gnu-gcc" in name else found(name)
    )


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """Two small graphs."""
    export(SPEC, shape=("N", 5), out=tmp_path / "graphs", kinds=("forward", "inference"))
    return tmp_path / "graphs"


def _manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "manifest.json").read_text(encoding="utf-8")))


def _names(path: Path) -> list[str]:
    return [library["target"]["name"] for library in _manifest(path)["libraries"]]


# Names.


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("x86-64-v3", ["x86-64-v3"]),
        (["x86-64-v3"], ["x86-64-v3"]),
        (("x86-64-v4", "aarch64", "x86-64-v2"), ["x86-64-v4", "aarch64", "x86-64-v2"]),
        ("x86-64-levels", ["x86-64-v2", "x86-64-v3", "x86-64-v4"]),
        (["x86-64-v3", "x86-64-levels", "x86-64-v3"], ["x86-64-v3", "x86-64-v2", "x86-64-v4"]),
        (["cpu", "znver4"], ["cpu", "znver4"]),
    ],
)
def test_one_name_several_or_a_group(names: str | Sequence[str], wanted: list[str]) -> None:
    assert [target.name for target in resolve_all(names)] == wanted


def test_a_group_is_made_of_targets() -> None:
    for name, members in target_groups().items():
        assert [target.name for target in resolve_all(name)] == list(members)
        with pytest.raises(TargetError, match=name):
            resolve(name)


@pytest.mark.parametrize("names", [[], (), [""], ["x86-64-v3", "z80"], "x86-64-v2,x86-64-v3"])
def test_names_that_are_none(names: Any, graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"Known targets: cpu, .*x86-64-levels"):
        build(graphs, names, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("names", [None, 3, b"cpu", {"cpu"}, [None], [["cpu"]]])
def test_what_is_no_name(names: Any) -> None:
    with pytest.raises(TargetError, match="expected a name such as 'cpu' or several"):
        resolve_all(names)


# The artifact.


def test_an_artifact_of_several_targets(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = levels()
    said: list[str] = []
    build(graphs, [*here, *OTHER], tmp_path / "a", progress=said.append)
    manifest = _manifest(tmp_path / "a")
    assert _names(tmp_path / "a") == [*here, *OTHER]
    for library in manifest["libraries"]:
        name = library["target"]["name"]
        runs = name in here
        assert library["target"]["features"] == list(resolve(name).features)
        assert library["file"].startswith(f"kernels-{name}-")
        assert library["self_test"] == ("passed" if runs else "not run")
        assert library["form"] == ("library" if runs else "object")
        assert (f"self-test of {name}" in said) == runs
        assert any(line.startswith(f"no linker for {name} here") for line in said) != runs
    assert manifest["self_test"]["status"] == "not run"
    assert len(list((tmp_path / "a").glob("graph-*"))) == 2
    assert len(list((tmp_path / "a").glob("selftest-*"))) == 1
    assert ng.load(tmp_path / "a").target == here[-1]
    x, gamma = np.arange(10, dtype=np.float32).reshape(2, 5), np.ones(5, np.float32)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + SPEC.eps)
    for name in here:
        monkeypatch.setenv(VARIABLE, name)
        operator = ng.load(tmp_path / "a")
        assert operator.target == name
        assert operator.self_test()
        np.testing.assert_allclose(operator.inference(x, gamma), want, rtol=1e-6)
    monkeypatch.setenv(VARIABLE, OTHER[0])
    with pytest.raises(ArtifactIncompatible, match=f"{OTHER[0]}: it is for"):
        ng.load(tmp_path / "a")
    monkeypatch.setenv(VARIABLE, "z80")
    with pytest.raises(TargetError, match="'z80'"):
        ng.load(tmp_path / "a")


def test_another_build_replaces_all_libraries(graphs: Path, tmp_path: Path) -> None:
    here = levels()[-1]
    build(graphs, ["cpu", here, *OTHER], tmp_path / "a")
    build(graphs, [here], tmp_path / "a")
    assert _names(tmp_path / "a") == [here]
    assert [file.name for file in (tmp_path / "a").glob("kernels-*")] == [
        _manifest(tmp_path / "a")["libraries"][0]["file"]
    ]
    assert _manifest(tmp_path / "a")["self_test"]["status"] == "passed"


def test_one_library_is_the_same_alone_and_among_others(graphs: Path, tmp_path: Path) -> None:
    here = levels()[0]
    build(graphs, here, tmp_path / "alone")
    build(graphs, ["cpu", here], tmp_path / "both")
    alone, both = (_manifest(tmp_path / name)["libraries"] for name in ("alone", "both"))
    assert alone[0] == both[1]


def test_only_an_untested_library_is_tested_on_load(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact made where one level does not run tests that one where it does."""
    here = levels()[-1]
    monkeypatch.setattr(Target, "runs_here", False)
    monkeypatch.setattr(self_test, "run", lambda *_: pytest.fail("it ran"))
    build(graphs, here, tmp_path / "a")
    assert _manifest(tmp_path / "a")["libraries"][0]["self_test"] == "not run"
    tested: list[str] = []
    monkeypatch.setattr(
        "normgraph.runtime.operator.run_self_test",
        lambda artifact, calls: tested.append(artifact.library().target),
    )
    ng.load(tmp_path / "a")
    assert tested == [here]


def test_a_wrong_library_among_several_writes_none(graphs: Path, tmp_path: Path) -> None:
    model = onnx.load(graphs / "forward.onnx")
    node = next(n for n in model.graph.node if n.op_type == "Add")
    node.op_type = "Sub"
    onnx.save(model, graphs / "forward.onnx")
    with pytest.raises(CompileError, match="gives a wrong"):
        build(graphs, [*OTHER, "cpu"], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_dump_has_a_folder_for_each_of_several(graphs: Path, tmp_path: Path) -> None:
    build(graphs, ["cpu", OTHER[0]], tmp_path / "a", debug_dump=tmp_path / "d")
    assert {file.name for file in (tmp_path / "d").iterdir()} == {"cpu", OTHER[0]}
    one, other = (sorted(f.name for f in (tmp_path / "d" / n).iterdir()) for n in ("cpu", OTHER[0]))
    assert one == other
    assert "all.7-generate.s" in one


def test_build_in_one_call_takes_several(tmp_path: Path) -> None:
    operator = ng.build(
        SPEC, shape=("N", 5), kinds=("inference",), target=("cpu", *OTHER), out=tmp_path / "a"
    )
    assert operator.target == "cpu"
    assert _names(tmp_path / "a") == ["cpu", *OTHER]
