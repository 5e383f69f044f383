"""The wheel holds exactly the packages, and what is installed is light and the same everywhere."""

from __future__ import annotations

import email.message
import email.parser
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import normgraph as ng
from normgraph.errors import HostError
from normgraph.host import MACHINES, check_host

FOLDERS = {
    "normgraph": "src/normgraph",
    "normgraph/graphs": "graphs",
    "normgraph/compile": "compile",
    "normgraph/runtime": "runtime",
    "normgraph/scripts": "scripts",
}
EXTRAS = {"bench", "compile", "verify", "torch", "cuda", "plot", "all"}
HEAVY = ("onnx", "tvm", "torch", "ml_dtypes", "onnxruntime", "matplotlib", "PIL", "sklearn")


def python(*arguments: str, cwd: Path) -> str:
    """What this environment's Python prints when it runs in `cwd`."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    """The wheel of this checkout, opened."""
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    """The wheel's METADATA."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_exactly_the_source_files(wheel: zipfile.ZipFile, repository: Path) -> None:
    expected = {"normgraph/py.typed"}
    for package, folder in FOLDERS.items():
        patterns = ("*.py", "*.c", "*.h") if folder in ("compile", "scripts") else ("*.py",)
        for pattern in patterns:
            # Files of a folder nobody listed as a package are expected too, and then missing.
            for path in (repository / folder).rglob(pattern):
                expected.add(f"{package}/{path.relative_to(repository / folder).as_posix()}")
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_has_the_licence_and_the_entry_point(wheel: zipfile.ZipFile) -> None:
    names = {name.partition(".dist-info/")[2]: name for name in wheel.namelist()}
    assert b"Apache License" in wheel.read(names["licenses/LICENSE"])
    assert b"normgraph = normgraph.__main__:main" in wheel.read(names["entry_points.txt"])


def test_the_metadata_says_what_is_supported(metadata: email.message.Message) -> None:
    assert metadata["Version"] == ng.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_a_bare_install_needs_numpy_and_the_loader_alone(metadata: email.message.Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in required) == [
        "apache-tvm-ffi<0.2,",
        "numpy",
    ]


def test_import_is_the_same_from_the_root_and_elsewhere(repository: Path, tmp_path: Path) -> None:
    """Also for the subpackages, whose folders would import as second copies from the root."""
    code = (
        "import importlib.util, normgraph, normgraph.errors, normgraph.scripts.console;"
        "from normgraph.spec import NormSpec, SpecError;"
        "print(normgraph.__file__, NormSpec is normgraph.NormSpec,"
        " SpecError is normgraph.errors.SpecError,"
        " [importlib.util.find_spec(f'normgraph.{name}').origin"
        " for name in ('graphs', 'compile', 'runtime', 'scripts')])"
    )
    at_root = python("-c", code, cwd=repository)
    assert at_root == python("-c", code, cwd=tmp_path)
    assert at_root.split()[1:3] == ["True", "True"]


def test_import_normgraph_is_light(tmp_path: Path) -> None:
    code = "import sys, normgraph;print([name for name in sys.argv[1:] if name in sys.modules])"
    assert python("-c", code, *HEAVY, "numpy", "tvm_ffi", cwd=tmp_path) == "[]"


def test_an_artifact_runs_where_only_the_runtime_is_installed(
    build_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    path = build_artifact(ng.NormSpec("instance_norm"), ("N", 4, "L"), kinds=("forward",))
    code = (
        "import sys\n"
        "for name in sys.argv[2:]: sys.modules[name] = None\n"
        "import numpy as np, normgraph\n"
        "operator = normgraph.load(sys.argv[1])\n"
        "x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)\n"
        "y, mean, inv_std = operator.forward(x, np.ones(4, np.float32), np.zeros(4, np.float32))\n"
        "assert abs(mean.ravel() - np.arange(1, 24, 3)).max() < 1e-5\n"
        "assert abs(y[0, 0] - [-1.2247357, 0, 1.2247357]).max() < 1e-5, y\n"
        "for name in ('normgraph.graphs', 'normgraph.compile'): assert name not in sys.modules\n"
    )
    python("-c", code, str(path), *HEAVY, cwd=tmp_path)


@pytest.mark.parametrize(
    ("platform", "machine", "version", "named"),
    [
        ("darwin", "arm64", (3, 12), "darwin on arm64"),
        ("win32", "AMD64", (3, 12), "win32 on AMD64"),
        ("linux", "riscv64", (3, 12), "linux on riscv64"),
        ("linux", "x86_64", (3, 9), "3.9"),
    ],
)
def test_another_host_is_refused(
    platform: str, machine: str, version: tuple[int, int], named: str
) -> None:
    with pytest.raises(HostError, match=named) as caught:
        check_host(platform, machine, version)
    assert isinstance(caught.value, ImportError)


def test_the_supported_hosts_pass() -> None:
    for machine in MACHINES:
        for minor in (10, 11, 12, 13):
            check_host("linux", machine, (3, minor))
