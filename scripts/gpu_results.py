"""The results of a GPU check on disk: what is done already, and the report of it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normgraph.scripts.console import log
from normgraph.scripts.gpu_jobs import COMPILED, TIME, Job
from normgraph.scripts.gpu_report import goals, markdown, row

JSON, TABLE = "gpu-check.json", "gpu-check.md"
# By task, who is timed beside ours.
_PEERS = {TIME: "eager", COMPILED: "compiled"}


class Results:
    """Outcomes by the jobs' keys, in a folder's gpu-check.json and gpu-check.md.

    about: the device, the versions and the pack. What is there is gone on with where it is of the
    same, else it is kept as the first free one of gpu-check-old-1.json, -2 and so on. known: all
    jobs, in the order of the report; asked: those this run is to do, all by default.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        known: Sequence[Job],
        asked: Sequence[Job] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        self._folder = folder
        self._about = dict(about)
        self._known = list(known)
        self._asked = list(known if asked is None else asked)
        self._limits: list[dict[str, Any]] = []
        self._done: dict[str, dict[str, Any]] = {}
        file = folder / JSON
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        found = _read(file)
        if anew or any(found.get(name) != value for name, value in self._about.items()):
            old = _free(folder)
            log(f"{file} is of another pack, device or version, or not wanted: kept as {old.name}")
            file.replace(old)
            return
        self._limits, self._done = found["limits"], found["done"]

    def __contains__(self, job: Job) -> bool:
        return job.key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def add_limits(self, limits: Mapping[str, Any]) -> None:
        """What the device can do in this run, which its rows are held to."""
        self._limits.append(dict(limits))

    def add(self, job: Job, outcome: Mapping[str, Any]) -> None:
        """Take an outcome in and write everything."""
        made = dict(outcome)
        if made.get("us"):
            made["limits"] = len(self._limits) - 1
        self._done[job.key] = made
        self.write()

    def forget_failed(self) -> None:
        """Have done again what gave no answer or an error, ran out of memory, or was not timed."""
        for job in self._known:
            if job in self and _failed(job, self._done[job.key]):
                del self._done[job.key]

    def spoiled(self, job: Job) -> Job | None:
        """A job that was lost in a kernel this one calls."""
        lost = {key for key, made in self._done.items() if "lost" in made}
        if not lost:
            return None
        found = (other for other in self._known if other.key in lost and other.spoils(job))
        return next(found, None)

    def report(self) -> dict[str, Any]:
        """Everything: what is known of the device, the rows and goals, and the outcomes as such."""
        numeric, failures, rows = [], [], []
        for job in self._known:
            outcome = self._done.get(job.key)
            if outcome is None:
                continue
            failures += outcome.get("failures", [])
            problem = outcome.get("lost") or outcome.get("error")
            if problem and job.task in (TIME, COMPILED):
                failures.append(f"{job.key}: {problem}")
            elif problem:
                numeric.append({"what": job.key, "passed": False, "detail": problem})
            elif outcome.get("numeric"):
                numeric.append(outcome["numeric"])
            if job.task == TIME and outcome.get("us"):
                beside = self._done.get(Job(COMPILED, *_rest(job)).key, {})
                limits = self._limits[outcome["limits"]]
                rows.append(row(job.case, job.about, outcome, beside, limits))
        return {
            **self._about,
            "limits": self._limits,
            "left": sum(job not in self for job in self._asked),
            "numeric": numeric,
            "goals": goals(rows),
            "rows": rows,
            "failures": failures,
            "done": self._done,
        }

    def write(self) -> None:
        """Both files, each whole at any time."""
        made = self.report()
        _replace(self._folder / JSON, json.dumps(made, indent=1) + "\n")
        _replace(self._folder / TABLE, markdown(made))


def _failed(job: Job, made: Mapping[str, Any]) -> bool:
    if "lost" in made or "error" in made:
        return True
    if job.task in _PEERS:
        us = made.get("us", {})
        return not {"ours", _PEERS[job.task]} <= us.keys() or bool(made.get("starved"))
    return "out of memory" in ((made.get("numeric") or {}).get("detail") or "").lower()


def _free(folder: Path) -> Path:
    names = (folder / f"gpu-check-old-{number}.json" for number in itertools.count(1))
    return next(each for each in names if not each.exists())


def _rest(job: Job) -> tuple[Any, ...]:
    return job.case, job.shape, job.about


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if {"limits", "done"} <= found.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
