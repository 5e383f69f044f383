"""Calls while a CUDA graph is captured: nothing in it waits, allocates or loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from tvm import tirx
from tvm.ir.prim.expr import IntImm

import normgraph as ng
from normgraph.errors import DeviceError
from normgraph.runtime import cuda_arrays

SHAPE = (2, 6, 4, 5)
REFUSED = "CUDA_ERROR"


@pytest.fixture
def copying(link_library: Callable[..., Any], launch: Callable[..., Any], driver: Any) -> Any:
    """y = x by way of a workspace, in two kernels."""
    n = tirx.Var("n", "int64")
    x = tirx.decl_buffer((n,), "float32", "x", data_alignment=4)
    y = tirx.decl_buffer((n,), "float32", "y", data_alignment=4)
    between = tirx.decl_buffer((n,), "float32", "between", scope="global")

    def copy(source: Any, target: Any) -> Any:
        def body(bx: Any, tx: Any) -> Any:
            del tx
            return tirx.BufferStore(target, tirx.BufferLoad(source, [bx]), [bx])

        return launch({"blockIdx.x": n, "threadIdx.x": IntImm("int32", 1)}, body)

    steps = [tirx.AllocBuffer(between), copy(x, between), copy(between, y)]
    library = link_library({"copy": tirx.PrimFunc([x, y], tirx.SeqStmt(steps))})
    driver.kernels(library.host_kernels)
    return library.module["copy"]


@pytest.fixture
def pair(on_device: Callable[..., Any], driver: Any) -> Callable[..., tuple[Any, Any]]:
    """pair(device=0): an array of 0 to 5 and one of zeros."""

    def make(device: int = 0) -> tuple[Any, Any]:
        made = on_device(np.arange(6), device), on_device(np.zeros(6), device)
        driver.take()
        return made

    return make


def test_a_first_call_takes_its_loading_out_of_the_capture(
    copying: Any, pair: Callable[..., tuple[Any, Any]], driver: Any, on_host: Callable[..., Any]
) -> None:
    x, y = pair()
    with driver.capture(), tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xC0):
        copying(x, y)
        lines = driver.take()
        # What was allowed for the loading is forbidden again behind it.
        with pytest.raises(DeviceError, match=REFUSED):
            cuda_arrays.owned_tensor((1,), "float32")
    assert not [line for line in lines if line.startswith("forbidden")]
    assert [line for line in lines if line.startswith(("load", "pool type"))] == [
        "load 0 mode 2: image of sm_90",
        "pool type 1 location 1 0 mode 2",
    ]
    ordered = [line for line in lines if line.split()[0] in ("workspace", "launch", "release")]
    assert [line.split()[0] for line in ordered] == ["workspace", "launch", "launch", "release"]
    assert all(line.endswith("stream 0xc0") for line in ordered)
    np.testing.assert_array_equal(on_host(y), np.arange(6))


def test_a_later_call_only_launches(
    copying: Any, pair: Callable[..., tuple[Any, Any]], driver: Any
) -> None:
    x, y = pair()
    copying(x, y)
    driver.take()
    with driver.capture():
        copying(x, y)
    words = {line.split()[0] for line in driver.take()}
    assert words == {"push", "workspace", "launch", "release", "pop"}


def test_loading_that_fails_leaves_the_capture_as_it_was(
    copying: Any, pair: Callable[..., tuple[Any, Any]], driver: Any
) -> None:
    x, y = pair()
    with driver.capture():
        for call in ("cuModuleLoadDataEx", "cuMemPoolCreate"):
            driver.fail(call, 209)
            with pytest.raises(RuntimeError, match="NO_BINARY"):
                copying(x, y)
            driver.fail("", 0)
            with pytest.raises(DeviceError, match=REFUSED):
                cuda_arrays.owned_tensor((1,), "float32")
        driver.take()
        copying(x, y)
    assert len(driver.take("launch")) == 2


def test_captures_on_several_devices(
    copying: Any, pair: Callable[..., tuple[Any, Any]], driver: Any, on_host: Callable[..., Any]
) -> None:
    driver.devices(80, 90, 90)
    arrays = {device: pair(device) for device in (2, 0)}
    with driver.capture():
        for device in (2, 0, 2):
            copying(*arrays[device])
    lines = driver.take()
    assert not [line for line in lines if line.startswith("forbidden")]
    assert [line for line in lines if line.startswith("load")] == [
        "load 2 mode 2: image of sm_90",
        "load 0 mode 2: image of sm_80",
    ]
    assert [line.split()[1] for line in lines if line.startswith("launch")] == list("220022")
    depth = [line.split()[0] for line in lines if line.startswith(("push", "pop"))]
    assert depth.count("push") == depth.count("pop")
    for _, y in arrays.values():
        np.testing.assert_array_equal(on_host(y), np.arange(6))


def test_an_array_that_is_dropped_goes_back_and_leaves_the_capture_as_it_was(
    on_device: Callable[..., Any], driver: Any
) -> None:
    live = driver.live
    array = on_device(np.zeros(6))
    driver.take()
    with driver.capture():
        del array
        assert driver.take("free", "forbidden") == ["free 0 mode 2"]
        assert driver.live == live
        with pytest.raises(DeviceError, match=REFUSED):
            cuda_arrays.owned_tensor((1,), "float32")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_array_that_cannot_be_given_back_leaves_the_capture_as_it_was(
    on_device: Callable[..., Any], driver: Any
) -> None:
    array = on_device(np.zeros(6))
    driver.fail("cuMemFree_v2", 700)
    with driver.capture():
        del array
        with pytest.raises(DeviceError, match=REFUSED):
            cuda_arrays.owned_tensor((1,), "float32")


def test_values_are_not_copied_in_a_capture(
    pair: Callable[..., tuple[Any, Any]], driver: Any
) -> None:
    x, _ = pair()
    with driver.capture(), pytest.raises(DeviceError, match="While a CUDA graph is captured"):
        cuda_arrays.memory_view(x, "float32")


def test_an_operator_with_outputs_given(
    instance_norm: Path, on_device: Callable[..., Any], on_host: Callable[..., Any], driver: Any
) -> None:
    operator = ng.load(instance_norm)
    rng = np.random.default_rng(5)
    stat, values = (2, 6, 1, 1), {n: rng.standard_normal(SHAPE) for n in ("dy", "x")}
    values |= {"gamma": rng.standard_normal(6), "mean": np.zeros(stat), "inv_std": np.ones(stat)}
    given = {name: on_device(value) for name, value in values.items()}
    out = {"dx": on_device(np.zeros(SHAPE)), "dgamma": on_device(np.zeros(6))}
    driver.take()
    with driver.capture():
        operator.backward(**given, out=out, want=("dx", "dgamma"))
        words = {line.split()[0] for line in driver.take()}
        assert "launch" in words
        assert not words & {"forbidden", "alloc", "free"}
        # Arrays that the driver would have to allocate: PyTorch's allocator would know what to do.
        with pytest.raises(DeviceError, match="cannot be allocated"):
            operator.backward(**given)
    want = operator.backward(**given)
    np.testing.assert_array_equal(on_host(out["dx"]), on_host(want.dx))
    np.testing.assert_array_equal(on_host(out["dgamma"]), on_host(want.dgamma))


def test_the_launcher_knows_no_call_that_waits(repository: Path) -> None:
    text = "".join(path.read_text() for path in (repository / "compile").glob("cuda_*.[ch]"))
    known = set(re.findall(r'"(cu[A-Z]\w+)"', text))
    assert {
        "cuLaunchKernel",
        "cuMemAllocFromPoolAsync",
        "cuThreadExchangeStreamCaptureMode",
    } <= known
    assert not [
        n for n in known if re.search(r"Synchronize|Query|Wait|MemAlloc_|Memcpy|MemFree_", n)
    ]
