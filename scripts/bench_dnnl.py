"""The part of oneDNN's C interface (version 3) that a normalization needs, through ctypes.

Names and numbers are those of oneapi/dnnl/dnnl_types.h. Arrays are NumPy's, row-major; a blocked
layout is made by oneDNN's own reorder.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from normgraph.scripts.bench_peers import PeerMissing

Array = NDArray[Any]

LIBRARY = "NORMGRAPH_ONEDNN"  # the environment variable that names another library file
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT = 1, 2, 4
ARGUMENTS = {
    "src": 1, "dst": 17, "mean": 49, "variance": 50, "scale": 51, "shift": 52,
    "diff_src": 129, "diff_dst": 145, "diff_scale": 255, "diff_shift": 256,
}  # fmt: skip
PLAIN = {1: "a", 2: "ab", 3: "abc", 4: "abcd", 5: "abcde"}
BLOCKED = {3: "aBc16b", 4: "aBcd16b", 5: "aBcde16b"}
_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
_CPU, _IN_ORDER, _IMPLEMENTATION, _UNIMPLEMENTED = 1, 1, 8, 3
_MOST_TAGS = 2000


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


class Library:
    """The loaded library, with one engine and one stream."""

    def __init__(self, path: str) -> None:
        self._c = ctypes.CDLL(path)
        self._c.dnnl_version.restype = ctypes.POINTER(_Version)
        self._c.dnnl_fmt_tag2str.restype = ctypes.c_char_p
        found = self._c.dnnl_version().contents
        self.version = f"{found.major}.{found.minor}.{found.patch}"
        if found.major != 3:
            raise PeerMissing(f"oneDNN 3 is needed; {path} is {self.version}")
        self.engine = self._made("dnnl_engine_create", ctypes.c_int(_CPU), ctypes.c_size_t(0))
        self.stream = self._made("dnnl_stream_create", self.engine, ctypes.c_uint(_IN_ORDER))
        self._tags: dict[str, int] = {}
        for number in range(_MOST_TAGS):
            text = self._c.dnnl_fmt_tag2str(ctypes.c_int(number)).decode()
            self._tags.setdefault(text, number)

    def describe(self, shape: tuple[int, ...], dtype: str, tag: str) -> ctypes.c_void_p:
        """A memory descriptor."""
        if dtype not in _TYPES:
            raise PeerMissing(f"oneDNN does not normalize {dtype}")
        dims = (ctypes.c_int64 * 12)(*shape)
        numbers = (ctypes.c_int(_TYPES[dtype]), ctypes.c_int(self._tags[tag]))
        return self._made(
            "dnnl_memory_desc_create_with_tag", ctypes.c_int(len(shape)), dims, *numbers
        )

    def memory(self, descriptor: ctypes.c_void_p, data: Array) -> ctypes.c_void_p:
        """A memory object on the array's own memory, which must outlive it."""
        return self._made(
            "dnnl_memory_create", descriptor, self.engine, ctypes.c_void_p(data.ctypes.data)
        )

    def size(self, descriptor: ctypes.c_void_p) -> int:
        """Bytes a descriptor needs, with its padding."""
        self._c.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        return int(self._c.dnnl_memory_desc_get_size(descriptor))

    def description(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A primitive's descriptor: `name` is what it does, such as batch_normalization_forward."""
        return self._made(f"dnnl_{name}_primitive_desc_create", *arguments)

    def implementation(self, description: ctypes.c_void_p) -> str:
        """What oneDNN calls the code it chose."""
        text = ctypes.c_char_p()
        self._c.dnnl_primitive_desc_query(
            description, ctypes.c_int(_IMPLEMENTATION), ctypes.c_int(0), ctypes.byref(text)
        )
        return (text.value or b"").decode()

    def primitive(self, description: ctypes.c_void_p) -> ctypes.c_void_p:
        """The primitive of a descriptor."""
        return self._made("dnnl_primitive_create", description)

    def bound(
        self, primitive: ctypes.c_void_p, memories: Mapping[str, ctypes.c_void_p]
    ) -> functools.partial[None]:
        """A call without arguments that runs the primitive on these memories and waits."""
        count = len(memories)
        listed = (_Argument * count)(
            *(_Argument(ARGUMENTS[name], memory) for name, memory in memories.items())
        )
        return functools.partial(self._execute, primitive, ctypes.c_int(count), listed)

    def reorder(
        self, source: ctypes.c_void_p, data: Array, target: ctypes.c_void_p, out: Array
    ) -> None:
        """Copy `data` of one descriptor to `out` of another."""
        made = self.description("reorder", source, self.engine, target, self.engine, None)
        memories = {"src": self.memory(source, data), "dst": self.memory(target, out)}
        self.bound(self.primitive(made), memories)()

    def _execute(self, primitive: ctypes.c_void_p, count: ctypes.c_int, listed: Any) -> None:
        status = self._c.dnnl_primitive_execute(primitive, self.stream, count, listed)
        status = status or self._c.dnnl_stream_wait(self.stream)
        if status:
            raise PeerMissing(f"oneDNN {self.version}: executing failed with status {status}")

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        if not hasattr(self._c, name):
            raise PeerMissing(f"oneDNN {self.version} has no {name}")
        status = getattr(self._c, name)(ctypes.byref(handle), *arguments)
        if status == _UNIMPLEMENTED:
            raise PeerMissing(f"oneDNN {self.version} has no implementation on this machine")
        if status:
            raise PeerMissing(f"oneDNN {self.version}: {name} failed with status {status}")
        return handle


@functools.cache
def library() -> Library:
    """The library; PeerMissing where there is none."""
    if importlib.util.find_spec("torch") is not None:
        # Its OpenMP has the same name and is there first: one set of threads for both.
        import torch  # noqa: F401
    beside = Path(sys.prefix, "lib", "libdnnl.so.3")
    path = os.environ.get(LIBRARY) or (str(beside) if beside.exists() else None)
    path = path or ctypes.util.find_library("dnnl")
    if path is None:
        raise PeerMissing(
            f"no oneDNN library: install the package onednn-cpu-gomp, or name one in {LIBRARY}"
        )
    try:
        return Library(path)
    except OSError as error:
        raise PeerMissing(f"oneDNN does not load: {error}") from None
