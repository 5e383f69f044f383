"""Check and time the kernels on this machine's GPU: `./gpu_check` in a folder that was packed.

Every operator and kind is held to float64, at its benchmark's shapes and at awkward ones, and timed
against PyTorch eager, torch.compile and the copy bandwidth of the device, the most telling first.
Writes gpu-check.json and gpu-check.md after each step. Run again it goes on where it stopped. What
hangs or breaks the device costs that case alone: another process does the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from normgraph import cuda
from normgraph.errors import DeviceError, NormGraphError
from normgraph.scripts import gpu_torch
from normgraph.scripts.console import Progress, log
from normgraph.scripts.explain import explain
from normgraph.scripts.gpu_cases import ARCHIVE, cases
from normgraph.scripts.gpu_jobs import ACCURACY, BEHAVIOUR, COMPILED, TIME, Job, jobs
from normgraph.scripts.gpu_process import Late, Lost, Stuck, Worker
from normgraph.scripts.gpu_results import TABLE, Results

_LIMITS, _LIMITS_SECONDS = "limits", 120.0
# What has begun may take this much more than the budget.
_GRACE_SECONDS = 15.0
# What a start of the worker usually takes.
_START_SECONDS = 15.0


def main() -> int:
    """Pack, or check and time."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--pack", action="store_true", help="write the folder to be carried")
    parser.add_argument("--out", type=Path, help="the folder; or where the results go")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="that was packed")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
    parser.add_argument("--brief", action="store_true", help="without torch.compile")
    parser.add_argument("--accuracy", action="store_true", help="do not time anything")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end by then")
    parser.add_argument("--anew", action="store_true", help="do not go on with earlier results")
    parser.add_argument("--retry", action="store_true", help="do again what hung, died or failed")
    options = parser.parse_args()
    chosen = [each for each in cases() if options.only in each.name]
    if not chosen:
        parser.error(f"expected --only to leave a case; none has {options.only!r} in its name")
    if options.budget is not None and not options.budget > 0:
        parser.error(f"expected --budget to be more than 0 seconds, not {options.budget:g}")
    progress = Progress()
    try:
        if options.pack:
            from normgraph.scripts.gpu_pack import pack

            out = options.out or Path("build/gpu-check")
            print(pack(out, options.folder, chosen=chosen, progress=progress))
            return 0
        packed = _pack_of(options.folder)
        there = [each for each in cases() if packed is None or each.name in packed["names"]]
        chosen = [each for each in there if each in chosen]
        if not chosen:
            parser.error(f"expected --only to leave a case that was packed, not {options.only!r}")
        return check(options, jobs(chosen), jobs(there), progress)
    except (NormGraphError, OSError) as error:
        message, code = explain(error)
        log(message)
        return code


def check(
    options: Any, asked: Sequence[Job], known: Sequence[Job], progress: Callable[[str], None]
) -> int:
    """Do the jobs that are left of those asked and write after each; 1 where a result is wrong.

    known: all that can be done.

    Raises DeviceError without a device, or where it can no longer be used; ToolMissing without
    PyTorch for CUDA.
    """
    until = time.monotonic() + (options.budget or float("inf"))
    found = cuda.state()
    if found.problem:
        raise DeviceError(f"gpu_check needs a CUDA device, and {found.problem}.")
    gpu_torch.usable()
    command = command_of(unpacked(options.folder))
    worker = Worker(command, until=until + _GRACE_SECONDS)
    tasks = {ACCURACY, BEHAVIOUR} if options.accuracy else {ACCURACY, BEHAVIOUR, TIME, COMPILED}
    tasks -= {COMPILED} if options.brief else set()
    try:
        about = {**_started(worker), "pack": _pack_of(options.folder)}
        wanted = [job for job in asked if job.task in tasks]
        results = Results(options.out or Path.cwd(), about, known, wanted, anew=options.anew)
        if options.retry:
            results.forget_failed()
        left = [job for job in wanted if job not in results]
        progress(f"{len(left)} jobs; {len(results)} were done before")
        try:
            if any(job.task in (TIME, COMPILED) for job in left):
                results.add_limits(_limits(worker))
            left = work(worker, left, results, until, progress)
        except Late:  # in the limits: nothing else was begun
            pass
    finally:
        worker.stop()
    results.write()
    return _summary(results.report(), len(left), options.out or Path.cwd())


def work(
    worker: Worker,
    left: Sequence[Job],
    results: Results,
    until: float,
    progress: Callable[[str], None],
) -> list[Job]:
    """Do the jobs until that moment (of time.monotonic); those that are left.

    Raises DeviceError where the worker cannot be started, or ended; a job it was at counts as lost.
    """
    for number, job in enumerate(left):
        usual = job.usual + (0.0 if worker.is_running else _START_SECONDS)
        if until - time.monotonic() < usual:
            return list(left[number:])
        progress(f"{number + 1}/{len(left)} {job.key}")
        spoiler = results.spoiled(job)
        if spoiler is not None:
            results.add(job, {"lost": f"left out, because of {spoiler.key}"})
            continue
        try:
            outcome = worker.ask(job.key, job.limit)
        except Late:
            return list(left[number:])
        except Lost as error:
            outcome = {"lost": str(error)}
        except Stuck as error:  # or the next run would begin with the same
            results.add(job, {"lost": str(error)})
            raise
        broken = outcome.pop("broken", False)
        if broken:
            told = outcome.get("error") or (outcome.get("numeric") or {}).get("detail")
            told = told or "; ".join(outcome.get("failures", []))
            outcome = {"lost": f"the device refused everything after it: {told}"}
        if "lost" in outcome:
            log(f"LOST: {job.key}: {outcome['lost']}")
        results.add(job, outcome)
        if broken:
            worker.stop()
    return []


def _started(worker: Worker) -> dict[str, Any]:
    try:
        return worker.start()
    except Late:
        raise DeviceError(
            "gpu_check's worker was not ready when the budget ended: give --budget more seconds."
        ) from None


def _limits(worker: Worker) -> dict[str, Any]:
    try:
        made = worker.ask(_LIMITS, _LIMITS_SECONDS)
    except Lost as error:
        made = {"error": str(error)}
    if "error" in made or made.pop("broken"):
        raise DeviceError(f"the device's copies could not be timed: {made.get('error', 'broken')}.")
    return made


def _summary(report: dict[str, Any], left: int, out: Path) -> int:
    """Say the most important of it; the exit code."""
    wrong = [each for each in report["numeric"] if not each["passed"]]
    for each in wrong:
        log(f"WRONG: {each['what']}: {each['detail']}")
    for each in report["goals"]:
        missed = f"; most: {each['missed'][0]}" if each["missed"] else ""
        log(f"{each['met']} of {each['rows']} met: {each['goal']}{missed}")
    if left:
        log(f"{left} jobs are left: run it again to go on.")
    print(out / TABLE)
    return 1 if wrong else 0


def command_of(artifacts: Path) -> list[str]:
    """What starts a worker on the artifacts of a folder."""
    return [sys.executable, "-m", "normgraph.scripts.gpu_worker", "--folder", str(artifacts)]


def _pack_of(folder: Path) -> Any:
    file = folder / "pack.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def unpacked(folder: Path) -> Path:
    """The artifacts in a folder that was packed, unpacked the first time.

    They carry the pack's digest: a folder may be copied over another. Without a pack.json they are
    what is there.
    """
    about = _pack_of(folder)
    if about is None:
        return folder / "artifacts"
    target = folder / f"artifacts-{about['digest']}"
    part = target.with_name(f"{target.name}.part")
    if not target.exists():
        for stale in folder.glob("artifacts-*"):
            shutil.rmtree(stale)
        checked: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(part, **checked)
        (part / "artifacts").rename(target)
        part.rmdir()
    return target


if __name__ == "__main__":
    sys.exit(main())
