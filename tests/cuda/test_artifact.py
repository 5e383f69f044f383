"""A CUDA artifact from the build to its results, on the fake driver."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ArtifactIncompatible

SPEC = ng.NormSpec("instance_norm", track_running_stats=True)


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_first_load_runs_the_self_test_on_the_device(instance_norm: Path, driver: Any) -> None:
    gc.collect()
    live = driver.live
    operator = ng.load(instance_norm)
    lines = driver.take()
    assert sum(line.startswith("load 0") for line in lines) == 1
    assert sum("image of sm_90" in line for line in lines) == 1
    launches = [line.split()[2] for line in lines if line.startswith("launch")]
    assert sorted(set(launches)) == sorted(f"{kind}_kernel" for kind in operator.kinds)
    assert len(launches) == 2 * len(operator.kinds)
    assert driver.live == live
    assert all(result.error <= result.tolerance for result in operator.self_test())


def test_an_artifact_that_is_loaded_again_has_its_code_on_the_device(
    instance_norm: Path, driver: Any
) -> None:
    for loads in (1, 0, 0):
        operator = ng.load(instance_norm)
        assert len(driver.take("load")) == loads
        del operator
        gc.collect()


def test_a_wrong_kernel_fails_the_self_test(
    instance_norm: Path, driver: Any, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.cc"
    kinds = ("forward", "inference", "backward", "backward_frozen", "backward_from_output")
    wrong.write_text(
        "\n".join(f'extern "C" void run_{k}_kernel(void**, const unsigned*, unsigned) {{}}'
                  for k in kinds)
    )  # fmt: skip
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-o", str(tmp_path / "w.so"), str(wrong)], check=True
    )
    driver.kernels(tmp_path / "w.so")
    with pytest.raises(ng.errors.AccuracyError, match="Do not use this artifact"):
        ng.load(instance_norm)


def test_every_kind_matches_float64(
    instance_norm: Path, on_device: Callable[..., Any], on_host: Callable[[Any], Any]
) -> None:
    operator = ng.load(instance_norm)
    x, dy, gamma, beta = draw(3, 6, 4, 5), draw(3, 6, 4, 5, seed=1), draw(6), draw(6, seed=2)
    stats = draw(6, seed=3), np.abs(draw(6, seed=4)) + 0.5
    given = {"x": x, "gamma": gamma, "beta": beta, "running_mean": stats[0]}
    given |= {"running_var": stats[1]}
    forward = ng.graphs.reference.run(SPEC, "forward", given)
    given |= {name: forward[name].astype(np.float32) for name in ("y", "mean", "inv_std")}
    given["dy"] = dy
    for kind in operator.kinds:
        names = operator.signature(kind).input_names
        inputs = {name: given[name] for name in names}
        want = ng.graphs.reference.run(SPEC, kind, inputs)
        got = operator.call(kind, *(on_device(inputs[name]) for name in names))
        for name in operator.signature(kind).output_names:
            value = on_host(got if kind == "inference" else getattr(got, name))
            np.testing.assert_allclose(value, want[name], rtol=2e-4, atol=2e-4, err_msg=name)


def test_the_manifest_says_what_the_library_holds(instance_norm: Path) -> None:
    manifest = json.loads((instance_norm / "manifest.json").read_text())
    (library,) = manifest["libraries"]
    target = library["target"]
    assert (target["name"], target["kind"]) == ("cuda", "cuda")
    assert target["archs"] == ["sm_80", "sm_90", "compute_90"]
    assert (target["cuda"], target["compiler"]) == ("13.0", "fake")
    assert library["self_test"] == "not run"


def test_without_a_driver_nothing_is_loaded(instance_norm: Path, no_driver: None) -> None:
    with pytest.raises(ArtifactIncompatible, match="there is no CUDA driver") as caught:
        ng.load(instance_norm)
    assert caught.value.exit_code == 4


def test_a_driver_without_a_device_is_told(instance_norm: Path, driver: Any) -> None:
    driver.devices()
    with pytest.raises(ArtifactIncompatible, match="finds no device"):
        ng.load(instance_norm)


def test_a_device_it_has_no_code_for_is_told(instance_norm: Path, driver: Any) -> None:
    driver.devices(75)
    with pytest.raises(ArtifactIncompatible, match=r"sm_80, sm_90, compute_90.*Fake 0 \(sm_75\)"):
        ng.load(instance_norm)
    assert driver.take("load") == []


def test_an_older_driver_is_told(instance_norm: Path, driver: Any) -> None:
    driver.version(12, 8)
    with pytest.raises(ArtifactIncompatible, match=r"CUDA 13\.0, and the driver supports CUDA 12"):
        ng.load(instance_norm)


def test_ptx_of_a_later_cuda_than_the_drivers_is_told(instance_norm: Path, driver: Any) -> None:
    rewrite(instance_norm, cuda="13.2")
    driver.devices(100)
    with pytest.raises(ArtifactIncompatible, match=r"PTX is of CUDA 13\.2"):
        ng.load(instance_norm)
    driver.devices(90)
    assert ng.load(instance_norm).target == "cuda"


def test_one_device_that_can_is_enough(
    instance_norm: Path, driver: Any, on_device: Callable[..., Any]
) -> None:
    driver.devices(75, 90)
    operator = ng.load(instance_norm)
    assert {line.split()[1] for line in driver.take("launch")} == {"1"}
    x, gamma = on_device(draw(2, 6, 4, 5)), on_device(draw(6))
    with pytest.raises(ng.errors.DeviceError, match="sm_75, and the library holds code for sm_80"):
        operator.inference(x, gamma, gamma, gamma, gamma)


def test_several_cuda_targets_are_libraries_of_one_artifact(
    build_plain: Callable[..., Any], driver: Any, tmp_path: Path
) -> None:
    built = build_plain(
        ng.NormSpec("rms_norm"), ("N", 8), kinds=("inference",), target=("sm_80", "sm_90")
    )
    driver.kernels(built.host_kernels)
    for capability, target in ((80, "sm_80"), (90, "sm_90"), (86, "sm_80"), (120, "sm_90")):
        driver.devices(capability)
        copied = tmp_path / str(capability)
        shutil.copytree(built.path, copied)
        assert ng.load(copied).target == target


def rewrite(path: Path, **changes: object) -> None:
    """Change the target of an artifact's library, with the digest made right again."""
    from normgraph.runtime.manifest import manifest_digest

    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["libraries"][0]["target"].update(changes)
    manifest["digest"] = manifest_digest(manifest)
    file.write_text(json.dumps(manifest))
