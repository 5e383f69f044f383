"""The GPU check as far as a machine without a GPU can tell: its oracle, goals, report and pack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import CompileError
from normgraph.scripts import gpu_check, gpu_pack, gpu_report, gpu_timing, gpu_torch
from normgraph.scripts.gpu_cases import LARGE, Case, Goal, cases, goal_of
from normgraph.scripts.gpu_run import Bench

COPY = 4.3e12
SPECS = [
    ng.NormSpec("batch_norm"),
    ng.NormSpec("instance_norm"),
    ng.NormSpec("group_norm", groups=2),
    ng.NormSpec("layer_norm"),
    ng.NormSpec("rms_norm"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_the_oracle_agrees_with_the_reference(spec: ng.NormSpec) -> None:
    torch = pytest.importorskip("torch")
    shape = (3, 5) if spec.op in ("layer_norm", "rms_norm") else (3, 4, 2, 5)
    inputs = gpu_torch.draw(torch, spec, shape, "float32", 3, "cpu")
    forward: dict[str, Any] = {}
    for kind in ("forward", "inference", "backward"):
        got = gpu_torch.answers(torch, spec, kind, inputs)
        names = [name for name, *_ in ports(spec, kind)]
        given = {name: inputs[name].numpy() for name in names if name in inputs}
        given |= {name: forward[name] for name in names if name in ("mean", "inv_std")}
        want = ng.graphs.reference.run(spec, kind, given)
        if kind == "forward":
            forward = want
        assert set(got) == set(want)
        for name, value in want.items():
            shaped = got[name].detach().numpy().reshape(value.shape)
            np.testing.assert_allclose(shaped, value, rtol=1e-5, atol=1e-6, err_msg=name)


def ports(spec: ng.NormSpec, kind: str) -> list[tuple[str, ...]]:
    shape = ("N", 5) if spec.op in ("layer_norm", "rms_norm") else ("N", 4, "H", "W")
    model = ng.graphs.build(spec, kind, shape=shape, dtype="float32")
    return [(value.name,) for value in model.graph.input]


def test_an_error_is_seen_in_any_element() -> None:
    torch = pytest.importorskip("torch")
    want = torch.linspace(-1, 1, 100, dtype=torch.float64)
    got = want.float()
    assert gpu_torch.worst("y", "float32", got, want, {}) < 0.1
    for wrong in (1e-3, float("nan")):
        spoiled = got.clone()
        spoiled[71] += wrong
        assert gpu_torch.worst("y", "float32", spoiled, want, {}) > 1
    half = want.half()
    assert gpu_torch.worst("y", "float16", half, want, {}) < 1
    assert gpu_torch.worst("y", "float16", half * 1.01, want, {}) > 1


def test_the_checks_run_on_kernels_for_the_cpu(tmp_path: Path) -> None:
    """The same calls on the same artifacts, but for the device."""
    torch = pytest.importorskip("torch")
    case = Case(ng.NormSpec("batch_norm"), (4, 6, 3, 5), "float32")
    kinds = ("forward", "inference", "backward")
    ng.graphs.export(case.spec, shape=case.declared, dtype="float32", out=tmp_path / "g",
                     kinds=kinds)  # fmt: skip
    ng.compile.build(tmp_path / "g", target="cpu", out=tmp_path / "a" / case.name)
    bench = Bench(torch, tmp_path / "a", 0, "cpu")
    for shape in (case.shape, (3, 6, 5, 7)):
        found = bench.numeric(case, shape)
        assert [each["passed"] for each in found] == [True] * 3, found
    # A forward of one value a channel is refused, and no backward comes without its statistics.
    (only,) = bench.numeric(case, (1, 6, 1, 1))
    assert only["what"].endswith("inference")
    checks = {each["what"]: each["passed"] for each in bench.behaviour(case)}
    assert checks["batch_norm: an output that is added to"]
    assert checks["batch_norm: an input that is not compact"]
    assert not checks["batch_norm: an array on the CPU is refused"]


def test_a_wrong_artifact_is_reported(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    case = Case(ng.NormSpec("rms_norm", eps=1.0), (4, 6), "float32")
    other = Case(ng.NormSpec("rms_norm"), (4, 6), "float32")
    ng.graphs.export(other.spec, shape=other.declared, dtype="float32", out=tmp_path / "g")
    ng.compile.build(tmp_path / "g", target="cpu", out=tmp_path / "a" / other.name)
    found = Bench(torch, tmp_path / "a", 0, "cpu").numeric(case, case.shape)
    assert not any(each["passed"] for each in found)
    assert "y " in found[0]["detail"]


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "kind", "goal"),
    [
        ("instance_norm", (64, 256, 56, 56), "float32", "forward", Goal(0.92, False)),
        ("instance_norm", (64, 256, 56, 56), "float32", "backward", Goal(0.90, False)),
        ("batch_norm", (64, 256, 56, 56), "float32", "forward", Goal(0.85, False)),
        ("batch_norm", (64, 256, 56, 56), "float32", "backward", Goal(0.80, False)),
        ("instance_norm", (2, 32, 512, 512), "float32", "backward", Goal(0.80, False)),
        ("layer_norm", (512, 131072), "float32", "forward", Goal(0.80, False)),
        ("layer_norm", (8192, 4096), "float32", "backward", Goal(0.90, False)),
        ("layer_norm", (4096, 1024), "float32", "backward", Goal(None, False)),
        ("instance_norm", (16, 256, 14, 14), "float32", "forward", Goal(None, True)),
    ],
)
def test_goals(op: str, shape: tuple[int, ...], dtype: str, kind: str, goal: Goal) -> None:
    assert goal_of(Case(ng.NormSpec(op), shape, dtype), kind, COPY) == goal


def test_every_operator_and_dtype_is_among_the_cases() -> None:
    listed = cases()
    assert {case.spec.op for case in listed} == {spec.op for spec in SPECS}
    dtypes = ("float32", "float16", "bfloat16")
    assert {(case.spec.op, case.dtype) for case in listed} == {
        (spec.op, dtype) for spec in SPECS for dtype in dtypes
    }
    assert len({(case.spec, case.shape, case.dtype) for case in listed}) == len(listed)
    assert sum(case.nbytes >= LARGE for case in listed) > 10
    shared: dict[str, tuple[Any, ...]] = {}
    for case in listed:
        assert shared.setdefault(case.name, (case.spec, case.declared)) == (
            case.spec,
            case.declared,
        )


def test_a_rotation_is_larger_than_the_cache() -> None:
    for nbytes in (1, 10**5, 10**8, 10**10):
        sets = gpu_timing.sets_for(nbytes, 60 * 2**20)
        assert 2 <= sets <= 64
        assert sets == 64 or sets * nbytes >= 4 * 60 * 2**20


def test_the_report_says_what_was_met_and_what_was_not() -> None:
    case = Case(ng.NormSpec("instance_norm"), (64, 256, 56, 56), "float32", (("forward", 99.0),))
    fast = case.moved("forward") / (0.95 * COPY)
    rows = [
        gpu_report.row(case, "forward", Goal(0.92, False),
                       {"ours": fast, "eager": 2 * fast, "copy": fast}, COPY, 2e-6),
        gpu_report.row(case, "backward", Goal(0.90, False),
                       {"ours": 3 * fast, "eager": fast}, COPY, 2e-6),
        gpu_report.row(case, "inference", Goal(None, True),
                       {"ours": fast}, COPY, fast),
    ]  # fmt: skip
    assert [each["met"] for each in rows] == [True, False, True]
    assert [each["ahead"] for each in rows] == [False, False, None]  # 99 us are ahead of it
    assert rows[0]["share_of_copy"] == pytest.approx(0.95)
    report = {
        "device": {"name": "H", "arch": "sm_90", "processors": 1, "l2_bytes": 2**20, "driver": "1"},
        "versions": {"torch": "2"},
        "copy_bandwidth": COPY,
        "launch_us": 2.0,
        "numeric": [{"what": "a", "passed": True, "detail": ""},
                    {"what": "b", "passed": False, "detail": "dx 3"}],
        "rows": rows,
        "failures": ["compiled: no"],
    }  # fmt: skip
    text = gpu_report.markdown(report)
    assert "1 of 2 checks against float64 passed" in text
    assert "WRONG: b: dx 3" in text
    assert "Goals met: 2 of 3. Ahead of every peer: 0 of 2." in text
    assert "| 95% | 92% of copy | yes |" in text
    assert "not measured: compiled: no" in text
    json.dumps(report)


def fake_build(size: int) -> Any:
    def build(graphs: str, target: str, out: Path) -> Path:
        assert target == "cuda"
        kinds = {file.stem for file in Path(graphs).glob("*.onnx")}
        assert {"forward", "inference", "backward", "backward_from_output"} <= kinds
        out.mkdir(parents=True)
        (out / "manifest.json").write_bytes(np.random.default_rng(0).bytes(size))
        return out

    return build


def fake_wheels(repository: Path, target: Path) -> None:
    (target / "normgraph.whl").write_text("ours")


def test_a_pack_holds_artifacts_wheels_and_the_script(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ng.compile, "build", fake_build(10))
    chosen = cases()[:3]
    said: list[str] = []
    out = gpu_pack.pack(
        tmp_path / "p", repository, chosen=chosen, wheels=fake_wheels, progress=said.append
    )
    names = {case.name for case in chosen}
    assert not (out / "artifacts").exists()
    for _ in range(2):  # unpacked once
        assert {path.name for path in gpu_check.unpacked(out).iterdir()} == names
    assert not (out / "artifacts.part").exists()
    manifest = gpu_check.unpacked(out) / chosen[0].name / "manifest.json"
    assert manifest.read_bytes() == np.random.default_rng(0).bytes(10)
    assert (out / "wheels" / "normgraph.whl").exists()
    assert os.access(out / "gpu_check", os.X_OK)
    assert set(json.loads((out / "pack.json").read_text())["names"]) == names
    assert said[-1].startswith("packed 0.0 MB")
    (out / "stale").write_text("")
    gpu_pack.pack(out, repository, chosen=chosen, wheels=fake_wheels, progress=said.append)
    assert not (out / "stale").exists()


def test_a_pack_that_is_too_large_is_refused(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ng.compile, "build", fake_build(gpu_pack.MOST_BYTES))
    with pytest.raises(CompileError, match=r"60\.0 MB, and at most 60 MB"):
        gpu_pack.pack(
            tmp_path, repository, chosen=cases()[:1], wheels=fake_wheels, progress=lambda line: None
        )


def test_without_a_device_it_says_so(
    no_driver: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 4
    assert "there is no CUDA driver" in capsys.readouterr().err


def test_it_starts_with_nothing_but_python(no_driver: None) -> None:
    """Where NumPy and tvm_ffi are missing too, it gets as far as to say that no device is here."""
    code = (
        "import sys\n"
        "for name in ('numpy', 'tvm_ffi', 'torch', 'onnx', 'tvm', 'ml_dtypes'):\n"
        "    sys.modules[name] = None\n"
        "from normgraph.scripts import gpu_check\n"
        "sys.exit(gpu_check.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "there is no CUDA driver" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_torch_without_cuda_is_told(
    driver: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 6
    assert "cannot use the CUDA device" in capsys.readouterr().err


def test_a_choice_of_no_case_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--only", "sum_norm"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "sum_norm" in capsys.readouterr().err


def test_the_script_runs_from_the_folder_alone(
    tmp_path: Path, repository: Path, no_driver: None
) -> None:
    shutil.copy(repository / "scripts" / "gpu_check", tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "site").mkdir()
    done = subprocess.run(
        [str(tmp_path / "gpu_check"), "--accuracy"],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "gpu_check needs a CUDA device" in done.stderr


def test_an_install_that_broke_off_is_done_again(tmp_path: Path, repository: Path) -> None:
    """site is there as a whole or not at all."""
    shutil.copy(repository / "scripts" / "gpu_check", tmp_path)
    (tmp_path / "wheels").mkdir()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "$@" >>"$0.log"\n'
        'while [ "$1" ] && [ "$1" != --target ]; do shift; done\n'
        '[ "$1" ] || exit 0\n'
        'mkdir "$2" && [ -e "$0.works" ]\n'
    )
    python.chmod(0o755)

    def run() -> int:
        env = {**os.environ, "PYTHON": str(python)}
        return subprocess.run([str(tmp_path / "gpu_check")], env=env, check=False).returncode

    assert run() != 0
    assert not (tmp_path / "site").exists()
    (tmp_path / "python.works").touch()
    for _ in range(2):
        assert run() == 0
        assert (tmp_path / "site").exists()
        assert not (tmp_path / "site.part").exists()
    calls = (tmp_path / "python.log").read_text().splitlines()
    kinds = ["install" if " install " in call else "run" for call in calls]
    assert kinds == ["install", "install", "run", "run"]
