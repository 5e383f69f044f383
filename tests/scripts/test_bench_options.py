"""Options of the bench commands that are refused, and files that cannot be written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph.errors import ArgumentError
from normgraph.scripts import (
    bench_call,
    bench_knobs,
    bench_pools,
    bench_random,
    bench_start,
    bench_sweep,
    bench_table,
)
from normgraph.scripts.argument_types import names_of, seconds, seconds_or_zero, whole, wholes
from normgraph.scripts.bench_threads import cores
from normgraph.scripts.outputs import check_outputs, write

COMMANDS = {
    "random": bench_random,
    "knobs": bench_knobs,
    "table": bench_table,
    "sweep": bench_sweep,
    "pools": bench_pools,
    "start": bench_start,
    "call": bench_call,
}
TIMED = ("random", "knobs", "table", "sweep", "pools")
ABOUT = {"processor": "a", "cores": 2, "system": "b", "python": "3", "load": 0.0, "nice": 0}

Run = Callable[[str], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The exit code of a command in an empty folder; nothing is timed."""

    def nothing(*arguments: Any, **options: Any) -> list[Any]:
        raise AssertionError("timed with a wrong option")

    for name in TIMED:
        monkeypatch.setattr(COMMANDS[name], "measure", nothing)
    monkeypatch.setattr(bench_pools, "launch_times", nothing)
    monkeypatch.setattr(bench_sweep, "_in_process", nothing)
    for name in ("random", "knobs", "table", "sweep", "pools"):
        monkeypatch.setattr(COMMANDS[name], "machine", lambda: ABOUT, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> int:
        name, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [f"bench_{name}", *arguments])
        try:
            main: Callable[[], int] = COMMANDS[name].main
            return main()
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *((f"{name} --rounds 0", "from 1; got '0'") for name in TIMED),
        *((f"{name} --rounds 2.5", "from 1; got '2.5'") for name in TIMED),
        *(
            (f"{name} --seconds {each}", f"above 0, 3600 at most; got '{each}'")
            for name in TIMED
            for each in ("0", "-1", "nan", "inf", "soon")
        ),
        *((f"{name} --out=", "got an empty text") for name in TIMED if name != "pools"),
        *((f"{name} --threads 0", "got '0'") for name in ("random", "sweep", "pools")),
        *((f"{name} --threads 9999", "got '9999'") for name in ("random", "sweep", "pools")),
        ("sweep --threads 1,", "with commas between; got '1,'"),
        ("random --seed -1", "from 0; got '-1'"),
        ("random --count 0", "from 1; got '0'"),
        ("random --count -3", "from 1; got '-3'"),
        ("random --only ,", "with commas between; got ','"),
        ("random --count 3 --only 7", "below --count, 3; got 7"),
        ("random --count 3 --only 0 --ops rms_norm", "no shape is left"),
        ("random --kinds forward,sideways", "forward, inference, backward; got 'sideways'"),
        ("random --ops polish", "got 'polish'"),
        ("random --json .", "a directory"),
        ("table --ops polish", "got 'polish'"),
        ("table --dtypes float32,int8", "got 'int8'"),
        ("table --kinds sideways", "got 'sideways'"),
        ("table --ops group_norm --dtypes float16", "no case is left"),
        ("table --quiet -1", "seconds from 0, 3600 at most; got '-1'"),
        ("table --quiet nan", "got 'nan'"),
        ("sweep --ops polish", "got 'polish'"),
        ("sweep --largest 1000", "from 1024; got '1000'"),
        ("knobs --knobs run_bytes,zeal", "got 'zeal'"),
        ("knobs --out times.json", "times.json for two"),
        ("start", "artifact"),
        ("start a --runs 0", "from 1; got '0'"),
        ("call", "ARTIFACT, SHAPE"),
        ("call a", "SHAPE"),
        ("call a 1,x", "got '1,x'"),
    ],
)
def test_what_is_refused(
    command: str, said: str, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said.lower() in err.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["random", "table", "sweep", "knobs"])
def test_a_file_that_cannot_be_written_is_found_first(
    command: str, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(f"{command} --out file/below") == 2
    assert "expected a file that can be written, got file/below" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_what_was_measured_is_printed_where_the_file_is_full(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_random, "measure", lambda *_, **__: [])
    assert run("random --count 1 --json /dev/full") == 2
    out, err = capsys.readouterr()
    read, _ = json.JSONDecoder().raw_decode(out)
    assert read["machine"] == ABOUT
    assert read["rows"] == []
    assert "0 rows" in out
    assert "error: /dev/full: No space left on device" in err


def test_what_the_commands_take(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def measure(draws: Any, **options: Any) -> list[Any]:
        asked.update(options, numbers=[each.number for each in draws])
        return []

    monkeypatch.setattr(bench_random, "measure", measure)
    assert run("random --count 9 --only 7,2 --seconds 1e-3 --threads 1 --json new/a.json") == 0
    assert (asked["numbers"], asked["seconds"], asked["threads"]) == ([2, 7], 1e-3, 1)
    assert asked["kinds"] == ("forward", "backward")
    read = json.loads((tmp_path / "new" / "a.json").read_text())
    assert read["settings"]["only"] == [7, 2]


def test_the_call_refuses_other_shapes(
    artifact: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in ("2,4", "2,5,6"):
        assert run(f"call {artifact} {shape}") == 2
        assert f"expected a shape that fits N,4,L, got {shape}" in capsys.readouterr().err
    assert run("call nowhere 1,2") == 3


def test_outputs(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "deep" / "new"
    old.write_text("kept")
    check_outputs(old, None, new, Path("/dev/null"), Path("/dev/null"))
    assert old.read_text() == "kept"
    assert new.parent.is_dir()
    assert not new.exists()
    assert write(new, "×") == 0
    assert new.read_text("utf-8") == "×"
    for wrong in (tmp_path, old / "below", tmp_path / ("n" * 300)):
        with pytest.raises(ArgumentError, match="expected a file that can be written"):
            check_outputs(wrong)
    with pytest.raises(ArgumentError, match="for two"):
        check_outputs(new, tmp_path / "deep" / ".." / "deep" / "new")


def test_the_bench_looks_at_its_plot_first(
    artifact: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = cli("bench", artifact, "--plot", tmp_path / "file" / "a.svg")
    assert (code, out) == (2, "")
    assert "expected a file that can be written" in err


def test_numbers_and_names() -> None:
    assert whole(1, cores())("1") == 1
    assert wholes(0)("3, 17,3") == (3, 17)
    assert names_of(("a", "b"))("b,a,b") == ("b", "a")
    assert (seconds("3600"), seconds_or_zero("0")) == (3600.0, 0.0)
    for parse, text in (
        (whole(1, 2), "3"), (whole(0), "9" * 5000), (wholes(0, 2), "1,3"), (seconds, "3601"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)
