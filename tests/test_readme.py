"""The README's code runs as printed: the Python blocks as one program, the commands in order."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from normgraph.__main__ import main


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    """The text of the README."""
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_it_opens_with_a_sentence_and_the_two_commands(readme: str) -> None:
    title, sentence, fence, demo, test = [line for line in readme.splitlines() if line][:5]
    assert title == "# normgraph"
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0
    assert fence == "```sh"
    assert demo.startswith("./scripts/demo ")
    assert test.startswith("./scripts/test ")


def test_the_scripts_it_names_exist(readme: str, repository: Path) -> None:
    for name in set(re.findall(r"\./scripts/[\w-]+", readme)):
        mode = (repository / name).stat().st_mode
        assert mode & 0o111, f"{name} is not executable"


def test_the_extras_it_names_exist(readme: str) -> None:
    known = importlib.metadata.metadata("normgraph").get_all("Provides-Extra") or []
    for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", readme):
        assert set(extras.split(",")) <= set(known)


def test_the_python_blocks_run(readme: str, tmp_path: Path) -> None:
    program = "\n".join(blocks(readme, "python")) + (
        "\nassert y.shape == dx.shape == x.shape\n"
        "assert abs(y.mean(axis=(2, 3))).max() < 1e-5\n"
        "assert abs(total - dgamma).max() <= 1e-5 * abs(dgamma).max()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_run(
    readme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(2, 64, 9, 7)).astype("f4"))
    np.save("gamma.npy", np.ones(64, np.float32))
    np.save("beta.npy", np.zeros(64, np.float32))
    lines = [
        line
        for block in blocks(readme, "sh")
        for line in block.splitlines()
        if line.startswith("normgraph ")
    ]
    assert len(lines) >= 7
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr()
    with np.load("out.npz") as written:
        assert written["y"].shape == (2, 64, 9, 7)
        assert abs(written["y"].mean(axis=(2, 3))).max() < 1e-5
