"""Values that go to a device and come back, in the order of the stream that kernels run on.

To give memory back waits for the whole device, so these tests hold on to all arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng
from normgraph.errors import DeviceError
from normgraph.graphs import reference

SHAPE = (2, 6, 4, 5)
STREAM = 0xABC0


@pytest.fixture
def on_stream() -> Callable[..., Any]:
    """on_stream(stream=STREAM): the current one of device 0, as long as the context lasts."""
    return lambda stream=STREAM: tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream)


def test_what_another_stream_does_is_not_waited_for(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_host: Callable[[Any], Any],
    on_stream: Callable[..., Any],
    driver: Any,
) -> None:
    """What the other tests rely on: the device is late, and streams have an order of their own."""
    inputs = given()
    with driver.late():
        with on_stream():
            made = operator.backward(**inputs)
        assert np.isnan(on_host(made.dx)).all()
        with on_stream(0xDEF0):
            assert np.isnan(on_host(made.dx)).all()
        with on_stream():
            assert np.isfinite(on_host(made.dx)).all()


def test_results_are_read_behind_the_kernels(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_host: Callable[[Any], Any],
    on_stream: Callable[..., Any],
    driver: Any,
) -> None:
    inputs = given()
    want = on_host(operator.backward(**inputs).dx)
    with driver.late(), on_stream():
        made = operator.backward(**inputs)
        np.testing.assert_array_equal(on_host(made.dx), want)


def test_a_number_is_there_before_the_kernel_reads_it(
    build_plain: Callable[..., Any],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
    on_stream: Callable[..., Any],
    driver: Any,
) -> None:
    spec = ng.NormSpec("instance_norm", track_running_stats=True, momentum=None)
    built = build_plain(spec, ("N", 6, 4, 5), kinds=("forward",))
    driver.kernels(built.host_kernels)
    operator = ng.load(built.path)
    rng = np.random.default_rng(2)
    values = {"x": rng.standard_normal(SHAPE), "gamma": rng.standard_normal(6)}
    values |= {"beta": rng.standard_normal(6), "running_mean": rng.standard_normal(6)}
    values |= {"running_var": np.ones(6)}
    arrays = {name: on_device(value) for name, value in values.items()}
    want = reference.run(spec, "forward", {**values, "momentum": np.array(0.25)})
    with driver.late(), on_stream():
        made = operator.forward(**arrays, momentum=0.25)
        got = on_host(made.new_running_mean)
    np.testing.assert_allclose(got, want["new_running_mean"], rtol=1e-5, atol=1e-6)


def test_the_answer_without_elements_keeps_the_order(
    operator: Any,
    given: Callable[..., dict[str, Any]],
    on_device: Callable[..., Any],
    on_host: Callable[[Any], Any],
    on_stream: Callable[..., Any],
    driver: Any,
) -> None:
    """It overwrites, and adds to, what kernels before it on the stream write."""
    inputs = given()
    stat, nothing = on_device(np.zeros((0, 6, 1, 1))), on_device(np.zeros((0, 6, 4, 5)))
    without = {**inputs, "dy": nothing, "x": nothing, "mean": stat, "inv_std": stat}
    want = on_host(operator.backward(**inputs).dgamma)
    dgamma, dbeta = on_device(np.full(6, 5.0)), on_device(np.full(6, 5.0))
    out, names = {"dgamma": dgamma, "dbeta": dbeta}, ("dgamma", "dbeta")
    with driver.late(), on_stream():
        operator.backward(**inputs, want=names, out=out)
        operator.backward(**without, want=names, out=out, grad_req={"dgamma": "add"})
        np.testing.assert_array_equal(on_host(dgamma), want)
        np.testing.assert_array_equal(on_host(dbeta), np.zeros(6))


def test_an_artifact_is_tested_on_the_default_stream(
    instance_norm: Path, on_stream: Callable[..., Any], driver: Any
) -> None:
    with driver.late(), on_stream():
        operator = ng.load(instance_norm)
        lines = driver.take("launch")
        assert lines
        assert {line.split()[-1] for line in lines} == {"(nil)"}
        assert operator.self_test()
        assert tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)) == STREAM


def test_a_build_is_tested_on_the_default_stream(
    build_plain: Callable[..., Any],
    fake_compiler: Any,
    on_stream: Callable[..., Any],
    driver: Any,
    tmp_path: Path,
) -> None:
    del fake_compiler
    built = build_plain(ng.NormSpec("rms_norm"), ("N", 8), kinds=("inference",))
    driver.kernels(built.host_kernels)
    said: list[str] = []
    with driver.late(), on_stream():
        ng.compile.build(
            built.path.parent / "graphs", "cuda", tmp_path / "a", progress=said.append, cache=False
        )
    assert "self-test of cuda" in said
    assert {line.split()[-1] for line in driver.take("launch")} == {"(nil)"}


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"])
def test_a_copy_that_fails_is_a_device_error(
    call: str, instance_norm: Path, on_device: Callable[..., Any], driver: Any
) -> None:
    driver.fail(call, 700)
    with pytest.raises(DeviceError, match=f"copied to or from cuda:0: {call}: CUDA_ERROR_ILLEGAL"):
        on_device(np.zeros(6))
    with pytest.raises(DeviceError, match="copied to or from cuda:0"):
        ng.load(instance_norm)


def test_a_device_that_fails_in_the_self_test_is_no_damaged_artifact(
    instance_norm: Path, driver: Any
) -> None:
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(DeviceError, match=r"device 0: \w+_kernel: CUDA_ERROR_ILLEGAL_ADDRESS"):
        ng.load(instance_norm)
