"""What every command has in common: help, exit codes of wrong usage, interrupts, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.scripts import cli_doctor

COMMANDS = ("export", "compile", "verify", "run", "bench", "inspect", "targets", "doctor")


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version") == (0, f"normgraph {ng.__version__}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, cli: Callable[..., Any]) -> None:
    code, out, err = cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: normgraph {command}".rstrip())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "COMMAND"),
        ("polish", "polish"),
        ("doctor --jsn", "--jsn"),
        ("export", "--shape"),
        ("export instance_nrom --shape N,4,L -o o", "instance_nrom"),
        ("export instance_norm --shape N,4;L -o o", "4;L"),
        ("export instance_norm --shape N,,L -o o", "N,64,H,W"),
        ("export instance_norm --shape N,-4,L -o o", "-4"),
        ("export instance_norm --shape N,4,L -o o --dtype int8", "int8"),
        ("export instance_norm --shape N,4,L -o o --eps tiny", "tiny"),
        ("export instance_norm --shape N,4,L -o o --correction 2", "2"),
        ("export instance_norm --shape N,4,L -o o --kinds forward,", "forward,"),
        ("export instance_norm --shape N,4,L -o o --groups 2", "groups"),
        ("export instance_norm --shape N,4,L -o o --kinds sideways", "sideways"),
        ("export group_norm --shape N,4,L -o o", "groups"),
        ("export group_norm --shape N,4,L -o o --groups 3", "3"),
        ("export rms_norm --shape N,4 -o o --eps -1", "-1"),
        ("export layer_norm --shape N,L -o o", "L"),
        ("compile g -o o --target z80", "z80"),
        ("verify a --shape N,4,5", "N,4,5"),
        ("bench a --shape 1.5", "1.5"),
        ("bench a --plot times.txt", "times.txt"),
        ("run a", "KIND"),
        ("export instance_norm --shape N,99999999999999999999 -o o", "2^63"),
        (f"export instance_norm --shape N,{'9' * 5000},L -o o", "2^63"),
        ("export batch_norm --shape N,4,L -o o --momentum nan", "nan"),
        ("export batch_norm --shape N,4,L -o o --eps inf", "inf"),
        ("export batch_norm --shape N,4,L --out=", "an empty text"),
        ("compile g --out=", "an empty text"),
        ("run a forward --out=", "an empty text"),
        ("verify a --seed -1", "-1"),
        ("run a forward -o out.txt", "out.txt"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: str,
    named: str,
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ng.graphs.export(ng.NormSpec("rms_norm"), shape=("N", 4), out="g")
    code, out, err = cli(*arguments.split())
    assert (code, out) == (2, "")
    assert named in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_a_traceback_is_shown_on_demand(cli: Callable[..., Any], tmp_path: Path) -> None:
    for arguments in (("--debug", "inspect", "nowhere"), ("inspect", "nowhere", "--debug")):
        code, _, err = cli(*arguments)
        assert code == 3
        assert "Traceback" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("of the program"), 70, "internal error"),
        (MemoryError("of 9 TiB"), 2, "not enough memory: of 9 TiB"),
        (PermissionError(13, "Permission denied", "there"), 2, "there: Permission denied"),
        (ModuleNotFoundError("no", name="onnxruntime.capi"), 6, "normgraph[verify]"),
    ],
)
def test_other_endings(
    error: BaseException,
    code: int,
    message: str,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(cli_doctor, "doctor", fail)
    outcome = cli("doctor")
    assert outcome.code == code
    assert outcome.out == ""
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_the_reader_of_stdout_may_go_away() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "normgraph", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_a_reader_that_goes_away_before_help_does() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "normgraph", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_stdout() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m normgraph targets >&-', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupt_while_modules_are_imported() -> None:
    code = (
        "import sys; from normgraph.__main__ import main\n"
        "class Stop:\n"
        "    def find_spec(self, *_): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop()); sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "normgraph: interrupted\n")


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("onnx", "compile", ("export", "instance_norm", "--shape", "N,4,L", "-o", "graphs")),
        ("tvm", "compile", ("compile", "graphs", "-o", "out")),
    ],
)
def test_a_missing_extra_is_named(
    module: str, extra: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    ng.graphs.export(ng.NormSpec("rms_norm"), shape=("N", 4), out=tmp_path / "graphs")
    code = (
        "import sys; sys.modules[sys.argv[1]] = None; from normgraph.__main__ import main;"
        "sys.exit(main(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, module, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert f"normgraph[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr
