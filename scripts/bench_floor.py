"""The memory limits: a copy (x to y) or an add (dy and x to dx), by torch and by a small C file.

A kernel that reads every array once and writes its result once cannot move less. The C file is
compiled for this machine when it is first asked for; it uses OpenMP, and with torch in the process
torch's own threads. Its results are checked before it is timed.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph.errors import AccuracyError
from normgraph.scripts.bench_peers import Peer, PeerMissing, first_line

Array = NDArray[Any]

SOURCE = Path(__file__).with_name("bench_floor.c")
COPY, ADD = "copy of one array", "add of two arrays"
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}


def memory_limit(kind: str, inputs: Mapping[str, Array], threads: int) -> Peer:
    """The limit as a library has it: torch into a given array, else NumPy in threads."""
    x, other, name = _operands(kind, inputs)
    if importlib.util.find_spec("torch") is None:
        return _numpy_limit(f"{name} (NumPy)", x, other, threads)
    import torch

    torch.set_num_threads(threads)
    source, target = torch_view(torch, x), torch.empty_like(torch_view(torch, x))
    call: Callable[[], object]
    if other is None:
        call = functools.partial(target.copy_, source)
    else:
        call = functools.partial(torch.add, torch_view(torch, other), source, out=target)
    return Peer(f"{name} (torch)", lambda: {"": call()}, threads, fresh=False, limit=True)


def stream_limit(kind: str, inputs: Mapping[str, Array], threads: int, *, streamed: bool) -> Peer:
    """The limit in C, with non-temporal stores or with plain ones."""
    x, other, name = _operands(kind, inputs)
    library = compiled()
    if streamed and not library.floor_streams():
        raise PeerMissing("non-temporal stores are written for x86-64 only")
    out = np.empty_like(x)
    size = ctypes.c_size_t(x.nbytes)
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (out, x)]
    function = library.floor_copy
    if other is not None:
        if not hasattr(library, f"floor_add_{x.dtype.name}"):
            raise PeerMissing(f"this machine has no instructions for {x.dtype.name}")
        function = getattr(library, f"floor_add_{x.dtype.name}")
        pointers.append(ctypes.c_void_p(other.ctypes.data))

    def call() -> Mapping[str, Any]:
        function(*pointers, size, int(streamed), threads)
        return {"": out}

    call()
    want = x if other is None else x + other
    if not np.array_equal(out, want):
        raise AccuracyError(f"the {name} in C gave another result than NumPy")
    stores = "non-temporal" if streamed else "plain"
    return Peer(f"{name} ({stores} stores)", call, threads, fresh=False, limit=True)


def torch_view(torch: Any, array: Array) -> Any:
    """The array as a torch tensor of its dtype, in the same memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _operands(kind: str, inputs: Mapping[str, Array]) -> tuple[Array, Array | None, str]:
    x = inputs["x"] if "x" in inputs else inputs["y"]
    backward = kind.startswith("backward")
    return x, inputs["dy"] if backward else None, ADD if backward else COPY


@functools.cache
def compiled() -> ctypes.CDLL:
    """The C file, compiled; PeerMissing where that fails."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    tool = next((found for name in names if name and (found := shutil.which(name))), None)
    if tool is None:
        raise PeerMissing("no C compiler is installed")
    if importlib.util.find_spec("torch") is not None:
        # Its OpenMP has the same name and is there first: one set of threads for both.
        import torch  # noqa: F401
    flags = [flag for name, flag in _NATIVE.items() if name == os.uname().machine]
    with tempfile.TemporaryDirectory(prefix="normgraph-bench-") as folder:
        library = Path(folder, "floor.so")
        command = [tool, "-O3", *flags, "-fopenmp", "-shared", "-fPIC", "-o", str(library)]
        done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerMissing(f"the C compiler failed: {first_line(RuntimeError(done.stderr))}")
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise PeerMissing(f"the compiled C file does not load: {error}") from None


def _numpy_limit(name: str, x: Array, other: Array | None, threads: int) -> Peer:
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    parts = np.array_split(x.ravel(), threads)
    goals = np.array_split(np.empty_like(x).ravel(), threads)
    others = None if other is None else np.array_split(other.ravel(), threads)

    def share(place: int) -> None:
        if others is None:
            np.copyto(goals[place], parts[place])
        else:
            np.add(others[place], parts[place], out=goals[place])

    def spread() -> Mapping[str, Any]:
        list(pool.map(share, range(threads)))
        return {}

    return Peer(name, spread, threads, fresh=False, limit=True)
