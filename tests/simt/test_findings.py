"""Kernels broken on purpose: each kind of defect is reported by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

SUMS = """
extern "C" __global__ void __launch_bounds__(64) sums(const float* x, float* y, int n, int rows) {
  __shared__ alignas(16) float parts[2];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += 64) sum += x[row * n + i];
    for (int offset = 16; offset > 0; offset /= 2)
      sum += __shfl_down_sync(0xffffffff, sum, offset);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) y[row * 32 + threadIdx.x] = parts[0] + parts[1];
    __syncthreads();
  }
}
"""
COPY = """
extern "C" __global__ void copy(const float* x, float* y, int n) {
  int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  float kept[4];
  for (int i = 0; i < 4; ++i) kept[i] = 0;
  if (at < n) {
    float4 v = *(const float4*)(x + at);
    kept[0] = v.x, kept[1] = v.y, kept[2] = v.z, kept[3] = v.w;
    *(float4*)(y + at) = make_float4(kept[0], kept[1], kept[2], kept[3]);
  }
}
"""
WARP = """
extern "C" __global__ void neighbours(const int* x, int* y, int n) {
  __shared__ int seen[64];
  seen[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  int v = seen[threadIdx.x ^ 1];
  if (threadIdx.x < n) v += __shfl_xor_sync(0xffffffff, v, 1);
  y[threadIdx.x] = v;
}
"""
GRID = """
#include <cooperative_groups.h>
extern "C" __global__ void share(const float* x, float* parts, float* y) {
  if (threadIdx.x == 0) parts[blockIdx.x] = x[blockIdx.x];
  cooperative_groups::this_grid().sync();
  y[blockIdx.x * 32 + threadIdx.x] = parts[0] + parts[1];
}
"""
CLUSTER = """
#include <cooperative_groups.h>
extern "C" __global__ void share(const float* x, float* y) {
  __shared__ float part[1];
  auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) part[0] = x[blockIdx.x];
  cluster.sync();
  y[blockIdx.x * 32 + threadIdx.x] = *cluster.map_shared_rank(part, cluster.block_rank() ^ 1);
  cluster.sync();
}
"""


@dataclass(frozen=True)
class Case:
    """A right kernel, how to call it, and what it needs."""

    source: str
    launch: dict[str, Any]
    inputs: dict[str, tuple[tuple[int, ...], str]]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    scratch: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)


CASES = {
    "sums": Case(
        SUMS,
        {"kernel": "sums", "grid": (2, 1, 1), "block": (64, 1, 1), "args": ["x", "y", 100, 5]},
        {"x": ((5, 100), "float32")},
        {"y": ((5, 32), "float32")},
    ),
    "copy": Case(
        COPY,
        {"kernel": "copy", "grid": (2, 1, 1), "block": (32, 1, 1), "args": ["x", "y", 200]},
        {"x": ((200,), "float32")},
        {"y": ((200,), "float32")},
    ),
    "warp": Case(
        WARP,
        {"kernel": "neighbours", "grid": (1, 1, 1), "block": (64, 1, 1), "args": ["x", "y", 64]},
        {"x": ((64,), "int32")},
        {"y": ((64,), "int32")},
    ),
    "grid": Case(
        GRID,
        {
            "kernel": "share",
            "grid": (2, 1, 1),
            "block": (32, 1, 1),
            "args": ["x", "parts", "y"],
            "cooperative": True,
        },
        {"x": ((2,), "float32")},
        {"y": ((64,), "float32")},
        {"parts": ((2,), "float32")},
    ),
    "cluster": Case(
        CLUSTER,
        {
            "kernel": "share",
            "grid": (2, 1, 1),
            "block": (32, 1, 1),
            "args": ["x", "y"],
            "cluster": (2, 1, 1),
        },
        {"x": ((2,), "float32")},
        {"y": ((64,), "float32")},
    ),
}
SYNC = "__syncthreads();"
# name: case, what is replaced by what (where it stands first), the kind that has to be reported
BROKEN = {
    "barrier before the read removed": ("sums", f"= sum;\n    {SYNC}", "= sum;", "race"),
    "barrier before the next row removed": ("sums", f"1];\n    {SYNC}", "1];", "race"),
    "barrier inside of a branch": (
        "sums",
        f"{SYNC}\n    if (threadIdx.x < 32)",
        f"if (threadIdx.x < 32) {SYNC} else {{\n{SYNC} }}\n    if (threadIdx.x < 32)",
        "divergent-barrier",
    ),
    "barrier that a warp never reaches": (
        "sums",
        f"1];\n    {SYNC}",
        f"1];\n    if (threadIdx.x < 32) {SYNC}",
        "divergent-barrier",
    ),
    "threads that leave before a barrier": (
        "sums",
        "float sum = 0;",
        "float sum = 0; if (threadIdx.x >= 32) return;",
        "missing-arrival",
    ),
    "bound off by one": ("sums", "i < n", "i <= n", "out-of-bounds"),
    "rows off by one": ("sums", "row < rows", "row <= rows", "out-of-bounds"),
    "row before the first": ("sums", "x[row * n + i]", "x[row * n + i - 1]", "out-of-bounds"),
    "shared array too small": ("sums", "parts[2]", "parts[1]", "out-of-bounds"),
    "shared part not written": (
        "sums",
        "if (threadIdx.x % 32 == 0) parts",
        "if (threadIdx.x == 0) parts",
        "uninitialised-read",
    ),
    "output not written": (
        "sums",
        "if (threadIdx.x < 32) y",
        "if (threadIdx.x < 31) y",
        "unwritten-output",
    ),
    "too many threads write": ("sums", "if (threadIdx.x < 32) y", "y", "out-of-bounds"),
    "rows shared by two blocks": ("sums", "int row = blockIdx.x", "int row = 0", "race"),
    "atomic addition": (
        "sums",
        "y[row * 32 + threadIdx.x] = parts[0] + parts[1]",
        "{ y[row * 32 + threadIdx.x] = 0; atomicAdd(y + row * 32 + threadIdx.x, parts[0]); }",
        "atomic",
    ),
    "mask without the lane itself": ("sums", "0xffffffff, sum", "0x0000ffff, sum", "lane-mask"),
    "masks that differ": (
        "sums",
        "0xffffffff, sum",
        "0xffffffff >> (threadIdx.x % 32 == 0), sum",
        "lane-mask",
    ),
    "vector off its alignment": ("copy", "(x + at)", "(x + at + 1)", "misaligned"),
    "vector across the end": ("copy", "at < n", "at < n + 4", "out-of-bounds"),
    "own array overrun": ("copy", "i < 4", "i < 4 + (n > 9)", "out-of-bounds"),
    "input written": ("copy", "*(float4*)(y + at)", "*(float4*)(x + at)", "input-written"),
    "lanes read without a barrier of the warp": ("warp", "  __syncwarp();\n", "", "race"),
    "shuffle from a lane that is not there": (
        "warp",
        "< n) v += __shfl_xor_sync(0xffffffff",
        "< n - 3) v += __shfl_xor_sync(__activemask()",
        "inactive-lane",
    ),
    "shuffle that some lanes never reach": (
        "warp",
        "threadIdx.x < n",
        "threadIdx.x < n - 3",
        "inactive-lane",
    ),
    "lanes that wait at two places": (
        "warp",
        "if (threadIdx.x < n) v",
        "if (threadIdx.x % 32 < 3) __syncthreads(); else v",
        "deadlock",
    ),
    "barrier of the grid removed": (
        "grid",
        "cooperative_groups::this_grid().sync();",
        SYNC,
        "race",
    ),
    "barrier of the cluster removed": ("cluster", "cluster.sync();", SYNC, "race"),
    "block that leaves while others read": (
        "cluster",
        "  cluster.sync();\n}",
        "}",
        "block-exited",
    ),
    "rank beyond the cluster": ("cluster", "^ 1", "+ 1", "out-of-bounds"),
}


def run(emulator: Any, launch: Any, each: Case, source: str, seed: int) -> Any:
    rng = np.random.default_rng(0)
    return emulator.compile(source).run(
        [launch(**each.launch)],
        inputs={n: rng.integers(1, 9, s).astype(d) for n, (s, d) in each.inputs.items()},
        outputs=each.outputs,
        scratch=each.scratch,
        seed=seed,
    )


def broken(name: str) -> str:
    """The source of a case with its defect in it."""
    base, old, new, _ = BROKEN[name]
    source = CASES[base].source
    assert old in source
    return source.replace(old, new, 1)


@pytest.fixture(scope="module", autouse=True)
def programs(emulator: Any) -> None:
    """All of them compiled side by side."""
    emulator.compile_all([case.source for case in CASES.values()] + [broken(n) for n in BROKEN])


@pytest.mark.parametrize("name", CASES)
def test_a_right_kernel_has_no_findings(name: str, emulator: Any, launch: Any) -> None:
    each = CASES[name]
    for seed in range(5):
        assert run(emulator, launch, each, each.source, seed).clean


@pytest.mark.parametrize("name", BROKEN)
def test_a_defect_is_found_in_every_order(name: str, emulator: Any, launch: Any) -> None:
    base, _, _, kind = BROKEN[name]
    for seed in range(3):
        assert kind in run(emulator, launch, CASES[base], broken(name), seed).kinds


def test_a_finding_names_the_element_the_threads_and_the_line(emulator: Any, launch: Any) -> None:
    each = CASES["sums"]
    found = run(emulator, launch, each, broken("rows off by one"), 0).findings
    [beyond] = [f for f in found if f.kind == "out-of-bounds" and f.text.startswith("x")]
    assert beyond.text.endswith("read: 4 bytes at an array of 2000")
    assert beyond.source == "for (int i = threadIdx.x; i < n; i += 64) sum += x[row * n + i];"
    found = run(emulator, launch, each, broken("barrier before the next row removed"), 0).findings
    races = [f.text for f in found if f.kind == "race"]
    assert any(
        text.startswith("parts[")
        and "read by thread" in text
        and "written by thread" in text
        and text.endswith("no barrier between")
        for text in races
    )


@pytest.mark.parametrize(
    ("source", "threads", "shared"),
    [
        (SUMS, 65, 0),
        (COPY, 1025, 0),
        (COPY, 32, 228 * 1024),
        (
            COPY.replace("float kept[4]", "__shared__ int big[12289]; big[0] = 0; float kept[4]"),
            1,
            0,
        ),
    ],
    ids=["launch bounds", "threads", "dynamic shared memory", "static shared memory"],
)
def test_a_launch_beyond_the_limits(
    source: str, threads: int, shared: int, emulator: Any, launch: Any
) -> None:
    each = CASES["sums" if "sums" in source else "copy"]
    words = {**each.launch, "grid": (1, 1, 1), "block": (threads, 1, 1), "shared": shared}
    found = run(emulator, launch, Case(source, words, each.inputs, each.outputs), source, 0)
    assert "launch" in found.kinds


def test_what_is_not_understood_is_refused(emulator: Any, launch: Any) -> None:
    with pytest.raises(ValueError, match="shared memory is not understood"):
        emulator.compile(SUMS.replace("float parts[2]", "float parts[2], more[2]"))
    each = CASES["copy"]
    words = {**each.launch, "args": ["x", "y"]}
    with pytest.raises(AssertionError, match="takes 3 arguments, 2 came"):
        run(emulator, launch, Case(COPY, words, each.inputs, each.outputs), COPY, 0)
    words = {**each.launch, "args": ["x", "y", 1.5]}
    with pytest.raises(AssertionError, match="argument 2 is of another kind"):
        run(emulator, launch, Case(COPY, words, each.inputs, each.outputs), COPY, 0)
