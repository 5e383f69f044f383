"""The memory of large outputs: when it is used again, when never, and how much is kept."""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng
from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime import OutputPool, operator, output_pool

MB = 1024**2
BYTES = np.dtype(np.uint8)


@pytest.fixture
def pool() -> OutputPool:
    """A pool of its own that caches up to 64 MB."""
    made = OutputPool()
    made.limit = 64 * MB
    return made


@pytest.fixture
def shared() -> Iterator[OutputPool]:
    """The pool that calls use, empty of what other tests left; its limit is put back."""
    gc.collect()
    limit = ng.pool.limit
    ng.pool.clear()
    yield ng.pool
    ng.pool.limit = limit
    ng.pool.clear()


def address(array: Any) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def test_memory_comes_again_when_the_array_is_gone(pool: OutputPool) -> None:
    first = pool.empty((MB,), BYTES)
    place = address(first)
    assert pool.stats() == (MB, 0, 64 * MB)
    del first
    assert pool.stats() == (0, MB, 64 * MB)
    again = pool.empty((1000, 131), np.dtype(np.float64))  # a little less, of another shape
    assert address(again) == place
    assert pool.stats() == (MB, 0, 64 * MB)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(131072,), (3, 1, 1024, 257), (1, 3 * MB)])
def test_arrays_are_like_any_other(pool: OutputPool, dtype: str, shape: tuple[int, ...]) -> None:
    array = pool.empty(shape, np.dtype(dtype))
    assert type(array) is np.ndarray
    assert array.dtype is np.dtype(dtype)
    assert array.shape == shape
    assert array.strides == np.empty(shape, dtype).strides
    flags = array.flags
    assert flags.c_contiguous
    assert flags.writeable
    assert flags.aligned
    assert address(array) % (2 * MB if array.nbytes >= 2 * MB else mmap.PAGESIZE) == 0
    array[...] = 1
    array += array
    assert (array == np.full(shape, 2).astype(dtype)).all()
    again = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(again, array)
    assert not np.shares_memory(again, array)
    assert copy.deepcopy(array).flags.owndata
    with pytest.raises(ValueError, match="does not own its data"):
        array.resize((2, *shape))


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, pickle.dumps])
def test_memory_has_one_owner(pool: OutputPool, twin: Callable[[Any], Any]) -> None:
    array = pool.empty((MB,), BYTES)
    with pytest.raises(ArgumentTypeError, match="cannot be copied or pickled"):
        twin(array.base)
    assert pool.stats().in_use == MB


def test_bfloat16_of_ml_dtypes(pool: OutputPool) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = pool.empty((2, MB), np.dtype(ml_dtypes.bfloat16))
    assert array.dtype == ml_dtypes.bfloat16
    assert array.shape == (2, MB)
    array[:] = 1.5
    assert (array.astype(np.float32) == 1.5).all()
    assert pool.stats().in_use == 4 * MB
    del array
    assert pool.stats().in_use == 0


def test_small_arrays_are_not_pooled(pool: OutputPool) -> None:
    assert pool.empty((128 * 1024 - 1,), BYTES).flags.owndata
    assert pool.empty((0, MB), BYTES).flags.owndata
    assert not pool.empty((128 * 1024,), BYTES).flags.owndata


class Cycle:
    """Holds an array and itself."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.me = self


def in_a_thread(array: Any) -> tuple[threading.Event, Callable[[], Any]]:
    """A thread that holds the array until it is asked for what it holds."""
    asked, found = threading.Event(), []

    def hold(array: Any) -> None:
        asked.wait()
        found.append(array.copy())

    thread = threading.Thread(target=hold, args=(array,))
    thread.start()

    def ask() -> Any:
        asked.set()
        thread.join()
        return found[0]

    return asked, ask


# What may keep a result, and how to read the whole of it again.
HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "itself": (lambda array: array, np.asarray),
    "slice": (lambda array: array[:1][0], np.asarray),
    "slice of a slice": (lambda array: array[:1][:, :][0, :], np.asarray),
    "reshape": (lambda array: array.reshape(-1), np.asarray),
    "transpose": (lambda array: array.T, np.asarray),
    "another dtype": (lambda array: array.view(np.uint8), lambda held: held.view(np.float32)),
    "asarray": (np.asarray, np.asarray),
    "subclass": (lambda array: array.view(np.recarray), np.asarray),
    "broadcast": (lambda array: np.broadcast_to(array, (2, *array.shape)), lambda held: held[1]),
    "iterator": (lambda array: array.flat, lambda held: held[:]),
    "base": (lambda array: array.base, np.asarray),
    "array of the base": (lambda array: np.asarray(array.base), np.asarray),
    "memoryview": (memoryview, np.asarray),
    "slice of a memoryview": (lambda array: memoryview(array)[:1], np.asarray),
    "frombuffer": (lambda array: np.frombuffer(array, np.float32), np.asarray),
    "ctypes": (lambda array: (ctypes.c_float * array.size).from_buffer(array), np.asarray),
    "from_dlpack": (np.from_dlpack, np.asarray),
    "tvm_ffi": (tvm_ffi.from_dlpack, np.from_dlpack),
    "capsule": (
        lambda array: (array.__dlpack__(), array),
        lambda held: held[1],
    ),
    "cycle": (Cycle, lambda held: held.array),
    "closure": (lambda array: lambda: array, lambda held: held()),
    "thread": (in_a_thread, lambda held: held[1]()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_never_taken_from_who_shows_it(pool: OutputPool, holder: str) -> None:
    hold, read = HOLDERS[holder]
    right = np.arange(65536, dtype=np.float32).reshape(1, -1)
    array = pool.empty(right.shape, right.dtype)
    place = address(array)
    array[...] = right
    held = hold(array)
    del array
    gc.collect()
    others = [pool.empty(right.shape, right.dtype) for _ in range(3)]
    assert place not in map(address, others)
    for other in others:
        other.fill(np.nan)
    np.testing.assert_array_equal(np.ravel(read(held)), right[0])
    del held, other, others
    gc.collect()
    assert pool.stats().in_use == 0
    again = [pool.empty(right.shape, right.dtype) for _ in range(4)]
    assert place in map(address, again)


def test_a_capsule_alone_keeps_the_memory(pool: OutputPool) -> None:
    array = pool.empty((MB,), BYTES)
    place, capsule = address(array), array.__dlpack__()
    del array
    assert pool.stats().in_use == MB
    assert address(pool.empty((MB,), BYTES)) != place
    del capsule
    assert pool.stats().in_use == 0


def test_the_sizes_waste_little(pool: OutputPool) -> None:
    pool.limit = 0
    for size in [128 * 1024, 200_000, MB + 1, 10 * MB - 4096, 33 * MB, 2**30 + 1, 3 * 2**31 + 5]:
        pool.limit = 1
        array = pool.empty((size,), BYTES)
        assert size <= pool.stats().in_use <= size * 9 / 8 + mmap.PAGESIZE
        del array
        assert pool.stats()[:2] == (0, 0)


def test_what_was_unused_longest_goes_first(pool: OutputPool) -> None:
    pool.limit = 4 * MB
    arrays = {size: pool.empty((size * MB,), BYTES) for size in (1, 2, 3)}
    del arrays[2]
    del arrays[1]
    assert pool.stats() == (3 * MB, 3 * MB, 4 * MB)
    del arrays[3]  # with it the 2 MB must go, and then there is room for the 1 MB
    assert pool.stats() == (0, 4 * MB, 4 * MB)
    again = [pool.empty((size * MB,), BYTES) for size in (1, 3)]
    assert pool.stats() == (4 * MB, 0, 4 * MB)
    del again


def test_what_was_used_last_comes_first(pool: OutputPool) -> None:
    pool.limit = 2 * MB
    arrays: list[Any] = [pool.empty((MB,), BYTES) for _ in range(4)]
    places = [address(array) for array in arrays]
    for index in (2, 0, 3, 1):
        arrays[index] = None
    again = [pool.empty((MB,), BYTES) for _ in range(2)]
    assert [address(array) for array in again] == [places[1], places[3]]
    assert pool.stats().cached == 0


def test_more_than_the_limit_is_returned_at_once(pool: OutputPool) -> None:
    small = pool.empty((MB,), BYTES)
    del small
    large = pool.empty((65 * MB,), BYTES)
    del large
    assert pool.stats() == (0, MB, 64 * MB)  # and nothing went for its sake


def test_cached_memory_is_bounded_over_many_shapes(pool: OutputPool) -> None:
    pool.limit = 16 * MB
    rng = np.random.default_rng(0)
    alive: list[Any] = []
    for turn in range(600):
        alive.append(pool.empty((int(rng.integers(1, 24)), 131072 + 64 * turn), BYTES))
        if rng.random() < 0.6:
            alive.pop(int(rng.integers(len(alive))))
        if turn % 100 == 99:
            alive.clear()
        assert pool.stats().cached <= 16 * MB
        assert pool.stats().in_use >= sum(array.nbytes for array in alive)
    assert pool.stats().in_use == 0


def test_clear_and_a_lower_limit(pool: OutputPool) -> None:
    kept = pool.empty((MB,), BYTES)
    for _ in range(2):
        several = [pool.empty((n * MB,), BYTES) for n in (1, 2, 2, 5)]
        del several
        assert pool.stats().cached == 10 * MB
        pool.clear()
        assert pool.stats() == (MB, 0, 64 * MB)
    several = [pool.empty((n * MB,), BYTES) for n in (1, 2, 2, 5)]
    del several
    pool.limit = 7 * MB
    assert pool.stats() == (MB, 5 * MB, 7 * MB)
    pool.limit = 0
    assert pool.stats() == (MB, 0, 0)
    assert pool.empty((MB,), BYTES).flags.owndata
    del kept
    assert pool.stats() == (0, 0, 0)
    assert repr(pool) == "<normgraph.OutputPool: 0 bytes in use, 0 of 0 cached>"


@pytest.mark.parametrize("value", ["-1", "1GB", "1e9", "", " ", "1.5", "²", "all"])
def test_a_wrong_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch, toy: Any) -> None:
    monkeypatch.setenv("NORMGRAPH_POOL_BYTES", value)
    fresh = OutputPool()
    with pytest.raises(ArgumentError, match="variable NORMGRAPH_POOL_BYTES must be a number of"):
        _ = fresh.limit
    monkeypatch.setattr(operator, "pool", fresh)
    with pytest.raises(ArgumentError, match=f"but it is {value!r}"):
        ng.load(toy.artifact())


def test_the_limit_comes_from_the_variable_or_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "123456789"):
        monkeypatch.setenv("NORMGRAPH_POOL_BYTES", value)
        assert OutputPool().limit == int(value)
    monkeypatch.delenv("NORMGRAPH_POOL_BYTES")
    for size, limit in ((2**30, 2**27), (2**40, 2**32)):
        monkeypatch.setattr(output_pool, "memory_size", lambda size=size: size)
        assert OutputPool().limit == limit


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ArgumentError), (True, ArgumentTypeError), (1.5, ArgumentTypeError), ("1", TypeError)],
)
def test_a_wrong_limit_is_refused(pool: OutputPool, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"number of bytes.*{value!r}"):
        pool.limit = value
    assert pool.limit == 64 * MB


def test_without_memory_the_cache_goes_and_then_numpy_decides(
    pool: OutputPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = pool.empty((4 * MB,), BYTES)
    del cached
    system = mmap.mmap
    refused: list[int] = []

    def refuse(fileno: int, length: int, **options: Any) -> Any:
        if pool.stats().cached:
            refused.append(length)
            raise OSError(12, "Cannot allocate memory")
        return system(fileno, length, **options)

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert not pool.empty((MB,), BYTES).flags.owndata
    assert len(refused) == 1
    pool.clear()

    def never(fileno: int, length: int, **options: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", never)
    assert pool.empty((MB,), BYTES).flags.owndata
    with pytest.raises(MemoryError):
        pool.empty((2**46,), BYTES)
    assert pool.stats() == (0, 0, 64 * MB)


def test_a_system_without_huge_pages(pool: OutputPool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    array = pool.empty((4 * MB,), BYTES)
    array.fill(1)
    assert pool.stats().in_use == 4 * MB


def test_garbage_collected_at_any_point(pool: OutputPool) -> None:
    """Arrays in cycles are dropped where the collector runs, also inside of the pool's methods."""
    pool.limit = 3 * MB
    before = gc.get_threshold()
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(300):
            array = pool.empty((128 * 1024 * (1 + (turn + number) % 5),), BYTES)
            array.fill(number)
            Cycle(array)
            pool.stats()
            if turn % 50 == 0:
                pool.clear()
            if not (array == number).all():
                failures.append(f"{number} {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    gc.set_threshold(1, 1, 1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        gc.set_threshold(*before)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    gc.collect()
    in_use, cached, _ = pool.stats()
    assert in_use == 0
    assert cached <= 3 * MB
