"""run: arrays from files and back, and every wrong way to give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ArgumentError
from normgraph.scripts.cli_run import Source, read_inputs

X = np.arange(40, dtype=np.float32).reshape(2, 4, 5)
GAMMA = np.array([1, 2, 3, 4], np.float32)
BETA = np.array([0, 1, 0, 1], np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the inputs of a forward, as three .npy files and as one .npz."""
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "gamma.npy", GAMMA)
    np.save(tmp_path / "beta.npy", BETA)
    np.savez(tmp_path / "all.npz", x=X, gamma=GAMMA, beta=BETA)
    (tmp_path / "text.npy").write_text("not an array")
    monkeypatch.chdir(tmp_path)
    return tmp_path


THREE = ("--input", "x=x.npy", "--input", "gamma=gamma.npy", "--input", "beta=beta.npy")


def expected(x: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The float64 answer; each row is a run of five numbers of variance 2."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=2, keepdims=True)
    y: np.ndarray[Any, np.dtype[np.float64]] = (
        centred / np.sqrt(2 + 1e-5) * GAMMA[:, None] + BETA[:, None]
    )
    return y


@pytest.mark.parametrize("inputs", [THREE, ("--input", "all.npz")])
def test_a_forward_from_files_to_a_file(
    inputs: tuple[str, ...], cli: Callable[..., Any], artifact: Path, folder: Path
) -> None:
    code, out, err = cli("run", artifact, "forward", *inputs, "-o", "out.npz")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["y", "mean", "inv_std"]
    with np.load(folder / "out.npz") as written:
        assert written.files == ["y", "mean", "inv_std"]
        assert written["y"].dtype == np.float32
        assert abs(written["y"] - expected(X)).max() < 1e-5
        assert written["mean"].shape == (2, 4, 1)


def test_one_wanted_output_goes_to_a_bare_array(
    cli: Callable[..., Any], artifact: Path, folder: Path
) -> None:
    assert cli("run", artifact, "forward", *THREE, "--want", "mean", "-o", "mean.npy").code == 0
    assert np.load(folder / "mean.npy").ravel().tolist() == list(range(2, 40, 5))


def test_wanted_outputs_come_under_their_names_in_any_order(
    cli: Callable[..., Any], artifact: Path, folder: Path
) -> None:
    assert cli("run", artifact, "forward", *THREE, "--want", "mean,y", "-o", "some.npz").code == 0
    with np.load(folder / "some.npz") as written:
        assert sorted(written.files) == ["mean", "y"]
        assert written["y"].shape == (2, 4, 5)
        assert written["mean"].shape == (2, 4, 1)


@pytest.mark.usefixtures("folder")
def test_without_a_file_the_outputs_are_only_listed(
    cli: Callable[..., Any], artifact: Path
) -> None:
    code, out, _ = cli("run", artifact, "inference", *THREE)
    assert code == 0
    assert "2x4x5" in out


def test_bfloat16_is_stored_as_its_bits(
    cli: Callable[..., Any], build_artifact: Callable[..., Path], folder: Path
) -> None:
    path = build_artifact(
        ng.NormSpec("instance_norm"), ("N", 4, "L"), "bfloat16", kinds=("forward",)
    )
    for name, array in (("x", X), ("gamma", GAMMA), ("beta", BETA)):
        np.save(folder / f"{name}.npy", array.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert cli("run", path, "forward", *THREE, "-o", "out.npz").code == 0
    with np.load(folder / "out.npz") as written:
        assert written["y"].dtype == np.uint16
        y = written["y"].view(ml_dtypes.bfloat16).astype(np.float64)
        assert written["mean"].dtype == np.float32
    assert abs(y - expected(X)).max() < 2**-6


def test_a_scalar_may_be_a_number(
    cli: Callable[..., Any], build_artifact: Callable[..., Path], folder: Path
) -> None:
    spec = ng.NormSpec("batch_norm", momentum=None)
    path = build_artifact(spec, ("N", 4, "L"), kinds=("forward",))
    np.savez("running.npz", running_mean=np.zeros(4, "f4"), running_var=np.ones(4, "f4"))
    rest = ("--input", "running.npz", "--input", "momentum=0.5")
    want = ("--want", "new_running_mean", "-o", "new.npy")
    assert cli("run", path, "forward", *THREE, *rest, *want).code == 0
    assert abs(np.load(folder / "new.npy") - X.mean(axis=(0, 2)) / 2).max() < 1e-5
    code, _, err = cli("run", path, "forward", *THREE, *rest[:2], "--input", "momentum=slow")
    assert code == 2
    assert "slow" in err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sideways", *THREE), "sideways"),
        (("forward", *THREE[:4]), "beta"),
        (("forward", *THREE, "--input", "x=x.npy"), "twice"),
        (("forward", *THREE, "--input", "dy=x.npy"), "dy"),
        (("forward", *THREE[2:], "--input", "x=gone.npy"), "gone.npy"),
        (("forward", *THREE[2:], "--input", "x=text.npy"), "text.npy"),
        (("forward", *THREE[2:], "--input", "x.npy"), "NAME=FILE"),
        (("forward", *THREE[2:], "--input", "x="), "NAME=FILE"),
        (("forward", *THREE[2:], "--input", "x=gamma.npy"), "rank"),
        (("forward", *THREE[2:], "--input", "x=."), "of numbers"),
        (("forward", *THREE, "--want", "dx"), "dx"),
        (("forward", *THREE, "-o", "out.npy"), ".npz"),
        (("forward", *THREE, "-o", "gone/out.npz"), "gone/out.npz"),
    ],
)
def test_wrong_input_exits_with_2(
    arguments: tuple[str, ...], named: str, cli: Callable[..., Any], artifact: Path
) -> None:
    code, out, err = cli("run", artifact, *arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("folder")
def test_a_wrong_dtype_is_refused(cli: Callable[..., Any], artifact: Path) -> None:
    np.save("x.npy", X.astype(np.float64))
    code, out, err = cli("run", artifact, "forward", *THREE)
    assert (code, out) == (2, "")
    assert "float64" in err
    assert "float32" in err


@pytest.mark.usefixtures("folder")
def test_a_bfloat16_file_for_another_dtype_is_explained(
    cli: Callable[..., Any], artifact: Path
) -> None:
    np.save("x.npy", X.astype(ml_dtypes.bfloat16))
    code, out, err = cli("run", artifact, "forward", *THREE)
    assert (code, out) == (2, "")
    assert "bfloat16 itself is stored as its bits, uint16" in err


@pytest.mark.usefixtures("folder")
def test_an_npz_without_the_name_says_what_it_holds() -> None:
    signature = ng.runtime.TensorSpec("dy", "float32", ("N", 4, "L"))
    with pytest.raises(ArgumentError, match="x, gamma, beta"):
        read_inputs([Source("dy", "all.npz")], [signature])


@pytest.mark.usefixtures("folder")
def test_pickled_objects_are_not_loaded() -> None:
    np.save("x.npy", np.array([{}], dtype=object), allow_pickle=True)
    signature = ng.runtime.TensorSpec("x", "float32", (1,))
    with pytest.raises(ArgumentError, match="of numbers"):
        read_inputs([Source("x", "x.npy")], [signature])
