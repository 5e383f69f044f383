"""Locks between processes: files that one of them holds at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(file: Path, wait: float | None = None) -> Iterator[bool]:
    """Hold the lock of `file`, which is made if need be. A process that dies gives it back.

    wait: seconds after which to go on without the lock; by default for as long as it takes. Gives
    whether the lock is held. Raises OSError where the file cannot be made or locked.
    """
    handle = _acquire(file, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _acquire(file: Path, wait: float | None) -> int | None:
    end = None if wait is None else time.monotonic() + wait
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if end is None else fcntl.LOCK_NB))
            if _is_still_there(file, handle):
                return handle
        except BlockingIOError:
            if end is not None and time.monotonic() >= end:
                os.close(handle)
                return None
            time.sleep(0.02)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_still_there(file: Path, handle: int) -> bool:
    """Whether the lock's file was not removed, or replaced, while it was waited for."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False
