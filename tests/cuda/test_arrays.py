"""Calls with arrays on CUDA devices: which are taken, where outputs come, what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng
from normgraph.errors import ArgumentError, ArgumentTypeError, DeviceError

SHAPE = (2, 6, 4, 5)


class Foreign:
    """A DLPack producer of another library, which keeps what it was asked."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.streams: list[object] = []

    def __dlpack__(self, *, stream: object = None, **_: Any) -> Any:
        self.streams.append(stream)
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._tensor.device.index


class Strided(Foreign):
    """Of every second element."""

    def __dlpack__(self, *, stream: object = None, **_: Any) -> Any:
        capsule = self._tensor.__dlpack__()
        get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        address = get(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dltensor")
        # dlpack.h's DLTensor: data, device, ndim and dtype, shape, and at 32 the strides.
        strides = ctypes.c_void_p.from_address(address + 32).value
        ctypes.c_int64.from_address(strides or 0).value = 2
        return capsule


def test_outputs_come_on_the_device_of_the_inputs(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    driver.devices(90, 80)
    driver.take()
    for device in (1, 0):
        made = operator.backward(**given(device))
        assert {str(array.device) for array in made} == {f"cuda:{device}"}
        assert all(isinstance(array, tvm_ffi.Tensor) for array in made)
        (line,) = driver.take("launch")
        assert line.startswith(f"launch {device} backward_kernel")


def test_what_is_not_wanted_is_not_allocated(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any, on_host: Callable[[Any], Any]
) -> None:
    inputs = given()
    whole = operator.backward(**inputs)
    driver.take()
    dgamma = operator.backward(**inputs, want="dgamma")
    assert driver.take("alloc") == ["alloc 0 24"]
    np.testing.assert_array_equal(on_host(dgamma), on_host(whole.dgamma))


def test_out_is_written_and_added_to(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
) -> None:
    inputs = given()
    whole = operator.backward(**inputs)
    total = on_device(np.ones(6))
    dx = on_device(np.zeros(SHAPE))
    made = operator.backward(
        **inputs, out={"dgamma": total, "dx": dx}, grad_req={"dgamma": "add", "dbeta": "null"}
    )
    assert made.dx is dx
    assert made.dgamma is total
    np.testing.assert_allclose(on_host(total), on_host(whole.dgamma) + 1, rtol=1e-6)
    np.testing.assert_array_equal(on_host(dx), on_host(whole.dx))


def test_memory_goes_back(operator: Any, given: Callable[..., dict[str, Any]], driver: Any) -> None:
    live = driver.live
    made = operator.backward(**given())
    assert driver.live == live + 3
    del made
    assert driver.live == live


def test_running_statistics_are_updated_in_place(
    operator: Any, on_device: Callable[..., Any], on_host: Callable[[Any], Any]
) -> None:
    x, gamma = on_device(np.random.default_rng(1).standard_normal(SHAPE)), on_device(np.ones(6))
    mean, var = on_device(np.zeros(6)), on_device(np.ones(6))
    operator.forward(
        x, gamma, gamma, mean, var, out={"new_running_mean": mean, "new_running_var": var}
    )
    want = 0.1 * on_host(x).mean(axis=(2, 3)).mean(axis=0)
    np.testing.assert_allclose(on_host(mean), want, rtol=1e-4, atol=1e-6)


def test_other_producers_are_told_the_stream(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    inputs = {name: Foreign(array) for name, array in given().items()}
    operator.backward(**inputs)
    assert [array.streams for array in inputs.values()] == [[1]] * 5
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xABC0):
        operator.backward(**inputs)
    assert [array.streams for array in inputs.values()] == [[1, 0xABC0]] * 5
    assert driver.take("launch")[-1].endswith("stream 0xabc0")


def test_an_input_without_elements_is_answered_without_the_kernel(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
    driver: Any,
) -> None:
    nothing = on_device(np.zeros((0, 6, 4, 5)))
    stat = on_device(np.zeros((0, 6, 1, 1)))
    inputs = given(dy=nothing, x=nothing, mean=stat, inv_std=stat)
    driver.take()
    made = operator.backward(**inputs)
    assert driver.take("launch") == []
    assert tuple(made.dx.shape) == (0, 6, 4, 5)
    np.testing.assert_array_equal(on_host(made.dgamma), np.zeros(6))
    acc = on_device(np.full(6, 2.0))
    operator.backward(**inputs, out={"dbeta": acc}, grad_req={"dbeta": "add"})
    np.testing.assert_array_equal(on_host(acc), np.full(6, 2.0))


def test_numpy_arrays_are_refused(operator: Any, given: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ArgumentError, match=r"gamma must be on a CUDA device.*numpy"):
        operator.backward(**given(gamma=np.ones(6, np.float32)))


def test_arrays_on_the_cpu_are_refused(operator: Any, given: Callable[..., dict[str, Any]]) -> None:
    array = tvm_ffi.from_dlpack(np.ones(6, np.float32))
    with pytest.raises(ArgumentError, match=r"gamma must be on a CUDA device.*DLPack device 1:0"):
        operator.backward(**given(gamma=array))
    with pytest.raises(ArgumentError, match=r"out\['dgamma'\] must be on a CUDA device"):
        operator.backward(**given(), out={"dgamma": array})


def test_arrays_of_two_devices_are_refused(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    driver.devices(90, 90)
    with pytest.raises(ArgumentError, match=r"x must be on cuda:0, as .*dy is, .* on cuda:1"):
        operator.backward(**given(x=given(1)["x"]))
    with pytest.raises(ArgumentError, match=r"out\['dx'\] must be on cuda:0"):
        operator.backward(**given(), out={"dx": given(1)["x"]})


def test_what_is_no_array_is_refused(operator: Any, given: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ArgumentTypeError, match="gamma must be a torch tensor or another DLPack"):
        operator.backward(**given(gamma=[1.0] * 6))


def test_outputs_of_other_producers_are_refused_as_they_may_be_read_only(
    operator: Any, given: Callable[..., dict[str, Any]], on_device: Callable[..., Any]
) -> None:
    with pytest.raises(ArgumentError, match="must be writable"):
        operator.backward(**given(), out={"dgamma": Foreign(on_device(np.ones(6)))})


def test_an_array_that_is_not_compact_is_refused(
    operator: Any, given: Callable[..., dict[str, Any]], on_device: Callable[..., Any]
) -> None:
    array = on_device(np.ones(6))
    with pytest.raises(ArgumentError, match="must be compact"):
        operator.backward(**given(gamma=Strided(array)))


def test_torch_tensors_on_the_cpu_are_refused(
    operator: Any, given: Callable[..., dict[str, Any]]
) -> None:
    torch = pytest.importorskip("torch")
    inputs = {
        name: torch.from_dlpack(tvm_ffi.from_dlpack(np.ones(tuple(array.shape), np.float32)))
        for name, array in given().items()
    }
    with pytest.raises(ArgumentError, match=r"dy must be on a CUDA device, but it is on cpu.*cuda"):
        operator.backward(**inputs)
    mixed = {**given(), "x": inputs["x"]}
    with pytest.raises(ArgumentTypeError, match="some are torch tensors and some other DLPack"):
        operator.backward(**mixed)


def test_cuda_arrays_are_refused_by_cpu_kernels(
    build_operator: Callable[..., Any], given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    on_cpu = build_operator(ng.NormSpec("instance_norm", track_running_stats=True), SHAPE)
    with pytest.raises(ArgumentError, match="dy must be on the CPU, but it is on DLPack device 2"):
        on_cpu.backward(**given())


def test_a_failing_device_is_a_device_error(
    operator: Any, given: Callable[..., dict[str, Any]], driver: Any
) -> None:
    inputs = given()
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(DeviceError, match="backward: CUDA device 0: backward_kernel") as caught:
        operator.backward(**inputs)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.exit_code == 4
    driver.fail("cuMemAlloc_v2", 2)
    with pytest.raises(DeviceError, match=r"cannot be allocated on cuda:0.*Free memory"):
        operator.backward(**inputs)
