"""What TVM's own CUDA generator prints for plain schedules runs as it stands, in every dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import s_tir, te

DTYPES = ("float32", "float16", "bfloat16")
THREADS = 64


@pytest.fixture(autouse=True)
def print_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TVM finds a GPU it would also compile what it prints."""
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")


def cuda_text(schedule: Any) -> str:
    target = tvm.target.Target(
        {"kind": "cuda", "arch": "sm_80", "thread_warp_size": 32, "max_num_threads": 1024},
        host={"kind": "llvm"},
    )
    with target:
        built = tvm.tirx.build(schedule.mod, target=target)
    return str(built.imports[0].inspect_source())


def elementwise(dtype: str, size: int, lanes: int, value: Any) -> str:
    """y = value(x), `lanes` elements a thread as one vector."""
    x = te.placeholder((size,), dtype, name="x")
    y = te.compute((size,), lambda i: value(x[i]).astype(dtype), name="y")
    schedule = s_tir.Schedule(tvm.IRModule({"main": te.create_prim_func([x, y])}))
    [i] = schedule.get_loops(schedule.get_sblock("y"))
    block, thread, lane = schedule.split(i, [None, THREADS, lanes])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    schedule.vectorize(lane)
    return cuda_text(schedule)


def centred(dtype: str, rows: int, width: int) -> str:
    """y = x - sum(x) of each row; the sum over the threads of a block is TVM's own."""
    x = te.placeholder((rows, width), dtype, name="x")
    k = te.reduce_axis((0, width), "k")
    total = te.compute((rows,), lambda i: te.sum(x[i, k].astype("float32"), axis=k), name="total")
    y = te.compute(
        (rows, width),
        lambda i, j: (x[i, j].astype("float32") - total[i]).astype(dtype),
        name="y",
    )
    schedule = s_tir.Schedule(tvm.IRModule({"main": te.create_prim_func([x, y])}))
    summed, out = schedule.get_sblock("total"), schedule.get_sblock("y")
    i, j = schedule.get_loops(out)
    _, inner = schedule.split(j, [None, THREADS])
    schedule.bind(i, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    schedule.compute_at(summed, i)
    schedule.set_scope(summed, 0, "shared")
    _, inner = schedule.split(schedule.get_loops(summed)[-1], [None, THREADS])
    schedule.bind(inner, "threadIdx.x")
    return cuda_text(schedule)


def numbers(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    return np.random.default_rng(0).uniform(-2, 2, shape).astype(like(dtype))


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_elementwise_kernel(dtype: str, lanes: int, emulator: Any, numpy_dtype: Any) -> None:
    size = 2 * THREADS * lanes
    x = numbers((size,), dtype, numpy_dtype)
    source = elementwise(dtype, size, lanes, lambda x: x.astype("float32") * 3.0 + 1.0)
    program = emulator.compile(source)
    [kernel] = program.kernels
    run = program.run(
        [(kernel, (2, 1, 1), (THREADS, 1, 1), ["x", "y"])],
        inputs={"x": x},
        outputs={"y": ((size,), dtype)},
    )
    wanted = (x.astype(np.float32) * np.float32(3) + np.float32(1)).astype(x.dtype)
    np.testing.assert_array_equal(run.clean["y"], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_sixteen_bytes(dtype: str, emulator: Any, numpy_dtype: Any) -> None:
    lanes = 16 // numpy_dtype(dtype).itemsize
    size = THREADS * lanes
    x = numbers((size,), dtype, numpy_dtype)
    program = emulator.compile(elementwise(dtype, size, lanes, lambda x: x))
    launches = [(program.kernels[0], (1, 1, 1), (THREADS, 1, 1), ["x", "y"])]
    outputs = {"y": ((size,), dtype)}
    run = program.run(launches, inputs={"x": x}, outputs=outputs)
    np.testing.assert_array_equal(run.clean["y"], x)
    run = program.run(launches, inputs={"x": x}, outputs=outputs, misaligned={"x": 8})
    assert run.kinds == {"misaligned"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_over_the_threads_of_a_block(dtype: str, emulator: Any, numpy_dtype: Any) -> None:
    x = numbers((5, 200), dtype, numpy_dtype)
    source = centred(dtype, 5, 200)
    assert "__syncthreads" in source
    assert "__shfl_down_sync" in source
    program = emulator.compile(source)
    [kernel] = program.kernels
    wide = x.astype(np.float64)
    wanted = wide - wide.sum(axis=1, keepdims=True)
    unit = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for seed in range(3):
        run = program.run(
            [(kernel, (5, 1, 1), (THREADS, 1, 1), ["x", "y"])],
            inputs={"x": x},
            outputs={"y": ((5, 200), dtype)},
            seed=seed,
        )
        bound = unit * np.abs(wide).sum(axis=1, keepdims=True) * np.ones_like(wanted)
        np.testing.assert_array_less(np.abs(run.clean["y"].astype(np.float64) - wanted), bound)


def test_a_barrier_taken_out_is_missed(emulator: Any, numpy_dtype: Any) -> None:
    """All but the second, between a write and a read of one thread."""
    source = centred("float32", 3, 200)
    parts = source.split("__syncthreads();")
    x = numbers((3, 200), "float32", numpy_dtype)
    missed = []
    for without in range(len(parts) - 1):
        text = parts[0]
        for number, part in enumerate(parts[1:]):
            text += ("" if number == without else "__syncthreads();") + part
        program = emulator.compile(text)
        run = program.run(
            [(program.kernels[0], (3, 1, 1), (THREADS, 1, 1), ["x", "y"])],
            inputs={"x": x},
            outputs={"y": ((3, 200), "float32")},
        )
        missed.append("race" in run.kinds)
    assert missed == [True, False, True]
