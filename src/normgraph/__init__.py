"""Normalization layers, forward and backward: explicit ONNX graphs compiled through Apache TVM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normgraph.errors import NormGraphError
from normgraph.host import check_host

if TYPE_CHECKING:
    from normgraph import compile, errors, graphs, runtime  # noqa: A004
    from normgraph.api import build
    from normgraph.runtime import get_num_threads, load, pool, set_num_threads
    from normgraph.spec import NormSpec

check_host()

__version__ = "0.1.0"
__all__ = [
    "NormGraphError",
    "NormSpec",
    "build",
    "compile",
    "errors",
    "get_num_threads",
    "graphs",
    "load",
    "pool",
    "runtime",
    "set_num_threads",
]

# Resolved on first use, so that loading an artifact imports neither onnx nor the compiler.
_LAZY = {
    "NormSpec": ("normgraph.spec", "NormSpec"),
    "build": ("normgraph.api", "build"),
    "load": ("normgraph.runtime", "load"),
    "get_num_threads": ("normgraph.runtime", "get_num_threads"),
    "set_num_threads": ("normgraph.runtime", "set_num_threads"),
    "pool": ("normgraph.runtime", "pool"),
    "compile": ("normgraph.compile", None),
    "graphs": ("normgraph.graphs", None),
    "runtime": ("normgraph.runtime", None),
}


def __getattr__(name: str) -> Any:
    """The public names and subpackages, imported on first use."""
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'normgraph' has no attribute {name!r}") from None
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names `__getattr__` knows, beside the usual ones."""
    return sorted({*globals(), *_LAZY})
