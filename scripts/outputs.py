"""The files a long measurement writes: looked at before it, and never the end of what it found."""

from __future__ import annotations

import os
from pathlib import Path

from normgraph.errors import ArgumentError
from normgraph.scripts.console import log

# What a file that cannot be written is on the command line too.
_FAILED = 2


def check_outputs(*paths: Path | None) -> None:
    """Make the folders of these files, and open each; None is a file that is not wanted.

    Raises ArgumentError where one cannot be written, or two are the same. Devices and pipes are not
    opened: whoever reads from a pipe would see its end.
    """
    seen: list[Path] = []
    for path in paths:
        if path is None:
            continue
        try:
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
            if path.exists() and not (path.is_file() or path.is_dir()):
                continue
            there = os.path.lexists(path)
            path.open("ab").close()
            if not there:
                path.unlink()
        except OSError as error:
            raise ArgumentError(
                f"expected a file that can be written, got {path}: {error.strerror}. Name another"
            ) from error
        if path.resolve() in seen:
            raise ArgumentError(
                f"expected a file for each output, got {path} for two. Name another"
            )
        seen.append(path.resolve())


def write(path: Path, text: str) -> int:
    """Write the text, or print it where that fails; the exit code."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        log(f"error: {path}: {error.strerror}. What it would hold is printed")
        print(text)
        return _FAILED
    return 0
