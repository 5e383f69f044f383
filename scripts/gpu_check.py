"""Check and time the kernels on this machine's GPU: `./gpu_check` in a folder that was packed.

Every operator and kind is held to float64 first, at its benchmark's shapes and at awkward ones,
and then timed against PyTorch eager, torch.compile and the copy bandwidth of the device. Writes
gpu-check.json and gpu-check.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normgraph import cuda
from normgraph.errors import DeviceError, NormGraphError, ToolMissing
from normgraph.scripts.console import Progress, log
from normgraph.scripts.explain import explain
from normgraph.scripts.gpu_cases import ARCHIVE, KINDS, Case, cases, goal_of
from normgraph.scripts.gpu_report import markdown, row

# Sizes of the open extents beside the benchmark's: tails, single rows, rows shorter than a warp.
_AWKWARD = ({"N": 3, "H": 5, "W": 7}, {"N": 1, "H": 1, "W": 13}, {"N": 37, "H": 3, "W": 1})
# The copy whose bandwidth is the measure.
_COPY_BYTES = 512 * 2**20


def main() -> int:
    """Pack, or check and time."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--pack", action="store_true", help="write the folder to be carried")
    parser.add_argument("--out", type=Path, help="the folder; or where the results go")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="that was packed")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
    parser.add_argument("--brief", action="store_true", help="without torch.compile")
    parser.add_argument("--accuracy", action="store_true", help="do not time anything")
    options = parser.parse_args()
    chosen = [each for each in cases() if options.only in each.name]
    if not chosen:
        parser.error(f"expected --only to leave a case; none has {options.only!r} in its name")
    progress = Progress()
    try:
        if options.pack:
            from normgraph.scripts.gpu_pack import pack

            out = options.out or Path("build/gpu-check")
            print(pack(out, options.folder, chosen=chosen, progress=progress))
            return 0
        return check(options, chosen, progress)
    except (NormGraphError, OSError) as error:
        message, code = explain(error)
        log(message)
        return code


def check(options: Any, chosen: list[Case], progress: Callable[[str], None]) -> int:
    """Check, time and write; 1 where a result is wrong.

    Raises DeviceError without a device, ToolMissing without PyTorch for CUDA.
    """
    found = cuda.state()
    if found.problem:
        raise DeviceError(f"gpu_check needs a CUDA device, and {found.problem}.")
    for needed in ("torch", "numpy", "typing_extensions"):
        if importlib.util.find_spec(needed) is None:
            raise ToolMissing(
                f"gpu_check needs PyTorch with CUDA and NumPy, and {needed} is not installed."
            )
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ToolMissing(f"torch {torch.__version__} cannot use the CUDA device here.")
    from normgraph.scripts.gpu_run import Bench

    bench = Bench(torch, unpacked(options.folder), _COPY_BYTES)
    report: dict[str, Any] = {**bench.about(found), "numeric": [], "rows": [], "failures": []}
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in dict.fromkeys(chosen):
            for sizes in _AWKWARD:
                report["numeric"] += bench.numeric(case, _bound(case, sizes))
            progress(f"accuracy: {case.spec.op} {case.size} {case.dtype}")
            report["numeric"] += bench.numeric(case, case.shape)
        report["numeric"] += bench.behaviour(chosen[0])
        if not options.accuracy:
            report |= bench.limits()
            for case in chosen:
                for kind in KINDS:
                    progress(f"time: {case.spec.op} {case.size} {case.dtype} {kind}")
                    seconds, failures = bench.time(case, kind, compiled=not options.brief)
                    report["failures"] += failures
                    if seconds:
                        bandwidth, launch = report["copy_bandwidth"], report["launch_us"] * 1e-6
                        goal = goal_of(case, kind, bandwidth)
                        report["rows"].append(row(case, kind, goal, seconds, bandwidth, launch))
                    write(report, options.out or Path.cwd())
    write(report, options.out or Path.cwd())
    wrong = [each for each in report["numeric"] if not each["passed"]]
    for each in wrong:
        log(f"WRONG: {each['what']}: {each['detail']}")
    return 1 if wrong else 0


def unpacked(folder: Path) -> Path:
    """The artifacts in a folder that was packed, unpacked the first time."""
    target, part = folder / "artifacts", folder / "artifacts.part"
    if not target.exists():
        shutil.rmtree(part, ignore_errors=True)
        checked: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(part, **checked)
        (part / "artifacts").rename(target)
        part.rmdir()
    return target


def write(report: dict[str, Any], out: Path) -> None:
    """gpu-check.json and gpu-check.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "gpu-check.md").write_text(markdown(report), encoding="utf-8")


def _bound(case: Case, sizes: dict[str, int]) -> tuple[int, ...]:
    """A shape of the case's artifact."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in case.declared)


if __name__ == "__main__":
    sys.exit(main())
