"""Volatile stores that other blocks see late and in any order, but for fences between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SEEDS = range(20)
FENCE = "__threadfence();"
# One thread leaves a value behind, or all threads of its block do, and says so by a flag.
ALONE = """
extern "C" __global__ void tell(const float* x, float* words, int* flag, float* y) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) *(volatile float*)(words + i) = x[i];
      __threadfence();
      *(volatile int*)flag = 1;
    }
  } else if (threadIdx.x < 4) {
    while (!*(volatile int*)flag) {}
    y[threadIdx.x] = *(volatile float*)(words + threadIdx.x);
  }
}
"""
TOGETHER = """
extern "C" __global__ void tell(const float* x, float* words, int* flag, float* y) {
  if (blockIdx.x == 0) {
    if (threadIdx.x < 4) *(volatile float*)(words + threadIdx.x) = x[threadIdx.x];
    __syncthreads();
    __threadfence();
    if (threadIdx.x == 0) *(volatile int*)flag = 1;
  } else if (threadIdx.x < 4) {
    while (!*(volatile int*)flag) {}
    y[threadIdx.x] = *(volatile float*)(words + threadIdx.x);
  }
}
"""
# How often a word that grows is seen to fall, and whether its own block misses a store.
GROWING = """
extern "C" __global__ void tell(const float* x, float* words, int* flag, float* y) {
  int falls = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    for (int i = 1; i <= 9; ++i) {
      *(volatile int*)flag = i;
      falls += *(volatile int*)flag != i;
    }
  } else if (threadIdx.x == 0) {
    for (int now = 0, last = 0; last < 9; last = now) {
      now = *(volatile int*)flag;
      falls += now < last;
    }
  }
  if (threadIdx.x < 2) y[2 * blockIdx.x + threadIdx.x] = falls;
}
"""


def run(source: str, emulator: Any, launch: Any, seed: int) -> Any:
    return emulator.compile(source).run(
        [launch("tell", (2, 1, 1), (32, 1, 1), ["x", "words", "flag", "y"], cooperative=True)],
        inputs={"x": np.arange(4, dtype=np.float32)},
        outputs={"y": ((4,), "float32")},
        scratch={"words": ((4,), "float32")},
        updates={"flag": np.zeros(1, np.int32)},
        seed=seed,
    )


@pytest.mark.parametrize("source", [ALONE, TOGETHER], ids=["a thread", "a block"])
def test_what_lies_before_a_fence_is_seen_first(source: str, emulator: Any, launch: Any) -> None:
    for seed in SEEDS:
        y = run(source, emulator, launch, seed).clean["y"]
        np.testing.assert_array_equal(y, np.arange(4))


@pytest.mark.parametrize("source", [ALONE, TOGETHER], ids=["a thread", "a block"])
@pytest.mark.parametrize("instead", ["", "__threadfence_block();", "__syncwarp();"])
def test_a_fence_left_out_is_found(source: str, instead: str, emulator: Any, launch: Any) -> None:
    text = source.replace(FENCE, instead)
    kinds = [run(text, emulator, launch, seed).kinds for seed in SEEDS]
    assert {"uninitialised-read"} in kinds
    assert set().union(*kinds) == {"uninitialised-read"}


def test_one_word_has_one_order(emulator: Any, launch: Any) -> None:
    for seed in SEEDS:
        assert not run(GROWING, emulator, launch, seed).clean["y"].any()
