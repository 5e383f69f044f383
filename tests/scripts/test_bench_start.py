"""What loading an artifact adds to a process, and the bench that says it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph.scripts import bench_start
from normgraph.scripts.bench_start import MOST_BYTES, MOST_SECONDS, STEPS, Start, report


def test_a_start_is_light(artifact: Path) -> None:
    """Processor time, of which a busy machine takes little more, and four times what is allowed."""
    starts = [bench_start.start(artifact, bench_start.sizes_of(("N", 4, "L"))) for _ in range(3)]
    assert min(sum(one.processor[1:]) for one in starts) < 4 * MOST_SECONDS
    assert min(sum(one.memory[1:]) for one in starts) < MOST_BYTES
    for one in starts:
        assert min(one.wall) > 0.0
        assert "normgraph.runtime.operator" in one.modules
        tops = {name.partition(".")[0] for name in one.modules}
        assert tops <= {"normgraph", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("seconds", "size", "verdict"),
    [
        (0.039, 14 << 20, "within 40 ms and 15 MB"),
        (0.041, 14 << 20, "more than 40 ms and 15 MB"),
        (0.039, 16 << 20, "more than 40 ms and 15 MB"),
    ],
)
def test_the_verdict(seconds: float, size: int, verdict: str) -> None:
    """The median of the runs; the first step, which others make as well, is left out."""
    one = Start((9.0, seconds / 2, seconds / 2, 0.0), (0.0,) * 4, (1 << 30, size, 0, 0), ())
    slow = Start((9.0, 1.0, 1.0, 1.0), (0.0,) * 4, (1 << 30, 1 << 30, 0, 0), ())
    lines = report([one, slow, one]).splitlines()
    assert lines[-1] == verdict
    assert [line.startswith(step) for line, step in zip(lines[2:6], STEPS, strict=True)] == [
        True
    ] * 4
    assert lines[6].split()[-2:] == [f"{1e3 * seconds:.1f}", f"{size >> 20}.00"]


def test_the_command(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Callable[..., Any] = bench_start.main
    monkeypatch.setattr(sys, "argv", ["bench_start", str(artifact), "--runs", "1"])
    assert run() == 0
    assert "first call" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_start", str(artifact / "none")])
    assert run() == 3
