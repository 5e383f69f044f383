"""Large outputs of calls lie in pooled memory, and what lay there before never shows."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng
from normgraph.errors import ArgumentError
from normgraph.runtime import OutputPool
from normgraph.runtime.call import Call

LENGTH = 20000  # of the toy's x, (2, 3, LENGTH): 480 KB in float32, 240 KB in float16


@pytest.fixture(autouse=True)
def pool() -> Iterator[OutputPool]:
    """The pool that calls use, empty of what other tests left; its limit is put back."""
    gc.collect()
    limit = ng.pool.limit
    ng.pool.clear()
    yield ng.pool
    ng.pool.limit = limit
    ng.pool.clear()


def poison(pool: OutputPool, like: tuple[Any, ...]) -> None:
    """Leave bits that are NaN in every float type in several cached blocks for such arrays."""
    arrays = [pool.empty(array.shape, array.dtype) for array in like for _ in range(3)]
    for array in arrays:
        array.view(np.uint8).fill(0xFF)


def outputs_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_kind_with_numpy(toy: Any, pool: OutputPool, dtype: str) -> None:
    op = toy.operator(dtype)
    for kind in op.kinds:
        inputs = toy.inputs(kind, length=LENGTH, dtype=np.dtype(dtype))
        places = set()
        for _ in range(3):  # the first call takes the full path, the others the short one
            result = outputs_of(op.call(kind, *inputs))
            large = result[0]
            assert not large.flags.owndata
            assert type(large) is np.ndarray
            places.add(large.__array_interface__["data"][0])
            for spec, got in zip(op.signature(kind).outputs, result, strict=True):
                assert got.dtype is np.dtype(spec.dtype)
                assert got.flags.owndata == (got.nbytes < 128 * 1024)
                # Sums over many small integers are exact in float32, but not in float16.
                if dtype != "float16" or got is large:
                    answer = toy.outputs(kind, inputs)[spec.name]
                    np.testing.assert_array_equal(got, answer.astype(dtype))
            del result, got, large
        assert len(places) == 1
        assert pool.stats().in_use == 0


def test_bfloat16_arrays(toy: Any, pool: OutputPool) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    op = toy.operator("bfloat16")
    inputs = toy.inputs("inference", length=LENGTH, dtype=ml_dtypes.bfloat16)
    for _ in range(2):
        y = op.inference(*inputs)
        assert pool.stats().in_use >= y.nbytes
        assert y.dtype == ml_dtypes.bfloat16
        answer = toy.outputs("inference", inputs)["y"]
        np.testing.assert_array_equal(y.astype(np.float64), answer)
        del y
        assert pool.stats().in_use == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_given_to_the_next_call(
    toy: Any, pool: OutputPool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known to share no memory, so they cost no more than arrays of their own."""
    native = np.float32 if dtype == "float32" else pytest.importorskip("ml_dtypes").bfloat16
    op = toy.operator(dtype)
    inputs = toy.inputs("backward", length=LENGTH, dtype=native)
    given = op.backward(*inputs)._asdict()
    assert not given["dx"].flags.owndata
    with monkeypatch.context() as patch:
        patch.setattr(Call, "_full", None)
        found = op.backward(*inputs, out=given)
    assert found.dx is given["dx"]
    answers = toy.outputs("backward", inputs)
    np.testing.assert_array_equal(found.dx.astype(np.float64), answers["dx"])
    # Parts of one piece are another matter.
    pooled = pool.empty((2, *found.dx.shape), found.dx.dtype)
    pooled[0] = inputs[0]
    op.backward(pooled[0], *inputs[1:], out={"dx": pooled[1]})
    np.testing.assert_array_equal(pooled[1].astype(np.float64), answers["dx"])
    with pytest.raises(ArgumentError, match="memory"):
        op.backward(pooled[0], *inputs[1:], out={"dx": pooled[0]})
    flat = pooled.reshape(-1)[1 : found.dx.size + 1].reshape(found.dx.shape)
    with pytest.raises(ArgumentError, match="memory"):
        op.backward(pooled[0], *inputs[1:], out={"dx": flat})


def test_other_dlpack_arrays(toy: Any, op: Any, pool: OutputPool) -> None:
    inputs = toy.inputs("inference", length=LENGTH)
    for _ in range(2):
        y = op.inference(*map(tvm_ffi.from_dlpack, inputs))
        assert isinstance(y, tvm_ffi.Tensor)
        held = np.from_dlpack(y)
        del y
        assert pool.stats().in_use >= held.nbytes
        np.testing.assert_array_equal(held, toy.outputs("inference", inputs)["y"])
        del held
        assert pool.stats().in_use == 0


def test_strided_input_is_copied_into_pooled_memory(toy: Any, op: Any, pool: OutputPool) -> None:
    x, *rest = toy.inputs("inference", length=LENGTH)
    answer = toy.outputs("inference", [x, *rest])["y"]
    for _ in range(2):
        np.testing.assert_array_equal(op.inference(x.copy(order="F"), *rest), answer)
        assert pool.stats().cached > 2 * x.nbytes


def test_results_stay_while_later_calls_run(toy: Any, op: Any) -> None:
    first = toy.inputs("inference", length=LENGTH)
    second = [array + 1 for array in first]
    for _ in range(2):
        kept = [op.inference(*first), op.inference(*first)[1:, ::2], op.inference(*first).T]
        for _ in range(4):
            np.testing.assert_array_equal(
                op.inference(*second), toy.outputs("inference", second)["y"]
            )
        y = toy.outputs("inference", first)["y"]
        for got, answer in zip(kept, (y, y[1:, ::2], y.T), strict=True):
            np.testing.assert_array_equal(got, answer)


def test_pooled_arrays_as_inputs_and_in_out(toy: Any, op: Any) -> None:
    """They own no memory in NumPy's sense, and still no overlap passes unseen."""
    inputs = toy.inputs("inference", length=LENGTH)
    rest = inputs[1:]
    answer = toy.outputs("inference", inputs)["y"]
    x, y = op.inference(*inputs), op.inference(*inputs)
    x[...] = inputs[0]
    for _ in range(2):
        for options in ({}, {"want": "y"}):
            y.fill(np.nan)
            assert op.inference(x, *rest, out={"y": y}, **options) is y
            np.testing.assert_array_equal(y, answer)
            for same in (x, x[:], np.asarray(x.base)):
                with pytest.raises(ArgumentError, match="must not share memory with x"):
                    op.inference(x, *rest, out={"y": same}, **options)
            assert op.inference(x, *rest, out={"y": y[:]}, **options).base is y
    rest = toy.inputs("backward", length=LENGTH)[2:]
    result = op.backward(x, x, *rest, out={"dx": y})  # one array as two inputs
    assert result.dx is y
    np.testing.assert_array_equal(y, toy.outputs("backward", [x, x, *rest])["dx"])


# In the second one the parameter gradients are large too.
SPECS: dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]] = {
    "instance_norm": (
        ng.NormSpec("instance_norm", track_running_stats=True, momentum=None),
        ("N", 6, "L"),
    ),
    "layer_norm": (ng.NormSpec("layer_norm"), ("N", 33000)),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_lay_there_before_never_shows(
    name: str, pool: OutputPool, build_operator: Callable[..., Any]
) -> None:
    """Each output, alone and among all, is bit for bit what it is in memory that was not used."""
    op = build_operator(*SPECS[name])
    rng = np.random.default_rng(0)
    sizes = {"N": 3, "L": 9000}
    for kind in op.kinds:
        signature = op.signature(kind)
        inputs = [
            np.asarray(rng.uniform(0.5, 1.0, [sizes.get(d, d) for d in entry.shape]), np.float32)
            for entry in signature.inputs
        ]
        for want in (None, *signature.output_names):
            limit, pool.limit = pool.limit, 0
            answers = outputs_of(op.call(kind, *inputs, want=want))
            pool.limit = limit
            poison(pool, answers)
            result = outputs_of(op.call(kind, *inputs, want=want))
            for answer, got in zip(answers, result, strict=True):
                assert got.flags.owndata == (got.nbytes < 128 * 1024)
                assert got.tobytes() == answer.tobytes(), f"{kind} {want}"


def test_adding_to_a_fresh_output_is_refused(toy: Any, op: Any, pool: OutputPool) -> None:
    inputs = toy.inputs("backward", length=LENGTH)
    for _ in range(2):
        for grad_req in ("add", {"dx": "add"}):
            with pytest.raises(ArgumentError, match="array to add to must be given"):
                op.backward(*inputs, grad_req=grad_req)
        dx = op.backward(*inputs).dx
        op.backward(*inputs, out={"dx": dx}, grad_req={"dx": "add"})
        np.testing.assert_array_equal(dx, 2 * toy.outputs("backward", inputs)["dx"])


def test_a_call_that_fails_gives_its_outputs_back(
    toy: Any, op: Any, pool: OutputPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = toy.inputs("backward", length=LENGTH)
    op.backward(*inputs)
    taken = pool.stats()
    small = np.zeros(4, np.float32)
    for _ in range(20):
        with pytest.raises(ArgumentError, match="must have shape"):
            op.backward(*inputs, out={"dbeta": small})
    assert pool.stats() == taken
    assert taken.in_use == 0


def test_thousands_of_calls_keep_two_blocks(toy: Any, op: Any, pool: OutputPool) -> None:
    inputs = toy.inputs("inference", n=1, length=12000)
    y = op.inference(*inputs)
    for _ in range(3000):
        y = op.inference(*inputs)
    in_use, cached, _ = pool.stats()
    assert in_use == cached  # y, and the one before it
    assert y.nbytes <= in_use < y.nbytes * 9 / 8 + 4096


def test_the_pool_can_be_turned_off(toy: Any, op: Any, pool: OutputPool) -> None:
    inputs = toy.inputs("inference", length=LENGTH)
    op.inference(*inputs)
    pool.limit = 0
    for _ in range(2):
        y = op.inference(*inputs)
        assert y.flags.owndata
        np.testing.assert_array_equal(y, toy.outputs("inference", inputs)["y"])
    assert pool.stats() == (0, 0, 0)


def test_many_threads_on_one_operator(toy: Any, op: Any, pool: OutputPool) -> None:
    """Results that some threads drop while others still compare theirs."""
    pool.limit = 2 * 1024**2  # so that blocks also go back to the system meanwhile
    failures: list[str] = []
    start = threading.Barrier(8)
    left: list[Any] = []

    def work(number: int) -> None:
        inputs = toy.inputs("inference", n=1, length=11000 + 2000 * (number % 3))
        inputs[0] += number
        answer = toy.outputs("inference", inputs)["y"].astype(np.float32)
        start.wait()
        for turn in range(60):
            y = op.inference(*inputs)
            view = y[0]
            if turn % 7 == 0:
                left.append((y, answer))  # dropped by whichever thread gets there
                if len(left) > 5:
                    left.pop(0)
            del y
            if not np.array_equal(view, answer[0]):
                failures.append(f"{number} {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for y, answer in left:
        np.testing.assert_array_equal(y, answer)
    del y
    left.clear()
    assert pool.stats().in_use == 0
    assert pool.stats().cached <= pool.limit
