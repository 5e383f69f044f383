"""docs/reliability.md, whose rows the tests of this folder are, and an operator for them.

A test is the row whose title is its docstring. It calls `row(...)` with what it has seen happen, a
text or an error, which must be what the page says in normgraph's column; --update-golden puts it
there. The other columns are what scripts/reliability.py recorded under the test's name.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import normgraph as ng

if TYPE_CHECKING:
    from normgraph.runtime import Operator

Array = NDArray[Any]

HERE = Path(__file__).parent
PEERS = {"torch": "PyTorch", "onnxruntime": "onnxruntime", "tvm": "TVM"}
# By file of tests: the heading, what the section is about, and where more of it is tested.
SECTIONS = {
    "test_arrays.py": (
        "Arrays",
        "A call of instance norm over (N, 8, L) in float32; right is what float64 says.",
        ("runtime/test_bad_arrays.py", "runtime/test_torch_arrays.py", "runtime/test_empty.py",
         "runtime/test_torch_recording.py", "compile/test_requests.py",
         "examples/test_calling_convention.py"),
    ),
    "test_processes.py": (
        "Threads and processes",
        "PyTorch and onnxruntime load a file of weights and a graph. TVM with eight threads is the"
        " virtual machine that it compiles an ONNX graph to, and after a fork a parallel loop.",
        ("runtime/test_threads.py", "compile/test_pool.py", "runtime/test_pooled_processes.py"),
    ),
    "test_files.py": (
        "Files",
        "Damage to a file of weights (PyTorch), a graph with weights (onnxruntime), a library that"
        " TVM exported, and in turn each file of an artifact. Not noticed: it is used, and gives"
        " the right result all the same.",
        ("runtime/test_artifact.py", "runtime/test_damage.py", "runtime/test_loading.py",
         "runtime/test_replaced.py", "runtime/test_packed.py", "runtime/test_packing.py",
         "runtime/test_forged.py", "compile/test_build.py"),
    ),
}  # fmt: skip
# Of a message.
LONGEST = 100


@dataclass(frozen=True)
class Case:
    """A row: the name of its test without test_, and its docstring."""

    name: str
    title: str


def cases(file: str) -> list[Case]:
    """The rows of a file of tests, in its order; every test has a title and says its outcome."""
    found = []
    for node in ast.parse((HERE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            called = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            title = ast.get_docstring(node)
            assert title, f"{file}: {node.name} has no docstring, the title of its row"
            assert "row" in called, f"{file}: {node.name} does not call row(...)"
            found.append(Case(node.name.removeprefix("test_"), title))
    return found


class Page:
    """docs/reliability.md."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.record = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))

    def ours(self) -> dict[str, str]:
        """What the page says normgraph does, by the title of the row."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return {first: rest[-1] for first, *rest in cells}

    def put(self, title: str, outcome: str) -> None:
        """Write the page anew with this row."""
        self.file.write_text(self.text({**self.ours(), title: outcome}), encoding="utf-8")

    def text(self, ours: Mapping[str, str]) -> str:
        """The whole page."""
        versions = ", ".join(f"{PEERS[p]} {self.record['versions'][p]}" for p in PEERS)
        parts = [
            "# Reliability\n\nWhat bad luck and bad input do here and elsewhere. The last column is"
            " written by the tests in [tests/reliability](../tests/reliability), each of which is a"
            " row and fails where the page says something else than it sees. The other columns are"
            " what [scripts/reliability.py](../scripts/reliability.py) has seen of"
            f" {versions}, each case in a process of its own, on x86-64 Linux. A dash: there is"
            " nothing of the kind, or it was not tried.\n\n`./scripts/test tests/reliability"
            " --update-golden` writes the page."
        ]
        for file, (heading, about, further) in SECTIONS.items():
            names = ["case", *PEERS.values(), "normgraph"]
            lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
            for case in cases(file):
                peers = self.record["cases"].get(case.name, {})
                cells = [peers.get(peer, "-").replace("|", "/") for peer in PEERS]
                lines.append(f"| {' | '.join([case.title, *cells, ours.get(case.title, '')])} |")
            links = ", ".join(f"[{name}](../tests/{name})" for name in further)
            parts.append(f"## {heading}\n\n{about}\n\n{chr(10).join(lines)}\n\nMore tests: {links}")
        return "\n\n".join(parts) + "\n"


@pytest.fixture(scope="session")
def page(repository: Path) -> Page:
    return Page(repository / "docs" / "reliability.md")


@pytest.fixture(scope="session")
def sections() -> list[list[Case]]:
    """The rows of each section."""
    return [cases(file) for file in SECTIONS]


@pytest.fixture
def row(
    request: pytest.FixtureRequest, page: Page, update_golden: bool, tmp_path: Path
) -> Callable[[object], None]:
    """row(outcome): hold a text, or an error, against what the page says of this test."""
    title = str(request.function.__doc__)

    def say(outcome: object) -> None:
        text = described(outcome) if isinstance(outcome, BaseException) else str(outcome)
        if update_golden:
            page.put(title, text)
        said = page.ours().get(title)
        assert said == text, f"docs/reliability.md says {said!r}; --update-golden puts it right"

    return say


def described(error: BaseException) -> str:
    """The class and the first sentence of the message, without folders of this run."""
    text = re.sub(r"(/[\w.-]+)+/(?=[\w.-])", "", str(error).splitlines()[0]).partition(". ")[0]
    text = " ".join(text.replace("|", "/").replace("`", "'").rstrip(".").split())
    # What differs from one machine to the next: hashes and sizes.
    text = re.sub(r"-[0-9a-f]{12}\b|\b[0-9]{4,}\b", "...", text)
    return f"`{type(error).__name__}`: {text[:LONGEST]}{'...' if len(text) > LONGEST else ''}"


class Norm:
    """Instance norm over (N, 8, L), compiled, and what float64 says of it."""

    gamma = np.linspace(0.5, 2, 8).astype(np.float32)
    beta = np.linspace(-1, 1, 8).astype(np.float32)

    def __init__(self, op: Operator) -> None:
        self.op = op

    @staticmethod
    def x(n: int = 3, length: int = 37, seed: int = 0) -> Array:
        return np.random.default_rng(seed).normal(2, 1, (n, 8, length)).astype(np.float32)

    def answers(self, dy: Any, x: Any) -> dict[str, Array]:
        """All outputs of forward and backward, by plain arithmetic."""
        dy, x = np.asarray(dy, np.float64), np.asarray(x, np.float64)
        gamma, beta = self.gamma[:, None].astype(np.float64), self.beta[:, None].astype(np.float64)
        mean = x.mean(2, keepdims=True)
        inv_std = 1 / np.sqrt(x.var(2, keepdims=True) + 1e-5)
        hat = (x - mean) * inv_std
        inner = dy - dy.mean(2, keepdims=True) - hat * (dy * hat).mean(2, keepdims=True)
        return {
            "y": hat * gamma + beta,
            "mean": mean,
            "inv_std": inv_std,
            "dx": gamma * inv_std * inner,
            "dgamma": (dy * hat).sum((0, 2)),
            "dbeta": dy.sum((0, 2)),
        }

    def check(
        self, x: Any, values: Any = None, like: Callable[[Array], Any] = np.asarray, **options: Any
    ) -> None:
        """Forward and backward of x are right, also once its shape is known.

        values: x in float32, where it is something else. like: makes the other arguments.
        """
        values = np.asarray(x, np.float32) if values is None else values
        answers = self.answers(values[::-1], values)
        mean, inv_std = (answers[name].astype(np.float32) for name in ("mean", "inv_std"))
        gamma, beta = like(self.gamma), like(self.beta)
        dy = like(np.ascontiguousarray(values[::-1]))
        for _ in range(2):
            got = self.op.forward(x, gamma, beta, **options)._asdict()
            backward = self.op.backward(dy, x, gamma, like(mean), like(inv_std), **options)
            got |= backward._asdict()
            for name, answer in answers.items():
                found = np.asarray(got[name], np.float64)
                np.testing.assert_allclose(found, answer, rtol=1e-5, atol=2e-4, err_msg=name)


@pytest.fixture(scope="session")
def norm_artifact(build_artifact: Callable[..., Path]) -> Path:
    """Do not change it: copy it."""
    spec = ng.NormSpec("instance_norm")
    return build_artifact(spec, ("N", 8, "L"), kinds=("forward", "backward"))


@pytest.fixture(scope="session")
def norm(norm_artifact: Path) -> Norm:
    return Norm(ng.load(norm_artifact))


@pytest.fixture(scope="session")
def norm_of() -> Callable[[Operator], Norm]:
    """norm_of(operator): the same for another operator loaded from the artifact."""
    return Norm


@pytest.fixture
def run_python(norm_artifact: Path) -> Callable[..., str]:
    """Run a program in a process of its own; what it prints. sys.argv[1] is the artifact."""

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", START + program, str(norm_artifact), *arguments],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        return done.stdout

    return run


# What the programs begin with.
START = """
import os, sys, time
sys.modules["torch"] = None  # tvm_ffi imports it where it is, and it takes seconds
import numpy as np
import normgraph as ng

def data(n, length):
    return np.random.default_rng(0).normal(2, 1, (n, 8, length)).astype(np.float32)

def right(op, x):
    y, mean, inv_std = op.forward(x, np.ones(8, np.float32), np.zeros(8, np.float32))
    wide = x.astype(np.float64)
    answer = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + 1e-5)
    return bool(np.allclose(y, answer, atol=1e-4))
"""
