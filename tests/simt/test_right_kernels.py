"""Right kernels run without a finding, whatever the order of threads, and give NumPy's numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

SEEDS = range(3)

ROW_SUM = """
extern "C" __global__ void __launch_bounds__(96) row_sum(
    const float* __restrict__ x, float* __restrict__ total, int width) {
  __shared__ alignas(16) float parts[3];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[blockIdx.x * width + i];
  for (int offset = 16; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(0xffffffff, sum, offset, 32);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) total[blockIdx.x] = parts[0] + parts[1] + parts[2];
}
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_of_rows(seed: int, emulator: Any) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 217)).astype(np.float32)
    run = emulator.compile(ROW_SUM).run(
        [("row_sum", (5, 1, 1), (96, 1, 1), ["x", "total", 217])],
        inputs={"x": x},
        outputs={"total": ((5,), "float32")},
        seed=seed,
    )
    np.testing.assert_allclose(run.clean["total"], x.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_vectors_of_sixteen_bytes_and_a_tail(emulator: Any) -> None:
    source = """
    extern "C" __global__ void twice(const float* x, float* y, int n) {
      int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
      if (at + 4 <= n) {
        float4 v = *(const float4*)(x + at);
        *(float4*)(y + at) = make_float4(v.x * 2, v.y * 2, v.z * 2, v.w * 2);
      } else {
        for (; at < n; ++at) y[at] = __ldg(x + at) * 2;
      }
    }
    """
    x = np.arange(103, dtype=np.float32)
    run = emulator.compile(source).run(
        [("twice", (2, 1, 1), (16, 1, 1), ["x", "y", 103])],
        inputs={"x": x},
        outputs={"y": ((103,), "float32")},
    )
    np.testing.assert_array_equal(run.clean["y"], 2 * x)


def test_arrays_of_shared_memory_of_two_ranks_and_of_dynamic_size(emulator: Any) -> None:
    source = """
    extern "C" __global__ void turn(const float* x, float* y) {
      __shared__ float tile[8][9];
      __shared__ int turned;
      extern __shared__ __align__(16) unsigned char buffer[];
      float* row = (float*)buffer;
      if (threadIdx.x == 0 && threadIdx.y == 0) turned = 1;
      tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 8 + threadIdx.x];
      __syncthreads();
      row[threadIdx.y * 8 + threadIdx.x] = tile[threadIdx.x][threadIdx.y] * turned;
      __syncthreads();
      y[63 - (threadIdx.y * 8 + threadIdx.x)] = row[63 - (threadIdx.y * 8 + threadIdx.x)];
    }
    """
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    launch = ("turn", (1, 1, 1), (8, 8, 1), ["x", "y"], 256)
    run = emulator.compile(source).run(
        [launch], inputs={"x": x}, outputs={"y": ((8, 8), "float32")}
    )
    np.testing.assert_array_equal(run.clean["y"], x.T)


def test_products_and_sums_are_rounded_once_where_asked(emulator: Any) -> None:
    source = """
    extern "C" __global__ void rest(const float* x, float* y) {
      float v = x[threadIdx.x];
      float square = v * v;
      y[threadIdx.x] = square - x[threadIdx.x + 32];
    }
    """
    x = np.float32(1 + np.arange(32) * 2.0**-13)
    given = np.concatenate([x, x * x])
    for fused in (False, True):
        run = emulator.compile(source, fused=fused).run(
            [("rest", (1, 1, 1), (32, 1, 1), ["x", "y"])],
            inputs={"x": given},
            outputs={"y": ((32,), "float32")},
        )
        once = x.astype(np.float64) ** 2 - x * x
        np.testing.assert_array_equal(run.clean["y"], once if fused and emulator.fuses else 0 * x)


SHUFFLES = """
extern "C" __global__ void shuffles(const int* x, int* y, int argument) {
  int lane = threadIdx.x, v = x[lane];
  y[lane] = __shfl_sync(0xffffffff, v, argument, WIDTH);
  y[32 + lane] = __shfl_up_sync(0xffffffff, v, argument, WIDTH);
  y[64 + lane] = __shfl_down_sync(0xffffffff, v, argument, WIDTH);
  y[96 + lane] = __shfl_xor_sync(0xffffffff, v, argument, WIDTH);
  y[128 + lane] = __ballot_sync(0xffffffff, v % 3 == 0);
}
"""


@pytest.mark.parametrize("width", [4, 16, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 5, 17])
def test_shuffles_in_segments_of_a_warp(argument: int, width: int, emulator: Any) -> None:
    """As the CUDA C++ programming guide has them: beyond a segment a lane gets its own value."""
    x = np.arange(100, 132, dtype=np.int32)
    run = emulator.compile(SHUFFLES.replace("WIDTH", str(width))).run(
        [("shuffles", (1, 1, 1), (32, 1, 1), ["x", "y", argument])],
        inputs={"x": x},
        outputs={"y": ((5, 32), "int32")},
    )
    lane = np.arange(32)
    first = lane // width * width
    up, down, other = lane - argument, lane + argument, lane ^ argument
    np.testing.assert_array_equal(
        run.clean["y"][:4],
        x[
            [
                first + argument % width,
                np.where(up < first, lane, up),
                np.where(down >= first + width, lane, down),
                np.where(other >= first + width, lane, other),
            ]
        ],
    )
    ballot = int(sum(1 << i for i in range(32) if x[i] % 3 == 0))
    assert set(run.clean["y"][4].view(np.uint32).tolist()) == {ballot}


def test_the_active_lanes_of_a_branch(emulator: Any) -> None:
    source = """
    extern "C" __global__ void active(unsigned* y) {
      if (threadIdx.x % 4 == 1) {
        unsigned mask = __activemask();
        y[threadIdx.x] = __shfl_sync(mask, threadIdx.x, 29);
      } else {
        y[threadIdx.x] = __activemask();
      }
    }
    """
    run = emulator.compile(source).run(
        [("active", (1, 1, 1), (32, 1, 1), ["y"])], inputs={}, outputs={"y": ((32,), "uint32")}
    )
    wanted = np.where(np.arange(32) % 4 == 1, 29, 0xDDDDDDDD)
    np.testing.assert_array_equal(run.clean["y"], wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_meet_at_syncwarp(seed: int, emulator: Any) -> None:
    source = """
    extern "C" __global__ void neighbours(const int* x, int* y) {
      __shared__ int seen[64];
      seen[threadIdx.x] = x[threadIdx.x];
      __syncwarp();
      int from = threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32;
      int v = seen[from];
      __syncwarp();
      seen[threadIdx.x] = v + 1;
      __syncwarp();
      y[threadIdx.x] = seen[from];
    }
    """
    x = np.arange(64, dtype=np.int32)
    run = emulator.compile(source).run(
        [("neighbours", (1, 1, 1), (64, 1, 1), ["x", "y"])],
        inputs={"x": x},
        outputs={"y": ((64,), "int32")},
        seed=seed,
    )
    wanted = np.roll(x.reshape(2, 32), -2, axis=1).reshape(-1) + 1
    np.testing.assert_array_equal(run.clean["y"], wanted)


GRID = """
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
extern "C" __global__ void share(const float* x, float* parts, float* y) {
  if (threadIdx.x == 0) parts[blockIdx.x] = x[blockIdx.x];
  cg::this_grid().sync();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += parts[i];
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_of_the_grid(seed: int, emulator: Any, launch: Any) -> None:
    x = np.arange(6, dtype=np.float32)
    run = emulator.compile(GRID).run(
        [launch("share", (6, 1, 1), (8, 1, 1), ["x", "parts", "y"], cooperative=True)],
        inputs={"x": x},
        outputs={"y": ((48,), "float32")},
        scratch={"parts": ((6,), "float32")},
        seed=seed,
    )
    np.testing.assert_array_equal(run.clean["y"], np.full(48, 15.0))


CLUSTER = """
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
extern "C" __global__ void share(const float* x, float* y) {
  __shared__ float part[1];
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) part[0] = x[blockIdx.x];
  cluster.sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
    sum += *cluster.map_shared_rank(part, rank);
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  cluster.sync();
}
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_of_a_cluster(seed: int, emulator: Any, launch: Any) -> None:
    x = np.arange(8, dtype=np.float32)
    run = emulator.compile(CLUSTER).run(
        [launch("share", (8, 1, 1), (32, 1, 1), ["x", "y"], cluster=(4, 1, 1))],
        inputs={"x": x},
        outputs={"y": ((8, 32), "float32")},
        seed=seed,
    )
    wanted = np.repeat([6.0, 22.0], 4 * 32).reshape(8, 32)
    np.testing.assert_array_equal(run.clean["y"], wanted)


def test_launches_run_in_order_on_the_same_arrays(emulator: Any) -> None:
    source = """
    extern "C" __global__ void first(const double* x, double* half_way, long long n) {
      if (threadIdx.x < n) half_way[threadIdx.x] = x[threadIdx.x] + 0.5;
    }
    extern "C" __global__ void second(const double* half_way, double* total, double by, float* no) {
      total[threadIdx.x] += half_way[63 - threadIdx.x] * by;
      if (no) no[threadIdx.x] = 0;
    }
    """
    x = np.arange(64, dtype=np.float64)
    run = emulator.compile(source).run(
        [
            ("first", (1, 1, 1), (64, 1, 1), ["x", "half_way", 64]),
            ("second", (1, 1, 1), (64, 1, 1), ["half_way", "total", 0.25, None]),
        ],
        inputs={"x": x},
        updates={"total": np.ones(64)},
        scratch={"half_way": ((64,), "float64")},
    )
    np.testing.assert_array_equal(run.clean["total"], 1 + (x[::-1] + 0.5) / 4)


CONVERT = """
#include <HEADER>
extern "C" __global__ void widen(const TYPE* x, float* y) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  y[at] = (float)x[at];
}
extern "C" __global__ void narrow(const float* x, TYPE* y) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  y[at] = (TYPE)x[at];
}
extern "C" __global__ void combine(const TYPE* a, const TYPE* b, TYPE* y) {
  int at = threadIdx.x;
  y[at] = a[at] * b[at] + a[at] / b[at] - b[at];
}
"""
NARROW = {
    "float16": ("half", "cuda_fp16.h", np.dtype(np.float16)),
    "bfloat16": ("nv_bfloat16", "cuda_bf16.h", np.dtype(ml_dtypes.bfloat16)),
}


@pytest.mark.parametrize("name", NARROW)
def test_every_number_of_a_half_type(name: str, emulator: Any) -> None:
    kind, header, dtype = NARROW[name]
    program = emulator.compile(CONVERT.replace("TYPE", kind).replace("HEADER", header))
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    grid, block = (64, 1, 1), (1024, 1, 1)
    wide = program.run(
        [("widen", grid, block, ["x", "y"])],
        inputs={"x": every},
        outputs={"y": (every.shape, "float32")},
    ).clean["y"]
    np.testing.assert_array_equal(wide, every.astype(np.float32))
    # Halfway between neighbours, a little to either side, and what is too large or too small.
    finite = wide[np.isfinite(wide)]
    middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    around = [np.nextafter(middle, np.float32(sign * np.inf)) for sign in (-1, 1)]
    edge = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-45, -7e4, 6e-8], np.float32)
    values = np.concatenate([middle, *around, edge])[-(1 << 17) :]
    values = np.concatenate([values, np.zeros(-len(values) % 1024, np.float32)])
    narrow = program.run(
        [("narrow", (len(values) // 1024, 1, 1), block, ["x", "y"])],
        inputs={"x": values},
        outputs={"y": (values.shape, name)},
    ).clean["y"]
    with np.errstate(over="ignore"):
        wanted = values.astype(dtype)
    np.testing.assert_array_equal(narrow.astype(np.float32), wanted.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(narrow), np.signbit(wanted))


@pytest.mark.parametrize("name", NARROW)
def test_arithmetic_of_a_half_type_rounds_each_step(name: str, emulator: Any) -> None:
    kind, header, dtype = NARROW[name]
    program = emulator.compile(CONVERT.replace("TYPE", kind).replace("HEADER", header))
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.5, 4, 512).astype(dtype) for _ in range(2))
    run = program.run(
        [("combine", (1, 1, 1), (512, 1, 1), ["a", "b", "y"])],
        inputs={"a": a, "b": b},
        outputs={"y": ((512,), name)},
    )
    np.testing.assert_array_equal(run.clean["y"], a * b + a / b - b)
