"""The catalogue: every operator, all kinds, for one target or several.

In float32 and float16; for CUDA in bfloat16 too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from normgraph.errors import NormGraphError
from normgraph.scripts.cli_parser import target_option
from normgraph.scripts.console import Progress, log
from normgraph.scripts.explain import explain
from normgraph.spec import NormSpec

DTYPES = ("float32", "float16")
CUDA_DTYPES = (*DTYPES, "bfloat16")


@dataclass(frozen=True)
class Entry:
    """One operator of the catalogue. Extents that no parameter has are names: any size fits."""

    spec: NormSpec
    shape: tuple[int | str, ...]


ENTRIES = (
    Entry(NormSpec("batch_norm"), ("N", 64, "H", "W")),
    Entry(NormSpec("instance_norm"), ("N", 64, "H", "W")),
    Entry(NormSpec("group_norm", groups=32), ("N", 64, "H", "W")),
    Entry(NormSpec("layer_norm"), ("N", "T", 768)),
    Entry(NormSpec("rms_norm"), ("N", "T", 768)),
)


def build_catalogue(
    out: Path,
    target: str | Sequence[str] = "cpu",
    *,
    operators: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Build one artifact for each entry and dtype, in `out`/<operator>-<dtype>.

    `operators` leaves out all others. Raises what a build raises, and then keeps what was built.
    """
    from normgraph import compile as compiler
    from normgraph import graphs

    jobs = [
        (entry, dtype)
        for entry in ENTRIES
        if not operators or entry.spec.op in operators
        for dtype in (CUDA_DTYPES if compiler.resolve_all(target)[0].kind == "cuda" else DTYPES)
    ]
    paths = []
    for number, (entry, dtype) in enumerate(jobs, 1):
        name = f"{entry.spec.op}-{dtype}"
        if progress is not None:
            progress(f"{number}/{len(jobs)} {name}")
        with tempfile.TemporaryDirectory() as folder:
            graphs.export(entry.spec, shape=entry.shape, dtype=dtype, out=folder)
            paths.append(compiler.build(folder, target=target, out=out / name))
    return paths


def kernels_of(paths: Sequence[Path]) -> tuple[dict[str, int], list[str]]:
    """How many CUDA kernels the artifacts have, by architecture, and which of those spill."""
    counts: dict[str, int] = {}
    spilling = []
    for path in paths:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for library in manifest["libraries"]:
            for arch, found in library["target"].get("kernels", {}).items():
                counts[arch] = counts.get(arch, 0) + found["count"]
                spilling += [f"{name} of {path.name} for {arch}" for name in found["spilling"]]
    return counts, spilling


def summary(paths: Sequence[Path]) -> str:
    """How large the artifacts are; of CUDA kernels, how many there are and which spill."""
    size = sum(f.stat().st_size for path in paths for f in path.rglob("*") if f.is_file())
    text = f"{len(paths)} artifacts, {size / 1e6:.1f} MB"
    counts, spilling = kernels_of(paths)
    if counts:
        each = ", ".join(f"{count} for {arch}" for arch, count in counts.items())
        text += f"; CUDA kernels: {each}; spilling: {', '.join(spilling) or 'none'}"
    return text


def main() -> int:
    """Build the catalogue, print the path of each artifact, and on stderr what they are."""
    parser = argparse.ArgumentParser(prog="compile-catalogue", description=__doc__)
    target_option(parser)
    parser.add_argument("--out", type=Path, default=Path("build/catalogue"))
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="only these")
    options = parser.parse_args()
    known = [entry.spec.op for entry in ENTRIES]
    for operator in options.operators:
        if operator not in known:
            parser.error(f"expected operators out of {', '.join(known)}; got {operator!r}")
    progress = Progress()
    try:
        paths = build_catalogue(
            options.out, options.target or "cpu", operators=options.operators, progress=progress
        )
        print(*paths, sep="\n")
        progress(summary(paths))
    except (NormGraphError, OSError) as error:
        message, code = explain(error)
        log(message)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
