"""A process that does the jobs of a GPU check, and may hang or die at any of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from normgraph.errors import DeviceError

# A process with a kernel that hangs is gone when the driver has taken it off the device.
_KILL_SECONDS, _LEAST_KILL_SECONDS = 60.0, 5.0


class Lost(Exception):
    """A worker gave no answer: it hung and was killed, or it died; the text says which."""


class Late(Exception):
    """The moment by which all has to be done came before the answer; the process was killed."""


class Stuck(DeviceError):
    """A process that was asked something did not end when it was killed."""


class Worker:
    """Started when it is first asked, and again after it was lost.

    command: reads a request a line, and answers each with a line of JSON, after a first one when it
    is ready. until: a moment of time.monotonic() by which starts and answers have come, or are
    given up.
    """

    def __init__(
        self, command: Sequence[str], start_limit: float = 240.0, until: float = float("inf")
    ) -> None:
        self._command = list(command)
        self._start_limit = start_limit
        self._until = until
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    @property
    def is_running(self) -> bool:
        """Whether it can be asked without a start."""
        return self._process is not None

    def start(self) -> dict[str, Any]:
        """A new process, in place of the one before; its first line. Raises DeviceError; Late."""
        self.stop()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, bufsize=0)
        self._read = b""
        try:
            return self._answer(self._start_limit)
        except (Lost, Stuck) as error:
            why = str(error).rstrip(".")
            raise DeviceError(
                f"gpu_check's worker did not start: {why}. What it printed is above; run it"
                " again, and nothing that was measured is done twice."
            ) from None

    def ask(self, request: str, limit: float) -> dict[str, Any]:
        """The answer to one request.

        Raises Lost after so many seconds, Late where it had less, Stuck where the process cannot be
        ended then; DeviceError as `start`.
        """
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
        except OSError:
            self._read = b""
        return self._answer(limit)

    def stop(self) -> None:
        """End the process. Raises Stuck where it cannot be ended."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        limit = min(_KILL_SECONDS, max(self._until - time.monotonic(), _LEAST_KILL_SECONDS))
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Stuck(
                f"process {process.pid} hangs in the CUDA driver and did not end within"
                f" {limit:.0f} s of being killed: if it is still there, the device has to be reset"
                " before anything else runs on it."
            ) from None

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        until = min(time.monotonic() + limit, self._until)
        while b"\n" not in self._read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.stop()
                if until == self._until:
                    raise Late
                raise Lost(f"no answer within {limit:.0f} s, and was killed")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                process = self._process
                self.stop()
                raise Lost(f"its process ended: {_end_of(process.returncode)}")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end_of(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
