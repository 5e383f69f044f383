"""Jobs of a GPU check by another process, which hangs and dies, and what is left on disk."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normgraph import NormSpec
from normgraph.errors import DeviceError
from normgraph.scripts import gpu_check, gpu_jobs, gpu_torch, gpu_worker
from normgraph.scripts.gpu_cases import KINDS, Case, cases
from normgraph.scripts.gpu_jobs import ACCURACY, BEHAVIOUR, COMPILED, TIME, Job
from normgraph.scripts.gpu_process import Late, Lost, Stuck, Worker
from normgraph.scripts.gpu_results import Results

# Answers as it is told to by its first argument, {request: answer}; others it gives back.
WORKER = """
import json, os, sys, time
told = json.loads(sys.argv[1])
print(json.dumps({"pid": os.getpid()}), flush=True)
for line in sys.stdin:
    what = told.get(line.strip(), line.strip())
    if what == "hang":
        time.sleep(600)
    if what == "die":
        os.kill(os.getpid(), 11)
    if what == "end":
        sys.exit(3)
    print(json.dumps(what), flush=True)
"""
ABOUT = {
    "device": {"name": "H", "arch": "sm_90", "processors": 1, "l2_bytes": 2**20, "driver": "13.0"},
    "versions": {"torch": "2"},
    "pack": None,
}
LIMITS = {"copy_bandwidth": 4e12, "launch_us": 2.0, "copies": {"copy": 4e12}}
ONE, OTHER = cases()[:2]


def worker_of(told: dict[str, Any]) -> Worker:
    return Worker([sys.executable, "-c", WORKER, json.dumps(told)])


def passed(what: str) -> dict[str, Any]:
    return {"numeric": {"what": what, "passed": True, "detail": ""}, "broken": False}


def took(microseconds: float) -> dict[str, Any]:
    us = {"ours": microseconds, "eager": 2 * microseconds, "copy": microseconds}
    return {"us": us, "captured": list(us), "starved": [], "failures": [], "broken": False}


def test_a_worker_that_hangs_is_killed_and_started_again() -> None:
    worker = worker_of({"a": {"b": 1}, "h": "hang", "d": "die", "e": "end"})
    first = worker.start()["pid"]
    assert worker.ask("a", 30) == {"b": 1}
    with pytest.raises(Lost, match="no answer within 0 s, and was killed"):
        worker.ask("h", 0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert worker.ask("a", 30) == {"b": 1}
    with pytest.raises(Lost, match="ended: signal 11"):
        worker.ask("d", 30)
    with pytest.raises(Lost, match="ended: exit code 3"):
        worker.ask("e", 30)
    assert worker.start()["pid"] != first
    worker.stop()
    worker.stop()


def test_a_worker_that_does_not_start_is_told() -> None:
    for code, limit, why in (
        ("raise SystemExit(5)", 30.0, "exit code 5"),
        ("import time; time.sleep(600)", 0.3, "no answer"),
    ):
        worker = Worker([sys.executable, "-c", code], limit)
        with pytest.raises(DeviceError, match=f"did not start: .*{why}"):
            worker.ask("a", 30)


def test_neither_a_start_nor_an_answer_takes_longer_than_all_may() -> None:
    worker = worker_of({"h": "hang"})
    worker.start()
    worker._until = time.monotonic() + 0.2
    with pytest.raises(Late):
        worker.ask("h", 60)
    assert not worker.is_running
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(Late):
        Worker(sleeping, until=time.monotonic() + 0.1).ask("a", 60)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are killed do not seem to end."""
    wait = subprocess.Popen.wait

    def hang(process: Any, timeout: float | None = None) -> int:
        wait(process)
        raise subprocess.TimeoutExpired("worker", timeout or 0.0)

    monkeypatch.setattr(subprocess.Popen, "wait", hang)


def test_a_job_whose_process_cannot_be_ended_is_lost(
    tmp_path: Path, stuck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_jobs._LIMITS, ACCURACY, 0.2)
    for what, job in zip(
        ("hang", {"error": "illegal address", "broken": True}),
        [Job(ACCURACY, ONE, ONE.shape, kind) for kind in ("forward", "inference")],
        strict=True,
    ):
        results = results_in(tmp_path)
        with pytest.raises(Stuck, match="did not end within 60 s of being killed"):
            work({job.key: what}, [job], results)
        assert "lost" in json.loads((tmp_path / "gpu-check.json").read_text())["done"][job.key]


def test_a_start_that_cannot_be_ended_is_not_of_a_job(tmp_path: Path, stuck: None) -> None:
    job = Job(ACCURACY, ONE, ONE.shape, "forward")
    results = results_in(tmp_path)
    worker = Worker([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    with pytest.raises(DeviceError, match=r"did not start: process .* did not end") as found:
        gpu_check.work(worker, [job], results, math.inf, lambda line: None)
    assert not isinstance(found.value, Stuck)
    assert job not in results


class Bench:
    """Gives what it is told, and breaks at one job."""

    def __init__(self, breaks_at: int) -> None:
        self._left = breaks_at

    def numeric(self, *_: Any) -> dict[str, Any]:
        self._left -= 1
        if self._left == 1:
            raise ValueError("x" * 1000)
        return {"what": "a", "passed": True, "detail": ""}

    def is_broken(self) -> bool:
        return self._left == 0

    def limits(self) -> dict[str, Any]:
        return LIMITS


def test_a_worker_stops_answering_on_a_broken_device() -> None:
    job = Job(ACCURACY, ONE, ONE.shape, "forward")
    answers: list[Any] = []
    bench: Any = Bench(3)
    requests = ["limits\n", *[f"{job.key}\n"] * 5]
    gpu_worker.serve(bench, {job.key: job}, requests, answers.append)
    assert answers[0] == {**LIMITS, "broken": False}
    assert answers[1] == passed("a")
    assert answers[2] == {"error": "ValueError: " + "x" * 500, "broken": False}
    assert answers[3]["broken"]
    assert len(answers) == 4


def results_in(folder: Path, **about: Any) -> Results:
    made = Results(folder, {**ABOUT, **about}, gpu_jobs.jobs())
    made.add_limits(LIMITS)
    return made


def work(
    told: dict[str, Any], listed: list[Job], results: Results, budget: float = 60.0
) -> tuple[list[Job], list[str]]:
    """What is left, and what was said."""
    said: list[str] = []
    worker = worker_of(told)
    worker.start()
    until = time.monotonic() + budget
    worker._until = until + gpu_check._GRACE_SECONDS
    try:
        return gpu_check.work(worker, listed, results, until, said.append), said
    finally:
        worker.stop()


def test_a_job_that_is_lost_costs_no_other_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_jobs._LIMITS, ACCURACY, 1.0)
    accuracy = [Job(ACCURACY, case, case.shape, kind) for case in (ONE, OTHER) for kind in KINDS]
    times = [Job(TIME, case, case.shape, kind) for case in (ONE, OTHER) for kind in KINDS]
    told: dict[str, Any] = {job.key: passed(job.key) for job in accuracy}
    told |= {job.key: took(300.0) for job in times}
    told[accuracy[0].key] = "hang"
    told[accuracy[4].key] = {"error": "RuntimeError: illegal address", "broken": True}
    results = results_in(tmp_path)
    left, _ = work(told, [*accuracy, *times], results)
    assert left == []
    assert "LOST: accuracy instance_norm" in capsys.readouterr().err
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    rows = [(each["operator"], each["kind"]) for each in report["rows"]]
    assert rows == [
        ("instance_norm", "inference"),
        ("batch_norm", "forward"),
        ("batch_norm", "backward"),
    ]
    done = report["done"]
    assert done[accuracy[0].key]["lost"] == "no answer within 1 s, and was killed"
    assert done[accuracy[2].key]["lost"] == f"left out, because of {accuracy[0].key}"
    assert "illegal address" in done[accuracy[4].key]["lost"]
    wrong = [each["what"] for each in report["numeric"] if not each["passed"]]
    assert wrong == [accuracy[0].key, accuracy[2].key, accuracy[4].key]
    assert f"- {times[0].key}: left out" in (tmp_path / "gpu-check.md").read_text()


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    listed = [Job(ACCURACY, ONE, ONE.shape, kind) for kind in KINDS]
    told: dict[str, Any] = {job.key: passed(job.key) for job in listed}
    told[listed[1].key] = "die"
    work(told, listed[:2], results_in(tmp_path))
    again = results_in(tmp_path)
    assert [job in again for job in listed] == [True, True, False]
    again.forget_failed()
    assert [job in again for job in listed] == [True, False, False]
    assert listed[0] not in results_in(tmp_path, pack={"digest": "b"})
    assert json.loads((tmp_path / "gpu-check-old-1.json").read_text())["left"] > 0


def test_a_retry_has_all_done_again_that_failed(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    wrong = {"what": "a", "passed": False, "detail": "dx 3"}
    memory = {**wrong, "detail": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
    whole, ours_alone = took(9.0), {**took(9.0), "us": {"ours": 9.0, "copy": 9.0}}
    outcomes: list[tuple[str, Any, bool]] = [
        (ACCURACY, passed("a"), True),
        (ACCURACY, {"numeric": None}, True),
        (ACCURACY, {"numeric": wrong}, True),
        (ACCURACY, {"numeric": memory}, False),
        (ACCURACY, {"error": "KeyError: 'a'"}, False),
        (TIME, whole, True),
        (TIME, {"us": {}, "failures": ["ours: RuntimeError"]}, False),
        (TIME, ours_alone, False),
        (TIME, {**whole, "starved": ["eager"]}, False),
        (COMPILED, whole, False),
        (COMPILED, {**whole, "us": {"ours": 9.0, "compiled": 8.0}}, True),
    ]
    listed = {task: [j for j in gpu_jobs.jobs() if j.task == task] for task, *_ in outcomes}
    done = [(listed[task].pop(), made, kept) for task, made, kept in outcomes]
    for job, made, _ in done:
        results.add(job, made)
    results.forget_failed()
    assert [job in results for job, *_ in done] == [kept for *_, kept in done]


def test_results_that_cannot_be_read_are_put_aside(tmp_path: Path) -> None:
    for number, text in enumerate(("{", "[]", '{"done": {}}'), 1):
        (tmp_path / "gpu-check.json").write_text(text)
        assert len(results_in(tmp_path)) == 0
        assert (tmp_path / f"gpu-check-old-{number}.json").read_text() == text
        assert not (tmp_path / "gpu-check.json").exists()


def test_a_budget_ends_it_and_nothing_half_done_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [Job(ACCURACY, ONE, ONE.shape, kind) for kind in KINDS]
    told = {listed[0].key: passed("a"), listed[1].key: "hang"}
    monkeypatch.setitem(gpu_jobs._USUAL, ACCURACY, 0.0)
    monkeypatch.setattr(gpu_check, "_GRACE_SECONDS", 0.1)
    results = results_in(tmp_path)
    left, _ = work(told, listed, results, budget=1.0)
    assert left == listed[1:]
    assert [job in results for job in listed] == [True, False, False]
    monkeypatch.setitem(gpu_jobs._USUAL, ACCURACY, 2.0)
    left, said = work(told, listed[1:], results, budget=1.0)
    assert left == listed[1:]
    assert said == []
    not_started = worker_of(told)
    until = time.monotonic() + 10.0
    assert gpu_check.work(not_started, listed[:1], results, until, said.append) == listed[:1]
    assert not not_started.is_running


def test_compiled_is_held_against_ours_beside_it(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    job = Job(TIME, ONE, ONE.shape, "forward")
    results.add(job, took(100.0))
    us = {"ours": 110.0, "compiled": 99.0, "copy": 90.0}
    beside = {"us": us, "captured": list(us), "failures": []}
    results.add(Job(COMPILED, ONE, ONE.shape, "forward"), beside)
    (row,) = results.report()["rows"]
    assert row["ahead"]["compiled"] == pytest.approx(0.9)
    assert row["ahead"]["eager"] == pytest.approx(2.0)
    results.add_limits({**LIMITS, "copy_bandwidth": 2e12})
    results.add(Job(TIME, OTHER, OTHER.shape, "forward"), took(100.0))
    one, other = results.report()["rows"]
    assert one["share_of_copy"] == pytest.approx(other["share_of_copy"] / 2)


# The real worker on kernels for the CPU, its CUDA device the host.
ON_HOST = """
import sys
from types import SimpleNamespace
import torch, torch_on_host
from normgraph import NormSpec
from normgraph.scripts import gpu_jobs, gpu_timing, gpu_worker
from normgraph.scripts.gpu_cases import Case
gpu_timing._WARM_SECONDS, gpu_timing._MOST_CALLS, gpu_worker._COPY_BYTES = 0.0, 2, 4096
host = torch_on_host.TorchOnHost(torch)
gpu_worker.importlib = SimpleNamespace(import_module=lambda name: host)
gpu_worker.Bench = torch_on_host.HostBench
case = Case(NormSpec("batch_norm"), (4, 6, 3, 5), "float32")
gpu_jobs.BEHAVED = (gpu_jobs.identity(case),)
gpu_worker.jobs = lambda: gpu_jobs.jobs([case])
sys.exit(gpu_worker.main())
"""


def test_all_jobs_of_a_case_from_the_command_to_the_table(
    tmp_path: Path,
    driver: Any,
    build_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    case = Case(NormSpec("batch_norm"), (4, 6, 3, 5), "float32")
    monkeypatch.setattr(gpu_jobs, "BEHAVED", ((case.spec.op, case.shape, case.dtype),))
    listed = [job for job in gpu_jobs.jobs([case]) if job.shape[-1] < 100]
    (tmp_path / "artifacts").mkdir()
    built = build_artifact(case.spec, case.declared, "float32", KINDS)
    (tmp_path / "artifacts" / case.name).symlink_to(built)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # the names of jobs hold "×"
    command = [sys.executable, "-c", ON_HOST, "--folder", str(tmp_path / "artifacts")]
    monkeypatch.setattr(gpu_check, "command_of", lambda folder: command)
    monkeypatch.setattr(gpu_torch, "usable", lambda: None)
    monkeypatch.setattr(gpu_check, "jobs", lambda chosen=None: listed)
    monkeypatch.setattr(gpu_check, "cases", lambda: [case])
    arguments = ["gpu_check", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--accuracy"])
    # No array is on a device here, and a bound call is not captured.
    assert gpu_check.main() == 1
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert report["rows"] == []
    assert report["left"] == 0
    assert "Not finished" not in (tmp_path / "out" / "gpu-check.md").read_text()
    monkeypatch.setattr("sys.argv", [*arguments, "--budget", "500"])
    assert gpu_check.main() == 1
    said = capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert report["left"] == 0
    assert [each["kind"] for each in report["rows"]] == list(KINDS)
    assert all(set(each["ahead"]) == {"eager", "compiled"} for each in report["rows"])
    wrong = {each["what"].partition(": ")[2] for each in report["numeric"] if not each["passed"]}
    assert wrong <= {
        "a stream of one's own",
        "bound, on a stream of one's own and captured",
        "an array on the CPU is refused",
        "an array that was bound and resized is refused",
    }, report["numeric"]
    counts = [int(line.split("; ")[1].split()[0]) for line in said.splitlines() if "jobs; " in line]
    of_accuracy = sum(job.task in (ACCURACY, BEHAVIOUR) for job in listed)
    assert counts == [0, of_accuracy]
    assert len(report["done"]) == len(listed)
    assert "copy on the device" in (tmp_path / "out" / "gpu-check.md").read_text()


def test_what_was_not_packed_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[Job]] = []

    def check(options: Any, asked: list[Job], known: list[Job], progress: Any) -> int:
        seen.extend([asked, known])
        return 0

    monkeypatch.setattr(gpu_check, "check", check)
    (tmp_path / "pack.json").write_text(json.dumps({"names": [ONE.name, OTHER.name]}))
    arguments = ["gpu_check", "--folder", str(tmp_path), "--only"]
    monkeypatch.setattr("sys.argv", [*arguments, "batch_norm"])
    assert gpu_check.main() == 0
    asked, known = seen
    assert {job.case.name for job in asked} == {OTHER.name}
    assert {job.case.name for job in known} == {ONE.name, OTHER.name}
    monkeypatch.setattr("sys.argv", [*arguments, "rms_norm"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "that was packed, not 'rms_norm'" in capsys.readouterr().err
