"""One folder with all that a GPU check needs: artifacts, wheels and the script that runs it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from normgraph import __version__
from normgraph.cpu import machine
from normgraph.errors import CompileError, ToolMissing
from normgraph.scripts.gpu_cases import ARCHIVE, Case, cases

MOST_BYTES = 60_000_000
# The Pythons whose wheels are packed.
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def pack(
    out: Path,
    repository: Path,
    *,
    chosen: Sequence[Case] | None = None,
    wheels: Callable[[Path, Path], None] | None = None,
    progress: Callable[[str], None],
) -> Path:
    """Write the folder; what was there is replaced. The artifacts, of all kinds, are one archive.

    chosen: the cases to take along, all by default. wheels: fetches the wheels; by default builds
    ours from `repository` and asks pip for apache-tvm-ffi's.

    Raises CompileError where the folder is larger than 60 MB, ToolMissing where a wheel cannot be
    had, and what a build raises.
    """
    from normgraph import compile as compiler
    from normgraph import graphs

    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    listed = list(cases() if chosen is None else chosen)
    first = {case.name: case for case in listed}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(first.items(), 1):
            progress(f"{number}/{len(first)} {name}")
            source = Path(folder, "graphs", name)
            graphs.export(case.spec, shape=case.declared, dtype=case.dtype, out=source)
            compiler.build(source, target="cuda", out=Path(folder, "artifacts", name))
        progress("archive")
        with tarfile.open(out / ARCHIVE, "w:xz") as archive:
            archive.add(Path(folder, "artifacts"), "artifacts")
    progress("wheels")
    (out / "wheels").mkdir()
    (wheels or _wheels)(repository, out / "wheels")
    script = out / "gpu_check"
    shutil.copyfile(repository / "scripts" / "gpu_check", script)
    script.chmod(0o755)
    about = {
        "normgraph": __version__,
        "tvm_ffi": version("apache-tvm-ffi"),
        "digest": _digest(out),
        "names": list(first),
    }
    (out / "pack.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise CompileError(
            f"{out}: the folder has {size / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:.0f} MB are "
            "to be carried. Take fewer cases along."
        )
    progress(f"packed {size / 1e6:.1f} MB")
    return out


def _digest(out: Path) -> str:
    """Of the archive and the wheels: what was unpacked or measured of another pack is not its."""
    made = hashlib.sha256()
    for file in (out / ARCHIVE, *sorted((out / "wheels").iterdir())):
        made.update(f"{file.name} {file.stat().st_size} ".encode())
        made.update(file.read_bytes())
    return made.hexdigest()[:16]


def _wheels(repository: Path, target: Path) -> None:
    _run([str(repository / "scripts" / "build-wheel"), sys.executable, str(target)])
    platforms = [f"--platform={each}_{machine()}" for each in _PLATFORMS]
    name = f"apache-tvm-ffi=={version('apache-tvm-ffi')}"
    for python in PYTHONS:
        asked = [f"--python-version={python}", "--no-deps", "--only-binary=:all:", *platforms]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *asked, "--dest", str(target), name])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolMissing(f"{' '.join(command)} failed:\n{done.stderr}")
