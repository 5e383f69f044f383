"""inspect, verify and bench: a sound artifact, a damaged one, one for another machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph.runtime.library import VARIABLE
from normgraph.scripts import bench


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def for_another_cpu(manifest: dict[str, Any]) -> None:
    """Ask for a CPU feature that no CPU has."""
    manifest["libraries"][0]["target"]["features"].append("time-travel")


def test_inspect(cli: Callable[..., Any], artifact: Path) -> None:
    code, out, err = cli("inspect", artifact)
    assert (code, err) == (0, "")
    for part in ("instance_norm", "float32[N, 4, L]", "backward", "inv_std", "cpu", "passed"):
        assert part in out


def test_inspect_as_json_is_the_manifest(cli: Callable[..., Any], artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert json.loads(cli("inspect", artifact, "--json").out) == manifest


def test_inspect_runs_the_self_test(cli: Callable[..., Any], artifact: Path) -> None:
    code, out, err = cli("inspect", artifact, "--self-test")
    assert (code, err) == (0, "")
    cases = json.loads((artifact / "manifest.json").read_text())["self_test"]["cases"]
    for case in cases:
        for output, tolerance in case["tolerance"].items():
            (line,) = (
                line.split()
                for line in out.splitlines()
                if line.split()[:3] == [case["kind"], case["prefix"], output]
            )
            assert float(line[4]) == tolerance
            assert 0 <= float(line[3]) <= tolerance
    shown = json.loads(cli("inspect", artifact, "--self-test", "--json").out)
    assert shown["manifest"]["self_test"]["cases"] == cases
    assert {(each["kind"], each["output"]) for each in shown["self_test"]} >= {
        ("forward", "y"),
        ("backward", "dx"),
    }


def test_inspect_of_a_wrong_kernel_with_the_self_test(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    def tighten(manifest: dict[str, Any]) -> None:
        for case in manifest["self_test"]["cases"]:
            case["tolerance"] = dict.fromkeys(case["tolerance"], -1.0)

    rewrite_manifest(copy, tighten)
    code, out, err = cli("inspect", copy, "--self-test")
    assert code == 1
    assert "float32[N, 4, L]" in out
    assert "gives a wrong dx on this host" in err
    assert cli("inspect", copy).code == 0


def test_inspect_where_there_are_no_vectors(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    rewrite_manifest(copy, lambda manifest: manifest["self_test"].update(cases=[]))
    code, out, _ = cli("inspect", copy, "--self-test")
    assert code == 0
    assert "holds no vectors" in out


def test_inspect_shows_an_operator_that_is_not_known_yet(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    rewrite_manifest(copy, lambda manifest: manifest["spec"].update(op="power_norm"))
    code, out, err = cli("inspect", copy)
    assert code == 0
    assert "op=power_norm" in out
    assert "does not know the artifact's spec" in err
    assert _lines(out)["loads"] == ["loads", "here:", "nothing"]
    assert cli("inspect", copy, "--self-test").code == 4


def test_inspect_shows_what_loader_is_needed(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    assert "apache-tvm-ffi >=0.1.15,<0.2" in cli("inspect", copy).out
    rewrite_manifest(copy, lambda m: m["requires"]["tvm_ffi"].update({"from": "7.1", "below": "8"}))
    code, out, err = cli("inspect", copy)
    assert code == 0
    assert _lines(out)["needs:"] == ["needs:", "apache-tvm-ffi", ">=7.1,<8"]
    assert "pip install" in err
    assert cli("verify", copy).code == 4


def test_inspect_shows_an_artifact_for_another_cpu(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    rewrite_manifest(copy, for_another_cpu)
    code, out, err = cli("inspect", copy)
    assert code == 0
    assert "instance_norm" in out
    assert "time-travel" in err


@pytest.fixture
def with_two(copy: Path, rewrite_manifest: Callable[..., None]) -> Path:
    """An artifact with a library for this machine and one, first in order, for another CPU."""

    def add(manifest: dict[str, Any]) -> None:
        (own,) = manifest["libraries"]
        target = {**own["target"], "name": "later", "features": ["avx512f", "time-travel"]}
        manifest["libraries"] = [{**own, "target": target, "self_test": "not run"}, own]

    rewrite_manifest(copy, add)
    return copy


def _lines(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}


def test_inspect_shows_each_library(cli: Callable[..., Any], with_two: Path) -> None:
    code, out, err = cli("inspect", with_two)
    assert (code, err) == (0, "")
    lines = _lines(out)
    assert lines["later"][3:6] == ["no", "not", "run"]
    assert lines["cpu"][3:5] == ["yes", "passed"]
    assert lines["loads"] == ["loads", "here:", "cpu"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("later", 4, "time-travel"), ("cpu", 0, ""), ("x86-64-v9", 2, "(later, cpu)")],
)
def test_the_variable_that_names_the_library(
    name: str,
    code: int,
    message: str,
    cli: Callable[..., Any],
    with_two: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """inspect shows the artifact in any case; what runs kernels does as it is told, or fails."""
    monkeypatch.setenv(VARIABLE, name)
    done = cli("inspect", with_two)
    assert done.code == 0
    assert message in done.err
    assert _lines(done.out)["loads"][2] == ("cpu" if code == 0 else "nothing")
    done = cli("verify", with_two, "--shape", "2,4,7")
    assert done.code == code
    assert message in done.err


@pytest.mark.parametrize(
    "keys",
    [
        ("normgraph_version",),
        ("versions",),
        ("kinds", "forward", "rule"),
        ("libraries", 0, "target", "mcpu"),
    ],
)
def test_inspect_says_what_a_manifest_lacks(
    keys: tuple[Any, ...],
    cli: Callable[..., Any],
    copy: Path,
    rewrite_manifest: Callable[..., None],
) -> None:
    def drop(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    rewrite_manifest(copy, drop)
    code, out, err = cli("inspect", copy)
    assert (code, out) == (3, "")
    assert f"there is no '{keys[-1]}'" in err
    assert cli("inspect", copy, "--json").code == 0


@pytest.mark.parametrize("command", ["inspect", "verify", "bench", "run"])
def test_a_missing_or_damaged_artifact_exits_with_3(
    command: str, cli: Callable[..., Any], copy: Path, tmp_path: Path
) -> None:
    rest = ("forward",) if command == "run" else ()
    for path in (tmp_path / "nowhere", tmp_path):
        code, out, err = cli(command, path, *rest)
        assert (code, out) == (3, "")
        assert str(path) in err
    (library,) = copy.glob("*.so")
    content = library.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        content + b"\0",
        content.replace(b"\0", b"\1", 1),
    ):
        library.write_bytes(damaged)
        code, out, err = cli(command, copy, *rest)
        assert (code, out) == (3, "")
        assert library.name in err
        assert "Traceback" not in err


@pytest.mark.parametrize("command", ["verify", "bench", "run"])
def test_an_artifact_for_another_cpu_exits_with_4(
    command: str, cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    rewrite_manifest(copy, for_another_cpu)
    code, out, err = cli(command, copy, *(("forward",) if command == "run" else ()))
    assert (code, out) == (4, "")
    assert "time-travel" in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_newer_format_exits_with_4(
    command: str, cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    rewrite_manifest(copy, lambda manifest: manifest.update(format_version=99))
    code, out, err = cli(command, copy)
    assert (code, out) == (4, "")
    assert "99" in err


def test_verify(cli: Callable[..., Any], artifact: Path) -> None:
    code, out, err = cli("verify", artifact, "--shape", "2,4,7")
    assert code == 0, out
    assert "PASSED" in out
    assert "dgamma" in out
    assert " s] " in err


def test_verify_as_json(cli: Callable[..., Any], artifact: Path) -> None:
    code, out, _ = cli("verify", artifact, "--shape", "2,4,7", "--seed", "3", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["seed"] == 3


def test_verify_of_a_wrong_kernel_exits_with_1(
    cli: Callable[..., Any], copy: Path, rewrite_manifest: Callable[..., None]
) -> None:
    """The kernels were compiled with eps 1e-5, and the manifest says otherwise."""
    rewrite_manifest(copy, lambda manifest: manifest["spec"].update(eps=0.5))
    code, out, _ = cli("verify", copy, "--shape", "2,4,7")
    assert code == 1
    assert "FAILED" in out


def test_verify_refuses_a_shape_that_does_not_fit(cli: Callable[..., Any], artifact: Path) -> None:
    code, out, err = cli("verify", artifact, "--shape", "2,5,7")
    assert (code, out) == (2, "")
    assert "N,4,L" in err
    code, out, err = cli("verify", artifact, "--shape", f"2,4,{2**62}")
    assert (code, out) == (2, "")
    assert "memory" in err


@pytest.mark.parametrize(
    ("flag", "text", "stock"),
    [
        ((), "a table", True),
        (("--json",), "{}", True),
        (("--markdown",), "| a |", True),
        (("--brief",), "a table", False),
    ],
)
def test_bench_passes_its_options_on(
    flag: tuple[str, ...],
    text: str,
    stock: bool,
    cli: Callable[..., Any],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The measuring itself is tested with the bench."""
    asked: list[Any] = []

    class FakeReport:
        def to_text(self) -> str:
            return "a table"

        def to_json(self) -> str:
            return "{}"

        def to_markdown(self) -> str:
            return "| a |"

    def fake(
        path: Path, shape: Any, *, kinds: Any, extras: Any, progress: Callable[[str], None]
    ) -> FakeReport:
        asked.extend([path, shape, kinds, extras.stock])
        progress("measuring")
        return FakeReport()

    monkeypatch.setattr(bench, "bench", fake)
    code, out, err = cli(
        "bench", artifact, "--shape", "2,4,7", "--kinds", "forward,inference", *flag
    )
    assert (code, out) == (0, text + "\n")
    assert asked == [artifact, (2, 4, 7), ("forward", "inference"), stock]
    assert "measuring" in err


def test_bench_of_a_kind_that_is_not_there_exits_with_2(
    cli: Callable[..., Any], artifact: Path
) -> None:
    code, out, err = cli("bench", artifact, "--kinds", "backward_frozen")
    assert (code, out) == (2, "")
    assert "backward_from_output" in err
