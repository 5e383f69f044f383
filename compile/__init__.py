"""From exported ONNX graphs to an artifact: one function a graph, compiled through Apache TVM."""

from normgraph.compile.build import build
from normgraph.compile.targets import (
    Target,
    known_targets,
    resolve,
    resolve_all,
    target_groups,
    targets,
)

__all__ = [
    "Target",
    "build",
    "known_targets",
    "resolve",
    "resolve_all",
    "target_groups",
    "targets",
]
