"""The inputs and outputs of each graph kind: names, order, dtypes and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from normgraph.errors import SpecError
from normgraph.graphs.layout import Dim, Layout
from normgraph.spec import NormSpec

_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forward": (
        ("x", "gamma", "beta", "running_mean", "running_var", "momentum"),
        ("y", "mean", "inv_std", "new_running_mean", "new_running_var"),
    ),
    "inference": (("x", "gamma", "beta", "running_mean", "running_var"), ("y",)),
    "backward": (("dy", "x", "gamma", "mean", "inv_std"), ("dx", "dgamma", "dbeta")),
    "backward_frozen": (
        ("dy", "x", "gamma", "running_mean", "running_var"),
        ("dx", "dgamma", "dbeta"),
    ),
    "backward_from_output": (
        ("dy", "y", "gamma", "beta", "inv_std"),
        ("dx", "dgamma", "dbeta"),
    ),
}
_LIKE_X = ("x", "y", "dx", "dy")
_RUNNING = ("running_mean", "running_var", "new_running_mean", "new_running_var")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; `inside` is the shape it has among the graph's own nodes."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    inside: tuple[Dim, ...]


def kinds(spec: NormSpec) -> tuple[str, ...]:
    """The graph kinds `spec` has, in the order they are exported.

    backward_frozen, the gradient with the running statistics as constants, is there where they
    are tracked. Raises `SpecError` for what is no spec.
    """
    if not isinstance(spec, NormSpec):
        raise SpecError(f"spec: expected a NormSpec, such as NormSpec('layer_norm'); got {spec!r}")
    return tuple(k for k in _KINDS if k != "backward_frozen" or spec.track_running_stats)


def check_kind(spec: NormSpec, kind: str) -> str:
    """Return `kind` if `spec` has it, else raise `SpecError`."""
    if isinstance(kind, str) and kind in kinds(spec):
        return kind
    hint = ""
    if isinstance(kind, str) and kind in _KINDS:
        hint = f". {kind} needs running statistics (track_running_stats=True)"
    raise SpecError(f"kind: expected one of {', '.join(kinds(spec))}; got {kind!r}{hint}")


def names(spec: NormSpec, kind: str, *, centred: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The input and output names of `kind`, without what the operator or the spec lacks."""
    lacking = set()
    if not spec.weight:
        lacking |= {"gamma", "dgamma"}
    if not spec.bias:
        lacking |= {"beta", "dbeta"}
    if not centred:
        lacking |= {"mean"}
    if not spec.track_running_stats:
        lacking |= {*_RUNNING, "momentum"}
    if spec.momentum is not None:
        lacking |= {"momentum"}
    inputs, outputs = _KINDS[check_kind(spec, kind)]
    return (
        tuple(n for n in inputs if n not in lacking),
        tuple(n for n in outputs if n not in lacking),
    )


def signature(layout: Layout, kind: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of the graph `kind` for `layout`, in order."""
    inputs, outputs = names(layout.spec, kind, centred=layout.centred)
    return tuple(_port(layout, n) for n in inputs), tuple(_port(layout, n) for n in outputs)


def _port(layout: Layout, name: str) -> Port:
    if name in _LIKE_X:
        return Port(name, layout.dtype, layout.shape, layout.dims)
    if name in ("gamma", "beta", "dgamma", "dbeta"):
        dtype = layout.spec.param_dtype or layout.dtype
        return Port(name, dtype, layout.param_shape, layout.param_dims)
    if name in _RUNNING:
        return Port(name, layout.core, layout.param_shape, layout.param_dims)
    if name == "momentum":
        return Port(name, layout.core, (), ())
    return Port(name, layout.core, layout.stat_dims, layout.stat_dims)
