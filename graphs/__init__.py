"""The normalization family as ONNX graphs of primitive nodes: what to compute, not how."""

from normgraph.graphs import reference
from normgraph.graphs.build import build, export
from normgraph.graphs.signature import kinds

__all__ = ["build", "export", "kinds", "reference"]
