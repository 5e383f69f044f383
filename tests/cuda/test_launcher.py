"""What the launcher asks of the driver: code, launches, streams, contexts, workspaces, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from tvm import tirx
from tvm.ir.prim.expr import FloatImm, IntImm

from normgraph.compile import tir


def i32(value: int) -> Any:
    return IntImm("int32", value)


def i64(value: int) -> Any:
    return IntImm("int64", value)


def buffer(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    size = tirx.Var("n", "int64")
    return size, tirx.decl_buffer((size,), dtype, name, data_alignment=4)


def wide(index: Any) -> Any:
    return tirx.Cast("int64", index)


def scale_and_add(launch: Callable[..., Any]) -> Any:
    """y = x * 2 in one kernel, and z = y + k in the next, over n elements."""
    n, x = buffer("x")
    y = tirx.decl_buffer((n,), "float32", "y", data_alignment=4)
    z = tirx.decl_buffer((n,), "float32", "z", data_alignment=4)
    k = tirx.Var("k", "int64")
    blocks = tirx.FloorDiv(tirx.Add(n, i64(31)), i64(32))

    def scale(bx: Any, tx: Any) -> Any:
        at = tirx.Add(tirx.Mul(bx, i64(32)), wide(tx))
        double = tirx.Mul(tirx.BufferLoad(x, [at]), FloatImm("float32", 2.0))
        return tirx.IfThenElse(tirx.LT(at, n), tirx.BufferStore(y, double, [at]), None)

    def add(bx: Any, by: Any, bz: Any, tx: Any, ty: Any, tz: Any) -> Any:
        del by, bz, ty, tz
        at = tirx.Add(tirx.Mul(wide(bx), i64(8)), wide(tx))
        total = tirx.Add(tirx.BufferLoad(y, [at]), tirx.Cast("float32", k))
        return tirx.IfThenElse(tirx.LT(at, n), tirx.BufferStore(z, total, [at]), None)

    first = launch({"blockIdx.x": blocks, "threadIdx.x": i32(32)}, scale)
    sizes = {"blockIdx.x": tirx.FloorDiv(tirx.Add(n, i64(7)), i64(8)), "blockIdx.y": i32(2)}
    sizes |= {"blockIdx.z": i32(3), "threadIdx.x": i32(8), "threadIdx.y": i32(2)}
    second = launch({**sizes, "threadIdx.z": i32(1)}, add)
    return tirx.PrimFunc([x, y, z, k], tirx.SeqStmt([first, second]))


def through_workspaces(launch: Callable[..., Any]) -> Any:
    """y = x by way of two workspaces of n and 2 n elements."""
    n, x = buffer("x")
    y = tirx.decl_buffer((n,), "float32", "y", data_alignment=4)
    first = tirx.decl_buffer((n,), "float32", "first", scope="global")
    second = tirx.decl_buffer((tirx.Mul(n, i64(2)),), "float32", "second", scope="global")

    def copy(source: Any, target: Any) -> Any:
        def body(bx: Any, tx: Any) -> Any:
            del tx
            return tirx.BufferStore(target, tirx.BufferLoad(source, [bx]), [bx])

        return launch({"blockIdx.x": n, "threadIdx.x": i32(1)}, body)

    steps = [tirx.AllocBuffer(first), tirx.AllocBuffer(second)]
    steps += [copy(x, first), copy(first, second), copy(second, y)]
    return tirx.PrimFunc([x, y], tirx.SeqStmt(steps))


def with_shared(launch: Callable[..., Any], nbytes: int) -> Any:
    """y[0] = x[0] by way of dynamic shared memory."""
    n, x = buffer("x")
    y = tirx.decl_buffer((n,), "float32", "y", data_alignment=4)
    shared = tirx.decl_buffer((nbytes // 4,), "float32", "held", scope="shared.dyn")

    def body(tx: Any) -> Any:
        put = tirx.BufferStore(shared, tirx.BufferLoad(x, [wide(tx)]), [tx])
        get = tirx.BufferStore(y, tirx.BufferLoad(shared, [tx]), [wide(tx)])
        return tirx.SeqStmt([tirx.AllocBuffer(shared), put, get])

    return tirx.PrimFunc([x, y], launch({"threadIdx.x": i32(1)}, body))


@pytest.fixture
def scaling(link_library: Callable[..., Any], launch: Callable[..., Any], driver: Any) -> Any:
    library = link_library({"scale": scale_and_add(launch)})
    driver.kernels(library.host_kernels)
    return library


@pytest.fixture
def arrays(on_device: Callable[..., Any], driver: Any) -> Callable[..., list[Any]]:
    def make(size: int, device: int = 0, count: int = 3) -> list[Any]:
        values = [np.arange(size), *(np.zeros(size) for _ in range(count - 1))]
        made = [on_device(each, device) for each in values]
        driver.take()
        return made

    return make


def test_arguments_and_sizes_arrive(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any, on_host: Callable[[Any], Any]
) -> None:
    x, y, z = arrays(100)
    scaling.module["scale"](x, y, z, 7)
    np.testing.assert_array_equal(on_host(y), 2 * np.arange(100))
    np.testing.assert_array_equal(on_host(z), 2 * np.arange(100) + 7)
    first, second = driver.take("launch")
    assert first.startswith("launch 0 scale_kernel grid 4 1 1 block 32 1 1 shared 0")
    assert second.startswith("launch 0 scale_kernel_1 grid 13 2 3 block 8 2 1 shared 0")


def test_each_device_gets_its_own_code(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any
) -> None:
    driver.devices(80, 90, 86, 120)
    every = [arrays(8, device) for device in range(4)]
    for device in (0, 1, 2, 3, 3, 2, 1, 0):
        scaling.module["scale"](*every[device], 0)
    lines = driver.take("load", "function", "launch")
    # mode 2: what a capture elsewhere forbids is allowed here
    assert [line for line in lines if line.startswith("load")] == [
        "load 0 mode 2: image of sm_80",
        "load 1 mode 2: image of sm_90",
        "load 2 mode 2: image of sm_80",
        "load 3 mode 2: image of compute_90",
    ]
    functions = [line for line in lines if line.startswith("function")]
    assert len(functions) == len(set(functions)) == 8
    launched_on = [line.split()[1] for line in lines if line.startswith("launch")]
    assert launched_on == [d for d in "01233210" for _ in range(2)]


def test_later_calls_only_launch(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any
) -> None:
    given = arrays(8)
    scaling.module["scale"](*given, 0)
    driver.take()
    scaling.module["scale"](*given, 0)
    assert {line.split()[0] for line in driver.take()} == {"push", "launch", "pop"}


def test_the_callers_context_is_left_as_it_was(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any
) -> None:
    driver.devices(90, 90)
    given = arrays(8, 1)
    scaling.module["scale"](*given, 0)
    lines = driver.take("push", "pop")
    assert lines.count("push 1") == lines.count("pop 1") > 0
    assert not any(line.endswith(" 0") for line in lines)


@pytest.mark.parametrize("stream", [0, 0xABC0])
def test_kernels_run_on_the_callers_stream(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any, stream: int
) -> None:
    given = arrays(8)
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream):
        scaling.module["scale"](*given, 0)
    shown = hex(stream) if stream else "(nil)"
    assert [line.split()[-1] for line in driver.take("launch")] == [shown, shown]


def test_nothing_is_launched_over_no_blocks(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any
) -> None:
    given = arrays(0)
    scaling.module["scale"](*given, 0)
    assert driver.take("launch") == []


def test_workspaces_are_taken_and_given_back_in_order_of_the_stream(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
    on_host: Callable[[Any], Any],
) -> None:
    library = link_library({"copy": through_workspaces(launch)})
    driver.kernels(library.host_kernels)
    x, y = arrays(6, count=2)
    live = driver.live
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xC0):
        library.module["copy"](x, y)
    np.testing.assert_array_equal(on_host(y), np.arange(6))
    lines = driver.take("pool", "workspace", "launch", "release")
    counts = {"pool": 2, "workspace": 2, "launch": 3, "release": 2}
    assert [line.split()[0] for line in lines] == [w for w, n in counts.items() for _ in range(n)]
    assert lines[0] == "pool type 1 location 1 0 mode 2"
    assert lines[1] == f"pool 0 keeps 4={2**64 - 1}"
    assert lines[2:4] == ["workspace 0 24 stream 0xc0", "workspace 0 48 stream 0xc0"]
    assert lines[-2:] == ["release stream 0xc0"] * 2
    assert driver.live == live
    library.module["copy"](x, y)
    assert driver.take("pool") == []


def test_a_failed_call_gives_its_workspaces_back(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    library = link_library({"copy": through_workspaces(launch)})
    driver.kernels(library.host_kernels)
    x, y = arrays(6, count=2)
    live = driver.live
    driver.fail("cuLaunchKernel", 700)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            library.module["copy"](x, y)
    assert driver.live == live
    driver.fail("", 0)
    library.module["copy"](x, y)
    assert driver.live == live


def test_a_call_that_gets_only_some_of_its_workspaces_gives_them_back(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    library = link_library({"copy": through_workspaces(launch)})
    x, y = arrays(6, count=2)
    live = driver.live
    for _ in range(3):
        driver.fail("cuMemAllocFromPoolAsync", 2, after=1)
        with pytest.raises(RuntimeError, match="allocating a workspace"):
            library.module["copy"](x, y)
        assert [line.split()[0] for line in driver.take("workspace", "release")] == [
            "workspace",
            "release",
        ]
        assert driver.live == live


def test_what_host_code_leaves_goes_back_with_the_next_call(
    link_library: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    """Of the device and in the order of the stream it was taken on."""
    n, x = buffer("x")
    held = tirx.decl_buffer((n,), "float32", "held", scope="global")
    small = tir.demand(tirx.LT(n, i64(8)), "too many")
    func = tirx.PrimFunc([x], tirx.SeqStmt([tirx.AllocBuffer(held), small]))
    library = link_library({"hold": func})
    driver.devices(90, 90)
    few, many = arrays(4, 1, count=1), arrays(9, 0, count=1)
    live = driver.live
    with (
        tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xC0),
        pytest.raises(ValueError, match="too many"),
    ):
        library.module["hold"](*many)
    driver.take()
    library.module["hold"](*few)
    assert driver.live == live
    lines = driver.take("push", "release", "workspace")
    assert lines[:2] == ["push 0", "release stream 0xc0"]
    assert lines[-1] == "release stream (nil)"


def test_dynamic_shared_memory_is_asked_for_once(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    library = link_library({"hold": with_shared(launch, 100 * 1024)})
    given = arrays(1, count=2)
    library.module["hold"](*given)
    library.module["hold"](*given)
    lines = driver.take("attribute", "launch")
    assert lines[0] == f"attribute hold_kernel 8={100 * 1024}"
    assert [line.split()[0] for line in lines] == ["attribute", "launch", "launch"]
    assert f"shared {100 * 1024}" in lines[1]


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("cuInit", 100, "cuInit: CUDA_ERROR_NO_DEVICE"),
        ("cuDevicePrimaryCtxRetain", 2, "opening the device"),
        ("cuModuleLoadDataEx", 209, "loading code for sm_90: ptxas fatal: fake: CUDA_ERROR_NO_BIN"),
        ("cuModuleGetFunction", 500, "scale_kernel"),
        ("cuLaunchKernel", 700, r"device 0: scale_kernel: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"),
        ("cuLaunchKernel", 3, "start it with spawn"),
    ],
)
def test_an_error_of_the_driver_says_what_was_done_and_can_be_overcome(
    scaling: Any,
    arrays: Callable[..., list[Any]],
    driver: Any,
    call: str,
    status: int,
    words: str,
) -> None:
    given = arrays(8)
    driver.fail(call, status)
    with pytest.raises(RuntimeError, match=words):
        scaling.module["scale"](*given, 0)
    driver.fail("", 0)
    scaling.module["scale"](*given, 0)
    assert len(driver.take("launch")) == 2


def test_a_failed_pool_is_told(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    library = link_library({"copy": through_workspaces(launch)})
    given = arrays(6, count=2)
    driver.fail("cuMemPoolCreate", 801)
    with pytest.raises(RuntimeError, match="making a memory pool"):
        library.module["copy"](*given)
    driver.fail("cuMemAllocFromPoolAsync", 2)
    with pytest.raises(RuntimeError, match="allocating a workspace"):
        library.module["copy"](*given)


def test_without_a_driver_a_call_says_so(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = link_library({"scale": scale_and_add(launch)})
    given = arrays(8)
    monkeypatch.setenv("NORMGRAPH_LIBCUDA", "libnothing.so.1")
    with pytest.raises(RuntimeError, match=r"no CUDA driver here: libnothing\.so\.1"):
        library.module["scale"](*given, 0)


def test_a_grid_beyond_cudas_limits_is_refused(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    n, x = buffer("x")
    store = tirx.BufferStore(x, FloatImm("float32", 0.0), [i64(0)])
    wanted = {"blockIdx.y": tirx.Mul(n, i64(40000)), "threadIdx.x": i32(1)}
    func = tirx.PrimFunc([x], launch(wanted, lambda by, tx: store))
    library = link_library({"tall": func})
    with pytest.raises(RuntimeError, match="80000 along y is beyond what CUDA takes"):
        library.module["tall"](*arrays(2, count=1))


def test_many_threads_load_once(
    scaling: Any, arrays: Callable[..., list[Any]], driver: Any, on_host: Callable[[Any], Any]
) -> None:
    every = [arrays(64) for _ in range(8)]
    barrier = threading.Barrier(8)

    def run(given: list[Any]) -> None:
        barrier.wait()
        for k in range(20):
            scaling.module["scale"](*given, k)

    workers = [threading.Thread(target=run, args=(given,)) for given in every]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = driver.take("load", "launch")
    assert sum(line.startswith("load") for line in lines) == 1
    assert sum(line.startswith("launch") for line in lines) == 8 * 20 * 2
    for given in every:
        np.testing.assert_array_equal(on_host(given[2]), 2 * np.arange(64) + 19)


def test_no_image_for_a_device_is_told_by_the_call(
    link_library: Callable[..., Any],
    launch: Callable[..., Any],
    arrays: Callable[..., list[Any]],
    driver: Any,
) -> None:
    library = link_library({"scale": scale_and_add(launch)}, archs=("sm_90",))
    driver.devices(100)
    with pytest.raises(RuntimeError, match="device 0 is sm_100, and the library holds code for sm"):
        library.module["scale"](*arrays(8), 0)
