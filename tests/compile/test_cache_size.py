"""How much of the last-level cache counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from normgraph import NormSpec
from normgraph.compile import cache_size, graph_files
from normgraph.compile.cache_key import build_key
from normgraph.compile.targets import resolve
from normgraph.graphs import export

MB = 1 << 20


def _folder(root: Path, caches: dict[str, tuple[str, str | None]]) -> Path:
    for name, (size, cpus) in caches.items():
        (root / name).mkdir()
        (root / name / "size").write_text(f"{size}\n")
        if cpus is not None:
            (root / name / "shared_cpu_list").write_text(f"{cpus}\n")
    return root


@pytest.mark.parametrize(
    ("size", "cpus", "bytes_of_it"),
    [
        ("32768K", "0-1", 32 * MB),
        ("32M", "0-7", 32 * MB),
        # A virtual machine's two CPUs, of all that share it.
        ("491520K", "0-1", 64 * MB),
        ("491520K", "0-95,128-223", 480 * MB),
        ("491520K", "0,2,4", 96 * MB),
        ("491520K", None, 32 * MB),
        ("491520K", "", 32 * MB),
        ("2048K", "0", 2 * MB),
        ("491520K", "3-0", 32 * MB),
    ],
)
def test_the_largest_cache(tmp_path: Path, size: str, cpus: str | None, bytes_of_it: int) -> None:
    folder = _folder(tmp_path, {"index0": ("48K", "0"), "index3": (size, cpus)})
    assert cache_size.last_level_cache(folder) == bytes_of_it


def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    assert cache_size.last_level_cache(tmp_path / "none") == 32 * MB
    unreadable = _folder(tmp_path, {"index0": ("large", "0")})
    assert cache_size.last_level_cache(unreadable) == 32 * MB
    (unreadable / "index0" / "size").write_text("0K\n")
    assert cache_size.last_level_cache(unreadable) == 32 * MB
    (tmp_path / "index1" / "size").mkdir(parents=True)  # reading it fails, for every user
    assert cache_size.last_level_cache(unreadable) == 32 * MB


def test_this_machine() -> None:
    assert 1 << 18 <= cache_size.last_level_cache() <= 1 << 34


def test_a_build_for_another_cache_is_another_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(NormSpec("layer_norm"), shape=("N", 8), out=tmp_path, kinds=["forward"])
    graphs, target = graph_files.read(tmp_path), resolve("cpu")
    usual = build_key(graphs, [target], True)
    monkeypatch.setattr(cache_size, "last_level_cache", lambda: 3 * MB)
    assert build_key(graphs, [target], True) not in (usual, None)
