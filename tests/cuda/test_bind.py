"""Bound calls on CUDA devices: nothing but launches, on the stream of each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from normgraph.errors import ArgumentError, DeviceError

SHAPE = (2, 6, 4, 5)


class Foreign:
    """A DLPack producer of another library."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._tensor.device.index


def test_it_writes_the_same_arrays_and_only_launches(
    operator: Any, given: Callable[..., dict[str, Any]], on_host: Callable[[Any], Any], driver: Any
) -> None:
    driver.devices(90, 80)
    inputs = given(1)
    want = operator.backward(**inputs)
    call = operator.bind("backward", **inputs)
    driver.take()
    first = call()
    words = [line.split()[0] for line in driver.take()]
    assert "launch" in words
    assert not set(words) & {"alloc", "free", "load"}
    assert call() is first
    assert all(line.startswith("launch 1 ") for line in driver.take("launch"))
    for name in ("dx", "dgamma", "dbeta"):
        assert str(getattr(first, name).device) == "cuda:1"
        np.testing.assert_array_equal(on_host(getattr(first, name)), on_host(getattr(want, name)))


def test_out_want_and_add(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
) -> None:
    inputs = given()
    whole = operator.backward(**inputs)
    total, dx = on_device(np.ones(6)), on_device(np.zeros(SHAPE))
    call = operator.bind(
        "backward",
        **inputs,
        want=("dx", "dgamma"),
        out={"dgamma": total, "dx": dx},
        grad_req={"dgamma": "add"},
    )
    for times in (1, 2):
        made = call()
        assert made.dx is dx
        assert made.dgamma is total
        np.testing.assert_allclose(
            on_host(total), 1 + times * on_host(whole.dgamma), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_array_equal(on_host(dx), on_host(whole.dx))


def test_the_stream_is_that_of_each_call(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    device = tvm_ffi.device("cuda", 0)
    with tvm_ffi.use_raw_stream(device, 0xAA0):
        call = operator.bind("backward", **given())
    driver.take()
    for stream in (0xBB0, 0xCC0):
        with tvm_ffi.use_raw_stream(device, stream):
            call()
        lines = driver.take("launch")
        assert lines
        assert all(line.endswith(f"stream {stream:#x}") for line in lines)
    call()
    assert not [line for line in driver.take("launch") if line.endswith(("aa0", "bb0", "cc0"))]


def test_in_a_capture_it_only_launches(
    operator: Any, given: Callable[..., dict[str, Any]], on_host: Callable[[Any], Any], driver: Any
) -> None:
    inputs = given()
    call = operator.bind("backward", **inputs)
    driver.take()
    with driver.capture(), tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xC0):
        made = call()
        lines = driver.take()
    assert not [line for line in lines if line.startswith(("forbidden", "alloc", "free"))]
    launches = [line for line in lines if line.startswith("launch")]
    assert launches
    assert all(line.endswith("stream 0xc0") for line in launches)
    np.testing.assert_array_equal(on_host(made.dx), on_host(operator.backward(**inputs).dx))


def test_running_statistics_are_updated_in_place(
    operator: Any, on_device: Callable[..., Any], on_host: Callable[[Any], Any]
) -> None:
    x, gamma = on_device(np.random.default_rng(1).standard_normal(SHAPE)), on_device(np.ones(6))
    mean, var = on_device(np.zeros(6)), on_device(np.ones(6))
    out = {"new_running_mean": mean, "new_running_var": var}
    call = operator.bind("forward", x, gamma, gamma, mean, var, out=out)
    batch = on_host(x).mean(axis=(2, 3)).mean(axis=0)
    for kept in (0.9, 0.81):
        call()
        np.testing.assert_allclose(on_host(mean), (1 - kept) * batch, rtol=1e-4, atol=1e-6)


def test_an_input_without_elements(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
    driver: Any,
) -> None:
    nothing, stat = on_device(np.zeros((0, 6, 4, 5))), on_device(np.zeros((0, 6, 1, 1)))
    total = on_device(np.full(6, 2.0))
    call = operator.bind(
        "backward",
        **given(dy=nothing, x=nothing, mean=stat, inv_std=stat),
        out={"dbeta": total},
        grad_req={"dbeta": "add"},
    )
    driver.take()
    for _ in range(2):
        made = call()
        assert driver.take("launch") == []
        assert tuple(made.dx.shape) == (0, 6, 4, 5)
        np.testing.assert_array_equal(on_host(made.dgamma), np.zeros(6))
        np.testing.assert_array_equal(on_host(total), np.full(6, 2.0))


def test_memory_is_held_and_goes_back(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    live = driver.live
    call = operator.bind("backward", **given())
    assert driver.live == live + 5 + 3
    call()
    del call
    assert driver.live == live


def test_what_is_refused(
    operator: Any, given: Callable[..., dict[str, Any]], on_device: Callable[..., Any], driver: Any
) -> None:
    driver.devices(90, 90)
    foreign = {name: Foreign(array) for name, array in given().items()}
    with pytest.raises(ArgumentError, match=r"cannot be bound on a device.*tvm_ffi.from_dlpack"):
        operator.bind("backward", **foreign)
    with pytest.raises(ArgumentError, match="must be on a CUDA device"):
        operator.bind("backward", **given(gamma=np.ones(6, np.float32)))
    with pytest.raises(ArgumentError, match="x must be on cuda:0"):
        operator.bind("backward", **given(x=given(1)["x"]))
    inputs = given()
    with pytest.raises(ArgumentError, match="must not share memory with x"):
        operator.bind("backward", **inputs, out={"dx": inputs["x"]})


def test_a_failing_device_is_a_device_error(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    call = operator.bind("backward", **given())
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(DeviceError, match="backward: CUDA device 0: backward_kernel"):
        call()
    driver.fail("", 0)
    call()
