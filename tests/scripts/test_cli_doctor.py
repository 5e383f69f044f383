"""doctor, and the printing that all commands share."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from typing import Any

import pytest

import normgraph as ng
from normgraph.cpu import levels
from normgraph.runtime.library import VARIABLE
from normgraph.scripts.console import Progress, log, table


def test_doctor(cli: Callable[..., Any]) -> None:
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    for part in (platform.python_version(), platform.machine(), ng.__version__, "apache-tvm"):
        assert part in out


def test_doctor_says_which_levels_run_and_which_library_is_asked_for(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    found = {each["name"]: each["found"] for each in json.loads(cli("doctor", "--json").out)}
    assert found["targets"] == ", ".join(levels())
    assert found[VARIABLE] == "not set: the best library is loaded"
    monkeypatch.setenv(VARIABLE, "x86-64-v3")
    found = {each["name"]: each["found"] for each in json.loads(cli("doctor", "--json").out)}
    assert found[VARIABLE] == "x86-64-v3"


def test_doctor_as_json(cli: Callable[..., Any]) -> None:
    found = json.loads(cli("doctor", "--json").out)
    extras = {each["topic"] for each in found if each["topic"].startswith("extra ")}
    assert extras == {f"extra {name}" for name in ("compile", "verify", "torch", "cuda", "plot")}
    assert {each["status"] for each in found} <= {"ok", "missing"}
    assert all(each["advice"] for each in found if each["status"] == "missing")


def test_doctor_says_what_to_do_where_the_cpu_cannot_be_told(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normgraph.cpu.cpu_flags", frozenset)
    found = {each["name"]: each for each in json.loads(cli("doctor", "--json").out)}
    assert found["cpu"]["status"] == "unknown"
    assert "/proc/" in found["cpu"]["advice"]


def test_doctor_says_what_to_do_about_a_missing_compiler(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    code, out, _ = cli("doctor")
    assert code == 0
    assert "needed for compiling: install one of cc, gcc, clang" in out


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert table([("a", 1), ("bcd", 10)], ("name", "n")) == (
        "name   n\n----  --\na      1\nbcd   10"
    )
    assert table([]) == ""
    assert table([], ("name",)) == "name\n----"


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("step ")("one")
    log("two")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("s] step one\ntwo\n")
