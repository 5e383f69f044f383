"""Open an artifact and call its kernels: NumPy, PyTorch or any DLPack arrays in, the same kind out.

This layer imports neither onnx, nor TVM, nor the graph builder and the compiler; PyTorch is touched
only inside its adapter, and only when a torch tensor is passed.
"""

from __future__ import annotations

from normgraph.runtime.call import Call
from normgraph.runtime.operator import Operator, load
from normgraph.runtime.output_pool import OutputPool, PoolStats, pool
from normgraph.runtime.packing import pack, unpack
from normgraph.runtime.signature import Signature, TensorSpec
from normgraph.runtime.threads import get_num_threads, set_num_threads

__all__ = [
    "Call",
    "Operator",
    "OutputPool",
    "PoolStats",
    "Signature",
    "TensorSpec",
    "get_num_threads",
    "load",
    "pack",
    "pool",
    "set_num_threads",
    "unpack",
]
