"""What the forward and the backward builder share: ports, sums and the element count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normgraph.graphs.layout import Dim, Layout
from normgraph.graphs.signature import signature
from normgraph.graphs.writer import ELEMENT_TYPES, GraphWriter, Operand


@dataclass(frozen=True)
class Count:
    """m, m - correction, both at least 1, and their quotient; numbers where the dims are ints."""

    m: Operand
    dof: Operand
    ratio: Operand


class Frame:
    """A graph in which every tensor has x's rank, group_norm's split channels included.

    `load` brings an input into that form and the compute dtype; `result` names the tensor, in
    that form, that `finish` brings back to the shape and dtype of an output.
    """

    def __init__(self, layout: Layout, kind: str) -> None:
        self.layout = layout
        self.spec = layout.spec
        self.eps = float(layout.spec.eps or 0.0)
        self.kind = kind
        self.g = GraphWriter(layout.core)
        inputs, outputs = signature(layout, kind)
        self.inputs = {port.name: port for port in inputs}
        self.outputs = {port.name: port for port in outputs}
        self._debug: list[tuple[str, tuple[Dim, ...]]] = []
        self._loaded: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        self._sums: dict[tuple[str, tuple[int, ...]], str] = {}
        for port in inputs:
            self.g.input(port.name, port.dtype, port.shape)

    def load(self, name: str) -> str:
        """The input `name` in the compute dtype and the shape it has inside the graph."""
        if name not in self._loaded:
            port, value = self.inputs[name], self._cast(name)
            if port.inside != port.shape:
                value = self._reshape(f"{name}_inside", value, port.inside)
            self._loaded[name] = value
        return self._loaded[name]

    def _cast(self, name: str) -> str:
        """The input `name` in the compute dtype, in its own shape."""
        if self.inputs[name].dtype == self.layout.core:
            return name
        to = ELEMENT_TYPES[self.layout.core]
        return self._once(f"{name}_core", lambda core: self.g.Cast(core, name, to=to))

    def _like_x(self) -> str:
        """A tensor of x's own shape; behind the Cast, for bfloat16 has no Size in onnxruntime."""
        return self._cast(next(iter(self.inputs)))

    def result(self, name: str) -> str:
        """What to call the tensor that becomes the output `name`; `name` itself where it can."""
        port = self.outputs.get(name)
        if port is None:
            return name
        if port.inside != port.shape:
            return f"{name}_inside"
        return name if port.dtype == self.layout.core else f"{name}_core"

    def expose(self, name: str, dims: Sequence[Dim]) -> None:
        """Let a debug build give the tensor `name` out, behind the normal outputs."""
        self._debug.append((name, tuple(dims)))

    def finish(self, *, debug: bool) -> GraphWriter:
        """Write the conversions to the outputs' own form and declare the outputs."""
        for name, port in self.outputs.items():
            value = self._sources.get(name, self.result(name))
            plain = port.dtype == self.layout.core
            if port.inside != port.shape:
                to = name if plain else f"{name}_core"
                value = self._reshape(to, value, port.shape)
            if not plain:
                self.g.Cast(name, value, to=ELEMENT_TYPES[port.dtype])
            elif value != name:
                self.g.Identity(name, value)
            self.g.output(name, port.dtype, port.shape)
        for name, dims in self._debug if debug else ():
            self.g.output(name, self.layout.core, dims)
        return self.g

    def _reshape(self, name: str, value: str, dims: Sequence[Dim]) -> str:
        """Reshape to `dims`, which differ from the value's only in how the channels are split.

        A leading name is written as 0, which copies the input's size. Names further back need
        the sizes at run time, and allowzero so that an empty one stays empty.
        """
        lead, *rest = dims
        sizes = [d for d in rest if isinstance(d, int)]
        if len(sizes) == len(rest):
            first = lead if isinstance(lead, int) else 0
            return self.g.Reshape(name, value, self.g.integers("shape", [first, *sizes]))
        target = self._dims_of_x() if len(dims) == len(self.layout.shape) else self._split_dims()
        return self.g.Reshape(name, value, target, allowzero=1)

    def _dims_of_x(self) -> str:
        return self._once("x_dims", lambda n: self.g.Shape(n, self._like_x()))

    def _split_dims(self) -> str:
        def write(name: str) -> str:
            like = self._like_x()
            lead = self.g.Shape("lead_dims", like, start=0, end=1)
            channels = [d for d in self.layout.dims[1:3] if isinstance(d, int)]
            rest = self.g.Shape("rest_dims", like, start=2)
            return self.g.Concat(name, lead, self.g.integers("channels", channels), rest, axis=0)

        return self._once("split_dims", write)

    def _once(self, name: str, write: Callable[[str], str]) -> str:
        return name if name in self.g else write(name)

    def sum(self, name: str, value: str, axes: Sequence[int]) -> str:
        """The sum of `value` over `axes`, which it keeps as 1; `value` itself over no axes.

        The same sum asked for twice is written once, under the first name.
        """
        if not axes:
            return value
        key = (value, tuple(axes))
        if key not in self._sums:
            axes_name = self.g.integers("axes", list(axes))
            self._sums[key] = self.g.ReduceSum(name, value, axes_name, keepdims=1)
        return self._sums[key]

    def sum_to(self, output: str, value: str, axes: Sequence[int]) -> None:
        """Make the output named `output` the sum of `value` over `axes`, which may be none."""
        name = self.result(output)
        total = self.sum(name, value, axes)
        if total != name:
            self._sources[output] = total

    def stat_sum(self, name: str, value: str, row_axes: Sequence[int]) -> str:
        """The sum over a statistic's slice in two steps, the trailing `row_axes` first."""
        outer = [a for a in self.layout.stat_axes if a not in row_axes]
        if not outer:
            return self.sum(name, value, row_axes)
        return self.sum(name, self.sum(f"{name}_rows", value, row_axes), outer)

    def count(self, stat: str) -> Count:
        """How many elements a slice has; `stat` is any tensor with one element a slice.

        With a name among the reduced dims it is Size(x) / Size(stat), in integers. An empty x
        has m = 0 or no slices: the divisor and the result are at least 1, so that nothing is 0/0.
        """
        correction = self.spec.correction
        size = self.layout.count
        if size is not None:
            divisor = max(size - correction, 1)
            return Count(float(size), float(divisor), size / divisor)
        g = self.g
        slices = self._slices(stat)
        m = self._at_least_one("m", g.Div("m_integer", self._elements(), slices))
        if not correction:
            return Count(m, m, 1.0)
        dof = self.less_one("dof", m)
        return Count(m, dof, g.Div("m_over_dof", m, dof))

    def less_one(self, name: str, m: Operand) -> Operand:
        """max(m - 1, 1) for an m of at least 1; as Relu(m - 2) + 1, for TVM cannot fuse Max."""
        if not isinstance(m, str):
            return max(m - 1, 1.0)
        over = self.g.Relu(f"{name}_over_one", self.g.Sub(f"{name}_less_one", m, 2.0))
        return self.g.Add(name, over, 1.0)

    def batch_size(self, stat: str) -> Operand:
        """How many slices share one parameter, at least 1: the n of instance_norm."""
        n, *rest = self.layout.stat_dims
        if isinstance(n, int):
            return float(n)
        channels = math.prod(d for d in rest if isinstance(d, int))
        slices = self.g.Size("batch_slices", stat)
        whole = self.g.Div("n_integer", slices, self.g.integers("per_n", channels))
        return self._at_least_one("n", whole)

    def any_element(self) -> str:
        """1 where x has an element, else 0."""
        some = self.g.Cast("any_element_flag", self._elements(), to=ELEMENT_TYPES["bool"])
        return self.g.Cast("any_element", some, to=ELEMENT_TYPES[self.layout.core])

    def _at_least_one(self, name: str, integer: str) -> str:
        raw = self.g.Cast(f"{name}_raw", integer, to=ELEMENT_TYPES[self.layout.core])
        over = self.g.Relu(f"{name}_over_one", self.g.Sub(f"{name}_less_one", raw, 1.0))
        return self.g.Add(name, over, 1.0)

    def _elements(self) -> str:
        return self._once("elements", lambda name: self.g.Size(name, self._like_x()))

    def _slices(self, stat: str) -> str:
        """How many slices x has, at least 1, as an integer."""
        if self.layout.slices is not None:
            return self.g.integers("slices", self.layout.slices)
        counted = self.g.Size("slices", stat)
        some = self.g.Cast("any_slice", counted, to=ELEMENT_TYPES["bool"])
        none = self.g.Cast("no_slice", self.g.Not("no_slice_flag", some), to=ELEMENT_TYPES["int64"])
        return self.g.Add("slices_or_one", counted, none)
