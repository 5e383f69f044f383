"""A spec together with the shape and dtype of x: every dimension and axis a graph needs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normgraph.errors import SpecError
from normgraph.graphs.table import MAX_RANK, ROWS, axes_of, axis_letters
from normgraph.spec import NormSpec, compute_dtype

Dim = int | str


def parse_shape(shape: str | Iterable[object]) -> tuple[Dim, ...]:
    """("N", 64, "H", "W") or "N,64,H,W" as a tuple of ints and names.

    A name is a Python identifier and stands for a size known only at the call; the same name
    twice is the same size. Raises `SpecError` for anything else, and for an int below 1.
    """
    if isinstance(shape, str):
        items: Sequence[object] = shape.strip().strip("()[]").rstrip(",").split(",")
    elif isinstance(shape, Iterable):
        items = tuple(shape)
    else:
        raise SpecError(f'shape: expected dims, such as ("N", 64, "H", "W"); got {shape!r}')
    return tuple(_parse_dim(item, shape) for item in items)


def _parse_dim(item: object, shape: object) -> Dim:
    text = item.strip().strip("'\"") if isinstance(item, str) else item
    if isinstance(text, str) and text.isidentifier():
        return text
    try:
        size = int(text) if isinstance(text, str) else operator.index(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        size = 0
    if not 1 <= size < 2**63 or isinstance(item, bool):
        raise SpecError(
            f"shape: expected ints of at least 1 and names, such as N,64,H,W; got {item!r} in "
            f"{shape!r}. Give a dim that may be empty a name"
        )
    return size


@dataclass(frozen=True)
class Layout:
    """What `resolve_layout` works out; `dims`, `stat_dims` and axes are those inside the graph.

    `dims` is x's shape with group_norm's channels split in (groups, channels of a group).
    `row_axes` are the trailing axes of a statistic along which gamma is constant, contiguous in
    memory; `outer_axes` are the statistic's other axes.
    """

    spec: NormSpec
    dtype: str
    shape: tuple[Dim, ...]
    dims: tuple[Dim, ...]
    stat_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    param_axes: tuple[int, ...]
    param_shape: tuple[Dim, ...]

    @property
    def core(self) -> str:
        """The dtype the graph computes in."""
        return compute_dtype(self.dtype)

    @property
    def centred(self) -> bool:
        """Whether the operator subtracts a mean: all but rms_norm."""
        return ROWS[self.spec.op].centred

    @property
    def rank(self) -> int:
        """The number of axes inside the graph: x's, and one more for group_norm."""
        return len(self.dims)

    @property
    def outer_axes(self) -> tuple[int, ...]:
        """The axes a statistic reduces that are not `row_axes`."""
        return tuple(a for a in self.stat_axes if a not in self.row_axes)

    @property
    def stat_dims(self) -> tuple[Dim, ...]:
        """The shape of mean and inv_std: the reduced axes are kept as 1."""
        return tuple(1 if a in self.stat_axes else d for a, d in enumerate(self.dims))

    @property
    def param_dims(self) -> tuple[Dim, ...]:
        """The shape a parameter takes inside the graph, to broadcast against x."""
        return tuple(d if a in self.param_axes else 1 for a, d in enumerate(self.dims))

    @property
    def params_vary(self) -> bool:
        """Whether there are parameters that take several values within one statistic's slice."""
        has_params = self.spec.weight or bool(self.spec.bias)
        return has_params and bool(set(self.param_axes) & set(self.stat_axes))

    @property
    def gamma_varies(self) -> bool:
        """Whether there is a gamma that takes several values within one statistic's slice."""
        return self.spec.weight and self.params_vary

    @property
    def count(self) -> int | None:
        """Elements of a statistic's slice, or None where a name is among its dims."""
        return _product(self.dims[a] for a in self.stat_axes)

    @property
    def slices(self) -> int | None:
        """How many slices x has, or None where a name is among their dims."""
        return _product(self.stat_dims)

    @property
    def may_be_empty(self) -> bool:
        """Whether x may have no elements: only a dim with a name may be 0."""
        return any(isinstance(d, str) for d in self.shape)


def resolve_layout(spec: NormSpec, shape: str | Iterable[object], dtype: str) -> Layout:
    """Check `shape` and `dtype` against `spec`. Raises `SpecError` where they do not fit."""
    spec = spec.resolve(dtype)
    parsed = parse_shape(shape)
    _check_rank(spec, parsed)
    letters = axis_letters(spec, len(parsed), inside=False)
    has_params = spec.weight or bool(spec.bias)
    carries = has_params or spec.track_running_stats or spec.groups is not None
    for axis in axes_of(letters, "cd"):
        if carries and isinstance(parsed[axis], str):
            what = "parameters" if has_params else "running statistics"
            why = "groups split it" if spec.groups is not None else f"{what} vary along it"
            raise SpecError(
                f"shape: expected an int at axis {axis} of {spec.op}, because {why}; "
                f"got the name {parsed[axis]!r} in {_show(parsed)}"
            )
    dims = _split_groups(spec, parsed)
    inside = axis_letters(spec, len(parsed))
    row = ROWS[spec.op]
    stat_axes = axes_of(inside, row.stats)
    param_axes = axes_of(inside, row.params)
    varying = param_axes if has_params else ()
    row_axes: tuple[int, ...] = ()
    for axis in reversed(range(len(dims))):
        if axis not in stat_axes or axis in varying:
            break
        row_axes = (axis, *row_axes)
    return Layout(
        spec=spec,
        dtype=dtype,
        shape=parsed,
        dims=dims,
        stat_axes=stat_axes,
        row_axes=row_axes,
        param_axes=param_axes,
        param_shape=tuple(parsed[a] for a in axes_of(letters, "cd")),
    )


def _check_rank(spec: NormSpec, shape: tuple[Dim, ...]) -> None:
    row = ROWS[spec.op]
    if not row.min_rank <= len(shape) <= MAX_RANK:
        raise SpecError(
            f"shape: {spec.op} takes {row.min_rank} to {MAX_RANK} dims ({row.layout}); "
            f"got {len(shape)} in {_show(shape)}"
        )
    if spec.normalized_ndim is not None and spec.normalized_ndim > len(shape):
        raise SpecError(
            f"normalized_ndim: expected at most the {len(shape)} dims of {_show(shape)}; "
            f"got {spec.normalized_ndim}"
        )


def _split_groups(spec: NormSpec, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    if spec.groups is None:
        return shape
    channels = shape[1]
    assert isinstance(channels, int)  # a name was refused above
    if channels % spec.groups:
        raise SpecError(
            f"groups: expected a divisor of the {channels} channels of {_show(shape)}; "
            f"got {spec.groups}"
        )
    return (shape[0], spec.groups, channels // spec.groups, *shape[2:])


def _product(dims: Iterable[Dim]) -> int | None:
    sizes = tuple(dims)
    if any(isinstance(d, str) for d in sizes):
        return None
    return math.prod(d for d in sizes if isinstance(d, int))


def _show(shape: tuple[Dim, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
