"""Builds with the cache by a copy of the package, of which a source is then changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normgraph as ng

_BUILD = """
import sys
from pathlib import Path
sys.modules["torch"] = None  # tvm_ffi imports it where it is, and it takes seconds
import normgraph as ng

root = Path(sys.argv[1])
assert Path(ng.__file__).is_relative_to(root) and Path(ng.compile.__file__).is_relative_to(root)
if not (root / "graphs").exists():
    spec = ng.NormSpec("rms_norm")
    ng.graphs.export(spec, shape=("N", 5), out=root / "graphs", kinds=("inference",))
ng.compile.build(root / "graphs", out=root / "artifact", progress=print)
assert ng.load(root / "artifact").kinds == ("inference",)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package as it is installed, in a folder of its own, wherever its parts come from."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in (ng, ng.graphs, ng.compile, ng.runtime):
        inner = str(package.__name__).split(".")
        shutil.copytree(
            Path(str(package.__file__)).parent,
            tmp_path.joinpath(*inner),
            ignore=ignored,
            dirs_exist_ok=True,
        )
    return tmp_path


def build(root: Path) -> str:
    """What another process says while it builds with the sources that are there."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NORMGRAPH_CACHE": "on",
            "NORMGRAPH_CACHE_DIR": str(root / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_changed_source_is_compiled_and_an_unchanged_one_is_not(copied: Path) -> None:
    """At the same version, with the same length and times: only the content counts."""
    taken = f"taken from the compile cache in {copied / 'cache'}"
    compiled = "generate code for cpu and link"
    rule = copied / "normgraph" / "compile" / "slice_rule.py"
    original, times = rule.read_bytes(), rule.stat()
    assert compiled in build(copied)
    said = build(copied)
    assert taken in said
    assert compiled not in said
    rule.write_bytes(original.replace(b"the", b"teh", 1))
    os.utime(rule, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert rule.stat().st_size == len(original)
    said = build(copied)
    assert compiled in said
    assert taken not in said
    assert len(list((copied / "cache").glob("*.built"))) == 2
    rule.write_bytes(original)
    assert taken in build(copied)
