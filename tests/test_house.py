"""Rules of the house that no linter knows: files, layers, names, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = {
    "normgraph": "src/normgraph",
    "normgraph.graphs": "graphs",
    "normgraph.compile": "compile",
    "normgraph.runtime": "runtime",
    "normgraph.scripts": "scripts",
}
# What each layer may import beside the standard library and itself. `normgraph` without a
# subpackage is the root package: the errors, NormSpec and the lazy public names.
LAYERS = {
    "graphs": {"numpy", "onnx", "ml_dtypes", "normgraph"},
    "compile": {"numpy", "onnx", "ml_dtypes", "tvm", "tvm_ffi", "normgraph", "graphs"},
    "runtime": {"numpy", "tvm_ffi", "normgraph"},
}
ADAPTERS = {"torch_adapter.py": {"torch"}}
TOP = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "compile",
    "docs",
    "examples",
    "graphs",
    "pyproject.toml",
    "requirements",
    "runtime",
    "scripts",
    "src",
    "tests",
}
TEXT = {"", ".c", ".h", ".md", ".py", ".sh", ".toml", ".txt"}
PUBLIC = ("errors", "graphs", "compile", "runtime")
# Where every public function, class, method and property is documented, but for the names that
# say it all.
DOCUMENTED = ("graphs", "runtime")
PLAIN_NAMES = {"input_names", "output_names"}
LONGEST = 400
# Written in two parts where this file would match itself.
FORBIDDEN = {
    "a path of one machine": r"/(?:work|root|home)" + r"/\w",
    "a registry host": r"py" + r"pi\.org|python" + r"hosted",
    "unfinished work": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
    "a test that does not run": r"mark\.(?:skip|xf" + r"ail)|pytest\.(?:skip|xf" + r"ail)\(",
}


def files(root: Path) -> Iterator[Path]:
    """Every file of the checkout, relative to the root: those git has, or that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        found = [Path(name) for name in listed.stdout.rstrip("\0").split("\0")]
    else:
        found = [path.relative_to(root) for path in sorted(root.rglob("*"))]
    patterns = [*(root / ".gitignore").read_text().split(), ".git"]
    for path in found:
        ignored = any(
            Path(part).match(each.rstrip("/")) for part in path.parts for each in patterns
        )
        if (root / path).is_file() and not ignored:
            yield path


def modules(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the packages, parsed."""
    for folder in PACKAGES.values():
        for path in sorted((root / folder).glob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))


def test_there_are_no_stray_files(repository: Path) -> None:
    found = {path.parts[0] for path in files(repository)}
    assert found - TOP == set()
    assert [
        str(path) for path in files(repository) if path.suffix in (".onnx", ".so", ".log")
    ] == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str, repository: Path) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path}:{number}: {line.strip()[:80]}"
        for path in files(repository)
        if path.suffix in TEXT and path.parts[0] != "requirements"
        for number, line in enumerate((repository / path).read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_files_are_short(repository: Path) -> None:
    long = {
        str(path): count
        for path in files(repository)
        if path.suffix in (".py", ".c", ".h")
        and (count := (repository / path).read_text("utf-8").count("\n")) > LONGEST
    }
    assert long == {}


def test_every_package_folder_is_listed(repository: Path) -> None:
    folders = {
        path.parent.as_posix()
        for path in files(repository)
        if path.suffix == ".py" and path.parts[0] not in ("tests", "examples")
    }
    assert folders == set(PACKAGES.values())


def test_every_module_says_what_it_holds(repository: Path) -> None:
    silent = [
        str(path) for path, tree in modules(repository) if tree.body and not ast.get_docstring(tree)
    ]
    assert silent == []


@pytest.mark.parametrize("module", ["normgraph", *(f"normgraph.{name}" for name in PUBLIC)])
def test_every_public_name_is_documented(module: str) -> None:
    """The names in `__all__` (of normgraph.errors: all classes), and the methods of classes."""
    holder = importlib.import_module(module)
    names = getattr(holder, "__all__", None) or [
        name for name, value in vars(holder).items() if inspect.isclass(value)
    ]
    silent = []
    for name in names:
        value = getattr(holder, name)
        if not (inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if not inspect.getdoc(value):
            silent.append(name)
        if inspect.isclass(value) and value.__module__.startswith("normgraph"):
            silent += [
                f"{name}.{method}"
                for method, member in vars(value).items()
                if not method.startswith("_")
                and inspect.isfunction(member)
                and not inspect.getdoc(member)
            ]
    assert silent == []


def definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes of a module, and what those classes hold; not what is private."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node)


@pytest.mark.parametrize("folder", DOCUMENTED)
def test_every_public_definition_is_documented(folder: str, repository: Path) -> None:
    """The functions of an adapter are documented once, in the protocol they follow."""
    adapter = set(vars(importlib.import_module("normgraph.runtime.adapters").Adapter))
    silent = [
        f"{path}: {node.name}"
        for path, tree in modules(repository)
        if path.parts[0] == folder
        for node in definitions(tree)
        if not ast.get_docstring(node)
        and node.name not in PLAIN_NAMES
        and not (path.name.endswith("_adapter.py") and node.name in adapter)
    ]
    assert silent == []


def test_no_file_uses_the_private_names_of_another(repository: Path) -> None:
    used = [
        f"{path}: {alias.name} of {node.module}"
        for path, tree in modules(repository)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normgraph")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert used == []


def imports_of(tree: ast.Module) -> Iterator[str]:
    """The full names a module imports, also inside functions, but not for type checkers only."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_is_below_them(layer: str, repository: Path) -> None:
    outside = []
    for path, tree in modules(repository):
        if path.parts[0] != layer:
            continue
        allowed = LAYERS[layer] | {layer} | ADAPTERS.get(path.name, set())
        for name in imports_of(tree):
            top, _, rest = name.partition(".")
            if top == "normgraph" and f"normgraph.{rest.partition('.')[0]}" in PACKAGES:
                top = rest.partition(".")[0]
            if top not in allowed and top not in sys.stdlib_module_names:
                outside.append(f"{path}: {name}")
    assert outside == []


def test_the_root_package_imports_the_standard_library_alone(repository: Path) -> None:
    outside = [
        f"{path}: {name}"
        for path, tree in modules(repository)
        if path.parts[0] == "src" and path.name not in ("__main__.py", "api.py")
        for name in imports_of(tree)
        if (top := name.partition(".")[0]) != "normgraph" and top not in sys.stdlib_module_names
    ]
    assert outside == []


def test_links_in_the_documents_lead_somewhere(repository: Path) -> None:
    broken = [
        f"{path}: {link}"
        for path in files(repository)
        if path.suffix == ".md"
        for link in re.findall(r"\]\(([^)#:]+)\)", (repository / path).read_text("utf-8"))
        if not (repository / path.parent / link).exists()
    ]
    assert broken == []


def test_the_changelog_has_the_version(repository: Path) -> None:
    import normgraph

    assert f"## {normgraph.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_the_lock_names_no_registry_and_holds_hashes(repository: Path) -> None:
    for name in ("cuda.txt", "demo.txt", "dev.txt", "torch.txt"):
        text = (repository / "requirements" / name).read_text()
        assert "://" not in text
        for line in text.splitlines():
            if line and line[0].isalpha():
                assert "==" in line, line
                assert name == "torch.txt" or line.endswith("\\"), line
