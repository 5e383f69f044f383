"""The whole street on photographs: export, compile, verify, forward, backward, picture, tables.

x is a batch of two photographs, each in four exposures, (8, 3, 427, 640) float32. For every
operator: its graphs are exported, compiled and verified, and forward and backward run on the batch.
InstanceNorm takes as gamma and beta the contrast and the colour of the photographs as taken, so its
y is a picture again: the four exposures come out as one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph
from normgraph import NormSpec
from normgraph.errors import AccuracyError, NormGraphError
from normgraph.scripts import demo_pictures
from normgraph.scripts.bench import bench
from normgraph.scripts.bench_report import BenchReport
from normgraph.scripts.bench_roster import BRIEF
from normgraph.scripts.console import Progress, log, table
from normgraph.scripts.explain import explain
from normgraph.scripts.verify import verify, verify_data
from normgraph.scripts.verify_report import Report

Array = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """One operator of the demo: its spec, and x's shape, with names where any size fits."""

    spec: NormSpec
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Result:
    """What the demo found for one operator."""

    job: Job
    random: Report
    photographs: Report
    speed: BenchReport
    y: Array
    loss: float


def jobs(width: int) -> tuple[Job, ...]:
    """The two main operators first. Layer and RMS norm normalise each line of a picture."""
    picture, lines = ("N", 3, "H", "W"), ("N", 3, "H", width)
    return (
        Job(NormSpec("instance_norm"), picture),
        Job(NormSpec("batch_norm"), picture),
        Job(NormSpec("group_norm", groups=1), picture),
        Job(NormSpec("layer_norm"), lines),
        Job(NormSpec("rms_norm"), lines),
    )


def run_job(
    job: Job,
    x: Array,
    parameters: dict[str, Array],
    out: Path,
    rounds: int,
    progress: Callable[[str], None],
) -> Result:
    """Export, compile, verify, forward, backward and time one operator on the batch x.

    The loss is half the mean square of what y has above 0.8: dy = max(y - 0.8, 0).
    """
    op = job.spec.op
    folder = out / op

    def say(step: str) -> None:
        progress(f"{op}: {step}")

    say("export")
    normgraph.graphs.export(job.spec, shape=job.shape, out=folder / "graphs")
    path = normgraph.compile.build(
        folder / "graphs",
        target="cpu",
        out=folder / "cpu",
        progress=lambda step: say(f"compile: {step}"),
    )
    random = verify(path, progress=lambda step: progress(f"verify {step}"))
    operator = normgraph.load(path)
    say("forward and backward on the photographs")
    y, dy = forward_and_gradient(operator, x, parameters)
    loss = 0.5 * float(np.mean(dy.astype(np.float64) ** 2))
    photographs = verify_data(path, {"x": x, "dy": dy, **parameters}, "photographs")
    say("timing")
    speed = bench(
        path, x.shape, kinds=("forward", "backward"), rounds=rounds, extras=BRIEF, overheads=False
    )
    for name, each in (("verify", random), ("photographs", photographs), ("bench", speed)):
        (folder / f"{name}.txt").write_text(each.to_text() + "\n")
        (folder / f"{name}.json").write_text(each.to_json() + "\n")
    return Result(job, random, photographs, speed, y, loss)


def forward_and_gradient(
    operator: Any, x: Array, parameters: dict[str, Array]
) -> tuple[Array, Array]:
    """y, and dy of the loss; the backward runs on them and its gradients must be finite."""
    spec: NormSpec = operator.spec
    given = _parameters(spec, x, parameters)
    running = (
        (np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32))
        if spec.track_running_stats
        else ()
    )
    found = operator.forward(x, *given, *running)
    saved = (found.inv_std,) if spec.op == "rms_norm" else (found.mean, found.inv_std)
    dy = np.maximum(found.y - np.float32(0.8), np.float32(0.0))
    gradients = operator.backward(dy, x, given[0], *saved)
    for name, gradient in zip(gradients._fields, gradients, strict=True):
        if not np.isfinite(gradient).all():
            raise AccuracyError(f"{spec.op}: {name} on the photographs is not finite")
    return found.y, dy


def _parameters(spec: NormSpec, x: Array, parameters: dict[str, Array]) -> list[Array]:
    """gamma and beta: the given ones where there is one a channel, else ones and zeros."""
    if spec.normalized_ndim is None:
        return [parameters["gamma"], parameters["beta"]]
    shape = x.shape[x.ndim - spec.normalized_ndim :]
    ones, zeros = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    return [ones, zeros] if spec.bias else [ones]


def colours(pictures: Array) -> dict[str, Array]:
    """gamma and beta that give y the contrast and the colour of the pictures, one a channel."""
    return {
        "gamma": pictures.std(axis=(2, 3)).mean(axis=0).astype(np.float32),
        "beta": pictures.mean(axis=(0, 2, 3)).astype(np.float32),
    }


def accuracy_table(results: Sequence[Result]) -> str:
    """One line an output: its error on the photographs, ours and onnxruntime's, and the verdict."""
    rows = []
    for result in results:
        outputs = dict.fromkeys((row.kind, row.output) for row in result.photographs.rows)
        for kind, output in outputs:
            own = result.photographs.worst(kind, output)
            other = result.photographs.worst(kind, output, "onnxruntime")
            if own is None or own.max_rel is None:
                continue
            rows.append(
                (
                    result.job.spec.op,
                    kind,
                    output,
                    _short(own.max_rel),
                    _short(None if other is None else other.max_rel),
                    "" if own.ulp is None else f"{own.ulp:.2g}",
                    _short(own.relative_tolerance),
                    own.status,
                )
            )
    headers = ("operator", "kind", "output", "ours", "onnxruntime", "ulp", "allowed", "")
    return table(rows, headers)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def speed_table(results: Sequence[Result]) -> str:
    """One line a kind: median milliseconds of each peer."""
    peers = (
        ("normgraph", "given"),
        ("normgraph", "cold"),
        ("onnxruntime", "given"),
        ("torch eager", "warm"),
        ("torch eager", "cold"),
    )
    limits = ("copy of one array", "add of two arrays")
    rows = []
    for result in results:
        for kind in ("forward", "backward"):
            cells = [result.speed.find(kind, peer, heap) for peer, heap in peers]
            limit = [result.speed.find(kind, name, "given") for name in limits]
            cells.append(next((each for each in limit if each is not None), None))
            times = [f"{c.timing.median * 1e3:.2f}" if c and c.timing else "" for c in cells]
            rows.append((result.job.spec.op, kind, *times))
    heads = (
        "operator", "kind", "ours", "ours, fresh", "onnxruntime", "torch", "torch, fresh",
        "memory limit",
    )  # fmt: skip
    # A peer that is not installed has no column.
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return table([[row[place] for place in kept] for row in rows], [heads[p] for p in kept])


def run(
    pictures: Array, out: Path, *, operators: Sequence[str] = (), rounds: int = 3
) -> list[Result]:
    """The demo on pictures (P, 3, H, W): every operator, or only those named."""
    x = demo_pictures.exposures(pictures)
    parameters = colours(pictures)
    progress = Progress()
    results = []
    for job in jobs(x.shape[3]):
        if operators and job.spec.op not in operators:
            continue
        given = dict(zip(("gamma", "beta"), _parameters(job.spec, x, parameters), strict=False))
        results.append(run_job(job, x, given, out, rounds, progress))
        if job.spec.op == "instance_norm":
            caption = "InstanceNorm on two photographs, each in four exposures"
            picture = out / "instance_norm.png"
            demo_pictures.before_and_after(x, results[-1].y, caption, picture)
    return results


def report(results: Sequence[Result], out: Path) -> str:
    """The accuracy table, the speed table and the verdicts as text."""
    first = results[0].speed
    size = ",".join(map(str, first.shape))
    machine = first.machine
    lines = [
        "",
        f"Accuracy on the photographs, x of ({size}) float32:",
        "largest error over largest value, against float64 NumPy, and what ours was allowed",
        "",
        accuracy_table(results),
        "",
        f"Speed at the same shape, median ms: {machine['processor']}, {machine['cores']} cores, "
        f"load {machine['load']}",
        "outputs given or kept; 'fresh': from memory the system hands out page by page; "
        "memory limit: a copy of x, an add of x and dy",
        "",
        speed_table(results),
        "",
    ]
    for result in results:
        both = (result.random, result.photographs)
        passed, failed, skipped = (
            sum(each.count(status) for each in both) for status in ("PASSED", "FAILED", "not run")
        )
        verdict = "PASSED" if all(each.ok for each in both) else "FAILED"
        lines.append(
            f"{verdict} {result.job.spec.op}: {passed} comparisons passed, {failed} failed, "
            f"{skipped} not run; {result.random.command}"
        )
    lines.append(f"Picture: {out / 'instance_norm.png'}; every comparison: {out}/*/*.txt")
    return "\n".join(lines)


def main() -> int:
    """Run the demo; 1 if a comparison failed."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    start = time.monotonic()
    try:
        results = run(demo_pictures.photographs(), options.out)
    except (NormGraphError, OSError) as error:
        message, code = explain(error)
        log(message)
        return code
    print(report(results, options.out))
    print(f"{time.monotonic() - start:.0f} s")
    failed = [each for each in results if not (each.random.ok and each.photographs.ok)]
    for result in failed:
        for each in (result.random, result.photographs):
            log("" if each.ok else each.to_text())
    return AccuracyError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
