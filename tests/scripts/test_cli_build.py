"""export, compile and targets: what they write, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import normgraph as ng


def spec_of(path: Path) -> ng.NormSpec:
    """The spec an exported graph says it was made from."""
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return ng.NormSpec.from_dict(json.loads(metadata["normgraph.spec"]))


def test_export_writes_every_kind_and_prints_the_paths(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    code, out, err = cli("export", "batch_norm", "--shape", "N,4,H,W", "-o", tmp_path / "g")
    assert (code, err) == (0, "")
    kinds = ng.graphs.kinds(ng.NormSpec("batch_norm"))
    assert out.splitlines() == [str(tmp_path / "g" / f"{kind}.onnx") for kind in kinds]
    for line in out.splitlines():
        onnx.checker.check_model(line, full_check=True)


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ("batch_norm", ng.NormSpec("batch_norm")),
        (
            "instance_norm --eps 1e-3 --no-weight --no-bias --correction 1",
            ng.NormSpec("instance_norm", eps=1e-3, weight=False, bias=False, correction=1),
        ),
        ("group_norm --groups 2 --no-bias", ng.NormSpec("group_norm", groups=2, bias=False)),
        (
            "layer_norm --normalized-ndim 2 --param-dtype float64",
            ng.NormSpec("layer_norm", normalized_ndim=2, param_dtype="float64"),
        ),
        ("rms_norm --eps none", ng.NormSpec("rms_norm", eps=None)),
        (
            "instance_norm --track-running-stats --momentum 0.25 --convention onnx",
            ng.NormSpec(
                "instance_norm", track_running_stats=True, momentum=0.25, convention="onnx"
            ),
        ),
        ("batch_norm --momentum input", ng.NormSpec("batch_norm", momentum=None)),
        (
            "batch_norm --no-track-running-stats",
            ng.NormSpec("batch_norm", track_running_stats=False),
        ),
    ],
)
def test_every_flag_of_export_reaches_the_spec(
    flags: str, spec: ng.NormSpec, cli: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = (*flags.split(), "--shape", "2,4,6", "--dtype", "float64", "--kinds", "forward")
    code, out, _ = cli("export", *arguments, "-o", tmp_path)
    assert code == 0
    assert spec_of(Path(out.strip())) == spec.resolve("float64")


def test_compile_reports_progress_and_prints_the_artifact(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    ng.graphs.export(ng.NormSpec("rms_norm"), shape=("N", 5), out=tmp_path / "g")
    code, out, err = cli("compile", tmp_path / "g", "--target", "cpu", "-o", tmp_path / "a")
    assert (code, out) == (0, f"{tmp_path / 'a'}\n")
    assert " s] " in err
    assert set(ng.load(tmp_path / "a").kinds) == set(ng.graphs.kinds(ng.NormSpec("rms_norm")))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), ["cpu"]),
        (("--target", "x86-64-v3"), ["x86-64-v3"]),
        (("--target", "x86-64-v2, x86-64-v4"), ["x86-64-v2", "x86-64-v4"]),
        (("--target", "cpu", "--target=aarch64,x86-64-v2"), ["cpu", "aarch64", "x86-64-v2"]),
        (("--target", "x86-64-levels"), ["x86-64-v2", "x86-64-v3", "x86-64-v4"]),
    ],
)
def test_compile_for_several_targets(
    flags: tuple[str, ...], wanted: list[str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    ng.graphs.export(
        ng.NormSpec("rms_norm"), shape=("N", 5), out=tmp_path / "g", kinds=("inference",)
    )
    assert cli("compile", tmp_path / "g", *flags, "-o", tmp_path / "a").code == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert [library["target"]["name"] for library in manifest["libraries"]] == wanted


@pytest.mark.parametrize("names", ["", "cpu,", "z80", "cpu,z80"])
def test_compile_for_a_target_that_is_none_exits_with_2(
    names: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    ng.graphs.export(ng.NormSpec("rms_norm"), shape=("N", 5), out=tmp_path / "g")
    code, out, err = cli("compile", tmp_path / "g", "--target", names, "-o", tmp_path / "a")
    assert (code, out) == (2, "")
    assert "z80" in err or "expected names with commas between" in err
    assert not (tmp_path / "a").exists()


def test_compile_dumps_each_step(cli: Callable[..., Any], tmp_path: Path) -> None:
    spec = ng.NormSpec("rms_norm")
    ng.graphs.export(spec, shape=("N", 5), out=tmp_path / "g", kinds=("inference",))
    dump = tmp_path / "dump"
    assert cli("compile", tmp_path / "g", "-o", tmp_path / "a", "--debug-dump", dump).code == 0
    assert len([path for path in dump.rglob("*") if path.is_file()]) > 2


def test_compile_of_a_missing_folder_exits_with_3(cli: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = cli("compile", tmp_path / "g", "-o", tmp_path / "a")
    assert (code, out) == (3, "")
    assert str(tmp_path / "g") in err


def test_a_kernel_that_fails_its_self_test_exits_with_5(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """A graph whose metadata says another eps than its nodes: the kernel must not be kept."""
    spec = ng.NormSpec("rms_norm", eps=0.5)
    paths = ng.graphs.export(spec, shape=("N", 5), out=tmp_path / "g", kinds=("forward",))
    model = onnx.load(paths["forward"])
    for entry in model.metadata_props:
        entry.value = entry.value.replace("0.5", "0.25")
    onnx.save(model, paths["forward"])
    code, out, err = cli("compile", tmp_path / "g", "-o", tmp_path / "a")
    assert (code, out) == (5, "")
    assert "Traceback" not in err
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_targets(cli: Callable[..., Any]) -> None:
    code, out, err = cli("targets")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for target in ng.compile.targets():
        (line,) = (each for each in lines if each.startswith(f"{target.name} "))
        assert line.split()[1] == ("yes" if target.runs_here else "no")
    listed = json.loads(cli("targets", "--json").out)
    names = [each.name for each in ng.compile.targets()]
    assert [entry["name"] for entry in listed] == [*names, *ng.compile.target_groups()]
    assert listed[0]["runs_here"] is True
    assert listed[-1] == {"name": "x86-64-levels", "targets": names[1:4]}
