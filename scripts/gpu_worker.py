"""The process that does the jobs of a GPU check: names of jobs on stdin, JSON on stdout.

It ends after an error that leaves the device unusable for a process, and with its parent.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from normgraph import cuda
from normgraph.scripts.gpu_jobs import Job, jobs
from normgraph.scripts.gpu_run import Bench

# The request for what the device can do.
LIMITS = "limits"
# The copy whose bandwidth is the measure.
_COPY_BYTES = 512 * 2**20
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def main() -> int:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(prog="gpu_worker", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the artifacts")
    options = parser.parse_args()
    # Killed with the parent, even where a kernel hangs: what remained would be timed as well.
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    torch: Any = importlib.import_module("torch")
    bench = Bench(torch, options.folder, _COPY_BYTES)
    with torch.cuda.stream(torch.cuda.Stream()):
        answer = _line_writer(answers)
        answer(bench.about(cuda.state()))
        # Keys hold "×", whatever the locale's encoding.
        with open(0, encoding="utf-8", closefd=False) as requests:
            serve(bench, {job.key: job for job in jobs()}, requests, answer)
    answers.flush()
    os._exit(0)  # nothing is to be taken apart on a device that may be broken


def _line_writer(stream: Any) -> Callable[[Mapping[str, Any]], None]:
    def write(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=stream, flush=True)

    return write


def serve(
    bench: Bench,
    known: Mapping[str, Job],
    requests: Iterable[str],
    answer: Callable[[Mapping[str, Any]], None],
) -> None:
    """Answer requests, each with what the job gave, or with error and the text of what it raised.

    broken: the device refuses everything since; no request is answered after that.
    """
    for line in requests:
        request = line.rstrip("\n")
        made: dict[str, Any]
        try:
            made = bench.limits() if request == LIMITS else known[request].perform(bench)
        except Exception as error:  # the process goes on, and the others still count
            made = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        broken = bench.is_broken()
        answer({**made, "broken": broken})
        if broken:
            return


if __name__ == "__main__":
    sys.exit(main())
