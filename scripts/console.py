"""Printing for people: progress on stderr, tables on stdout, one place for both."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence


def log(message: str) -> None:
    """One line of progress or trouble, on stderr at once."""
    if sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)


class Progress:
    """A callable that logs each message with the seconds since the first one: `[ 1.2 s] ...`."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        log(f"[{time.monotonic() - self._start:5.1f} s] {self._prefix}{message}")


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Rows as left-aligned columns two spaces apart; numbers (int, float) are right-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    head = [list(headers)] if headers else []
    if not head + cells:
        return ""
    columns = range(len((head + cells)[0]))
    widths = [max(len(row[column]) for row in head + cells) for column in columns]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in columns
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if flush_right else cell.ljust(width)
            for cell, width, flush_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [line(row) for row in head]
    if head:
        lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines + [line(row) for row in cells])
