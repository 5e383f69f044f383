"""Memory that large fresh outputs take turns in, so that their pages are faulted in only once.

What a call allocates and the caller drops would go back to the system and come again as pages that
fault one by one when a kernel writes them, which costs several times the kernel. So large outputs
lie in anonymous mappings (`mmap`) that the process keeps: when the last array, view or tensor over
a mapping is gone, it waits for the next output of its size. Forward of instance_norm at
(32, 128, 56, 56) in float32 on two cores, milliseconds:

    given outputs                       4.2
    fresh, from the C library (torch)  31
    fresh, from NumPy (huge pages)      7.9
    fresh, from here                    4.3

- An array's base is a `Lease`, which owns the memory for this one output. Whatever shows the
  memory (views, memoryviews, DLPack consumers, tensors) holds the array or the lease, and the
  lease's `__del__` gives the mapping back.
- Mappings come in eight sizes to a doubling, so an output wastes less than an eighth.
- The garbage collector may drop arrays at any point of any thread, also inside of these methods.
  So they take no lock: every step is one operation on a deque or a dict, which Python makes atomic,
  and what is cached is counted anew each time, which is exact and takes about a microsecond.
- Mappings that a huge page fits in begin with one, and the system is asked to use them.
- Nothing is zeroed: an output holds what its memory held last until the kernel writes it, as it
  does in fresh memory of the C library.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections import deque
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.runtime.memory_size import memory_size

VARIABLE = "NORMGRAPH_POOL_BYTES"
# glibc maps what is so large instead of taking it from its heap, until it has seen some freed.
LARGE = 128 * 1024
_HUGE_PAGE = 2 * 1024 * 1024
_PAGE_BITS = 12
# By default an eighth of the memory may be cached, but no more than this.
_MOST_BY_DEFAULT = 4 * 1024**3


class PoolStats(NamedTuple):
    """What the pool holds, in bytes."""

    in_use: int  # of arrays and tensors that are still there
    cached: int  # free, waiting for the next outputs
    limit: int  # the most that may be cached


class _Block:
    """One mapping, which goes back to the system with its last reference."""

    __slots__ = ("address", "given", "memory", "size")

    def __init__(self, size: int) -> None:
        huge = size >= _HUGE_PAGE
        # Private: in a child process writing must not show through. Python's default is shared.
        self.memory = mmap.mmap(
            -1,
            size + (_HUGE_PAGE if huge else 0),
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        start: int = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]
        skipped = -start % _HUGE_PAGE if huge else 0
        if huge:
            with suppress(OSError):  # there are systems without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = start + skipped
        self.size = size
        self.given = 0  # when it was last given back, by the pool's clock


class Lease:
    """What an output in pooled memory has for its base: gives the block back when it goes."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: OutputPool, block: _Block, shape: tuple[int, ...], kind: str) -> None:
        self._block = block
        self._pool = pool
        self.__array_interface__ = {
            "version": 3,
            "data": (block.address, False),
            "shape": shape,
            "typestr": kind,
        }

    def __del__(self) -> None:
        # A signal's handler may have raised before there was one.
        if hasattr(self, "_pool"):
            self._pool.give(self._block)

    def __reduce__(self) -> Any:
        """Refused: a copy would give the block back a second time."""
        raise ArgumentTypeError(
            "the base of an output owns its memory and cannot be copied or pickled. Copy or pickle"
            " the output itself."
        )


class OutputPool:
    """The memory of large outputs that a call allocates, kept for the next ones.

    `normgraph.pool` is the one that calls use. Outputs of at least 128 KiB lie in it; it keeps up
    to `limit` bytes that nobody uses, and returns the rest to the system, what was unused longest
    first. The limit is the environment variable NORMGRAPH_POOL_BYTES, a number of bytes; by default
    an eighth of the memory this process may have, 4 GiB at most. 0 turns the pool off.

    Arrays and tensors in it are like any other but that they cannot be grown in place
    (numpy.ndarray.resize, torch.Tensor.resize_). May be used from many threads. A forked child
    starts without cached memory.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._free: dict[int, deque[_Block]] = {}  # by size, the last one given back on the right
        self._used: dict[int, int] = {}  # size by id of block
        self._clock = itertools.count()

    def __repr__(self) -> str:
        in_use, cached, limit = self.stats()
        return f"<normgraph.OutputPool: {in_use} bytes in use, {cached} of {limit} cached>"

    @property
    def limit(self) -> int:
        """The most bytes kept that nobody uses; may be set at any time, 0 turns the pool off.

        Raises ArgumentError where NORMGRAPH_POOL_BYTES, which it is taken from first, is no number
        of bytes; setting it raises ArgumentTypeError or ArgumentError for what is none.
        """
        if self._limit is None:
            self._limit = _default_limit()
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        """What is cached beyond the new limit goes back to the system at once."""
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise ArgumentTypeError(
                f"the pool's limit must be an int, a number of bytes, but it is {limit!r}."
            )
        if limit < 0:
            raise ArgumentError(
                f"the pool's limit must be 0 (no pool) or a number of bytes, but it is {limit}."
            )
        self._limit = limit
        self._trim()

    def stats(self) -> PoolStats:
        """The bytes in use and cached, and the limit of the latter."""
        return PoolStats(sum(list(self._used.values())), self._cached(), self.limit)

    def clear(self) -> None:
        """Return all memory that nobody uses to the system, as torch.cuda.empty_cache does."""
        while self._free:
            try:
                self._free.popitem()
            except KeyError:  # another thread took the last one
                return

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The same as numpy.empty, in pooled memory where it is large.

        A dtype that NumPy's array interface cannot name (bfloat16) is viewed as itself.
        """
        size = _block_size(shape, dtype.itemsize)
        if not size or not self.limit:
            return np.empty(shape, dtype)
        block = self._take(size)
        if block is None:
            return np.empty(shape, dtype)  # or NumPy's own MemoryError
        lease = Lease(self, block, shape, dtype.str)
        self._used[id(block)] = block.size
        array: npt.NDArray[Any] = np.asarray(lease)
        return array if array.dtype is dtype else array.view(dtype)

    def give(self, block: _Block) -> None:
        """Take back a block that nobody uses; called by leases alone, at any point of a thread."""
        self._used.pop(id(block), None)
        size = block.size
        if size > self.limit:
            return
        block.given = next(self._clock)
        line = self._free.get(size)
        if line is None:
            line = self._free.setdefault(size, deque())
        line.append(block)
        self._trim()

    def _take(self, size: int) -> _Block | None:
        """A block of this size, or None where the system has no memory for one."""
        blocks = self._free.get(size)
        if blocks:
            try:
                return blocks.pop()
            except IndexError:  # another thread was faster
                pass
        for _ in range(2):
            try:
                return _Block(size)
            except (OSError, MemoryError):
                self.clear()
        return None

    def _cached(self) -> int:
        total = 0
        for size, line in self._free.copy().items():
            total += size * len(line)
        return total

    def _trim(self) -> None:
        """Drop the blocks that were given back longest ago until no more than `limit` is cached."""
        while self._cached() > self.limit:
            # Where another thread takes what was there, count again.
            with suppress(IndexError, ValueError):
                min(filter(None, self._free.copy().values()), key=_since).popleft()


def _since(line: deque[_Block]) -> int:
    return line[0].given


@lru_cache(maxsize=1024)
def _block_size(shape: tuple[int, ...], itemsize: int) -> int:
    """The bytes to take for an array: up to the next eighth of a power of two; 0 if not large."""
    size = math.prod(shape) * itemsize
    if size < LARGE:
        return 0
    step: int = 1 << max(_PAGE_BITS, (size - 1).bit_length() - 4)
    return -(-size // step) * step


def _default_limit() -> int:
    text = os.environ.get(VARIABLE)
    if text is None:
        return min(memory_size() // 8, _MOST_BY_DEFAULT)
    if not text.isascii() or not text.isdecimal():
        raise ArgumentError(
            f"the environment variable {VARIABLE} must be a number of bytes, such as 1073741824, or"
            f" 0 for no pool, but it is {text!r}. Correct or unset it."
        )
    return int(text)


pool = OutputPool()
os.register_at_fork(after_in_child=pool.clear)
