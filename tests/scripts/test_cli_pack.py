"""`normgraph pack` and `normgraph unpack`, and other commands on a packed artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def test_pack_and_unpack(cli: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    packed, folder = tmp_path / "norm.ngz", tmp_path / "folder"
    done = cli("pack", artifact, "-o", packed)
    assert (done.code, done.out) == (0, f"{packed}\n")
    done = cli("unpack", packed, "-o", folder)
    assert (done.code, done.out) == (0, f"{folder}\n")
    names = {file.name for file in artifact.iterdir() if not file.name.startswith(".")}
    assert {file.name for file in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (artifact / name).read_bytes()


def test_other_commands_take_the_file(
    cli: Callable[..., Any], artifact: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "norm.ngz"
    cli("pack", artifact, "-o", packed)
    shown = cli("inspect", packed, "--json")
    assert shown.code == 0
    assert json.loads(shown.out) == json.loads((artifact / "manifest.json").read_text())
    assert cli("inspect", packed, "--self-test").code == 0
    x, gamma, beta = np.ones((2, 4, 3), "f4"), np.ones(4, "f4"), np.full(4, 3, "f4")
    np.savez(tmp_path / "in.npz", x=x, gamma=gamma, beta=beta)
    command = ("run", packed, "inference", "--input", tmp_path / "in.npz", "-o", tmp_path / "y.npy")
    assert cli(*command).code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.full((2, 4, 3), 3))


def test_what_is_refused(cli: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    packed = tmp_path / "norm.ngz"
    cli("pack", artifact, "-o", packed)
    for name in ("verify", "bench"):
        done = cli(name, packed, "--shape", "2,4,3")
        assert done.code == 2
        assert f"normgraph unpack {packed} -o DIR" in done.err
    packed.write_bytes(packed.read_bytes()[:-1])
    for command in (("inspect", packed), ("unpack", packed, "-o", tmp_path / "out")):
        done = cli(*command)
        assert (done.code, done.out) == (3, "")
        assert "it was cut or added to" in done.err
    assert cli("pack", tmp_path / "nothing", "-o", packed).code == 3
    assert cli("pack", artifact).code == 2
