"""Reads a fused PrimFunc back as a short list of whole-tensor operations.

The fused function of a normalization graph has one block a graph node. All of its floating-point
tensors have one common rank, and along each of these *canonical axes* a tensor has either the full
extent or 1. `TensorProgram` states just that: every operation is an element-wise map or a sum over
some axes, its operands are named tensors, and what is left of TVM's expressions are the scalar
operators. Schedule rules read this instead of block syntax, and the arithmetic stays the graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad, Var
from tvm.ir.prim.expr import FloatImm, IntImm
from tvm.sym.analyzer import Analyzer

from normgraph.compile.blocks import (
    BINARY,
    Block,
    Expr,
    NotCanonical,
    is_float,
    same,
    take_apart,
    tensor_loads,
    top_level,
)
from normgraph.compile.tir import cast

ONE = IntImm("int64", 1)


@dataclass(eq=False)
class Tensor:
    """A tensor in canonical axes; `dims[i]` is the extent along axis i, `axes` those not 1."""

    name: str
    dtype: str
    dims: tuple[Expr, ...]
    input_index: int | None = None
    output_index: int | None = None

    @property
    def axes(self) -> frozenset[int]:
        """The axes along which it has the full extent."""
        return frozenset(i for i, dim in enumerate(self.dims) if not is_one(dim))


@dataclass(frozen=True, eq=False)
class Load:
    """The element of a tensor at the current position."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Scalar:
    """A value that is the same at every position."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Apply:
    """A scalar operator on operands; `make` rebuilds TVM's expression."""

    make: Callable[..., Expr]
    args: tuple[Node, ...]


@dataclass(frozen=True)
class Cast:
    """The operator of an `Apply` that changes the type; two to the same type are equal."""

    dtype: str

    def __call__(self, value: Expr) -> Expr:
        return cast(self.dtype, value)


Node = Load | Scalar | Apply


@dataclass(eq=False)
class Operation:
    """`out = value` at each position of `out`, or the sum of `value` over the axes `reduce`."""

    out: Tensor
    value: Node
    reduce: frozenset[int] = frozenset()


@dataclass
class TensorProgram:
    """The function's inputs, operations in order, outputs, and scalars bound once at its start."""

    func: Any
    extents: tuple[Expr, ...]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    scalars: list[tuple[Any, Expr]] = field(default_factory=list)


def is_one(dim: Expr) -> bool:
    """Whether an extent is the constant 1."""
    return isinstance(dim, IntImm) and int(dim.value) == 1


def loads(node: Node) -> Iterator[Tensor]:
    """The tensors a value reads, once for each occurrence."""
    if isinstance(node, Load):
        yield node.tensor
    elif isinstance(node, Apply):
        for arg in node.args:
            yield from loads(arg)


def is_read(node: Node) -> bool:
    """Whether a value is a tensor's element as it lies in memory, or that cast."""
    while isinstance(node, Apply) and isinstance(node.make, Cast):
        node = node.args[0]
    return isinstance(node, Load)


def read(func: Any) -> TensorProgram:
    """Read a fused PrimFunc (static or symbolic shapes) as a `TensorProgram`.

    Raises `NotCanonical` where a block is neither a map, a reshape of a whole tensor nor a sum, or
    where an operand is indexed other than by the position itself.
    """
    return _Reader(func).read()


class _Reader:
    def __init__(self, func: Any) -> None:
        self.func = func
        self.blocks = [take_apart(stmt) for stmt in top_level(func)]
        self.by_buffer = {block.buffer: block for block in self.blocks}
        self.tensors: dict[Any, Tensor] = {}  # buffer -> its canonical tensor
        self.bound: dict[Any, Any] = {}  # 0-d buffer -> scalar variable
        self.scalars: list[tuple[Any, Expr]] = []
        self.analyzer = Analyzer()

    def read(self) -> TensorProgram:
        buffers = [*self.func.params, *self.by_buffer]
        # A group norm's own rank is one less than the rank it is computed in; the highest rank is
        # the canonical one.
        self.rank = max(len(b.shape) for b in buffers if is_float(b))
        program = TensorProgram(self.func, self._extents(buffers), scalars=self.scalars)
        n_inputs = sum(1 for p in self.func.params if p not in self.by_buffer)
        for param in self.func.params[:n_inputs]:
            if len(param.shape) == self.rank:
                self._add_tensor(param, param.shape)
        for block in self.blocks:
            self._add(block, program)
        for index, param in enumerate(self.func.params):
            tensor = self.tensors.get(param)
            if tensor is None:
                continue
            if index < n_inputs:
                tensor.input_index = index
                program.inputs.append(tensor)
            elif tensor.output_index is not None:
                raise NotCanonical(f"two outputs show {tensor.name}")
            else:
                tensor.output_index = index - n_inputs
                program.outputs.append(tensor)
        if len(program.outputs) != len(self.func.params) - n_inputs:
            raise NotCanonical("an output is not a canonical tensor")
        return program

    def _extents(self, buffers: Sequence[Any]) -> tuple[Expr, ...]:
        extents: list[Expr] = [ONE] * self.rank
        for buffer in buffers:
            if len(buffer.shape) != self.rank or not is_float(buffer):
                continue
            for i, dim in enumerate(buffer.shape):
                if is_one(extents[i]):
                    extents[i] = dim
                elif not is_one(dim) and not self.analyzer.can_prove_equal(extents[i], dim):
                    raise NotCanonical(f"axis {i} of {buffer.name} is {dim}, not {extents[i]}")
        return tuple(extents)

    def _add_tensor(self, buffer: Any, dims: Sequence[Expr]) -> Tensor:
        tensor = Tensor(buffer.name, str(buffer.dtype), tuple(dims))
        self.tensors[buffer] = tensor
        return tensor

    def _add(self, block: Block, program: TensorProgram) -> None:
        buffer = block.buffer
        if not is_float(buffer):
            return  # shapes and element counts: folded into the scalars that use them
        if len(buffer.shape) == 0:
            value = self.analyzer.simplify(self._scalar(block.value, {}))
            self._bind(buffer, value)
        elif self._is_reshape(block):
            self._reshape(block, program)
        elif len(buffer.shape) == self.rank:
            self._canonical(block, buffer, buffer.shape, program)
        else:
            self._flat_map(block, program)

    def _bind(self, buffer: Any, value: Expr) -> Any:
        variable = tirx.Var(buffer.name, str(buffer.dtype))
        self.scalars.append((variable, value))
        self.bound[buffer] = variable
        return variable

    def _canonical(
        self, block: Block, buffer: Any, dims: Sequence[Expr], program: TensorProgram
    ) -> None:
        positions: dict[Any, int] = {var: i for i, var in enumerate(block.spatial)}
        axes = {var: self._axis_of(block, var) for var, _ in block.reduce}
        positions.update(axes)
        if block.combine == "product":
            raise NotCanonical(f"{block.name} is a product over elements")
        value = self._node(block.value, positions)
        tensor = self._add_tensor(buffer, dims)
        reduced = frozenset(axes[var] for var, extent in block.reduce if not is_one(extent))
        program.operations.append(Operation(tensor, value, reduced))

    def _axis_of(self, block: Block, var: Var) -> int:
        found: set[int] = set()
        for load in tensor_loads(block.value):
            if len(load.source.shape) == self.rank:
                found.update(i for i, index in enumerate(load.indices) if same(index, var))
        if len(found) != 1:
            raise NotCanonical(f"{block.name}: {var} is not the index of one axis")
        return found.pop()

    # Reshapes: at the boundary only, where they change the view and not the memory.

    def _is_reshape(self, block: Block) -> bool:
        return block.combine == "map" and block.name.startswith("T_reshape")

    def _reshape(self, block: Block, program: TensorProgram) -> None:
        source = block.value.source
        if len(block.buffer.shape) == self.rank and source not in self.tensors:
            self.tensors[block.buffer] = self._pull_view(source, block.buffer.shape, program)
        elif source in self.tensors:
            # Shown in another shape; an output lends the tensor its memory.
            self.tensors[block.buffer] = self.tensors[source]
        else:
            raise NotCanonical(f"{block.name} reshapes neither from nor to {self.rank} axes")

    def _pull_view(self, source: Any, shape: Sequence[Expr], program: TensorProgram) -> Tensor:
        """The canonical tensor behind a reshape of `source`: an input, or a map of inputs."""
        if source in self.func.params:
            return self._add_tensor(source, shape)
        block = self.by_buffer.get(source)
        if block is None or block.combine != "map":
            raise NotCanonical(f"the reshape of {source.name} is not a view of an input")
        inner = {
            load.source: self.tensors.get(load.source)
            or self._pull_view(load.source, shape, program)
            for load in tensor_loads(block.value)
            if len(load.source.shape)
        }
        value = self._node(block.value, {v: i for i, v in enumerate(block.spatial)}, inner)
        tensor = self._add_tensor(source, shape)
        program.operations.append(Operation(tensor, value))
        return tensor

    def _flat_map(self, block: Block, program: TensorProgram) -> None:
        """A map between reshape and boundary (the cast of a half type)."""
        if block.combine != "map":
            raise NotCanonical(f"{block.name} reduces outside the canonical axes")
        operands = [load.source for load in tensor_loads(block.value) if len(load.source.shape)]
        if not all(source in self.tensors for source in operands):
            return  # in front of a reshape: taken up when the reshape is met
        shown = [self.tensors[source] for source in operands]
        inner = dict(zip(operands, shown, strict=True))
        value = self._node(block.value, {v: i for i, v in enumerate(block.spatial)}, inner)
        tensor = self._add_tensor(block.buffer, shown[0].dims)
        program.operations.append(Operation(tensor, value))

    # Expressions.

    def _node(
        self, expr: Expr, positions: dict[Any, int], views: dict[Any, Tensor] | None = None
    ) -> Node:
        if isinstance(expr, TensorLoad):
            return self._load(expr, positions, views or {})
        if isinstance(expr, (IntImm, FloatImm)):
            return Scalar(expr)
        if isinstance(expr, tirx.Cast):
            dtype = str(expr.ty.dtype)
            inner = self._node(expr.value, positions, views)
            return _apply(Cast(dtype), (inner,))
        if isinstance(expr, BINARY):
            pair = (self._node(expr.a, positions, views), self._node(expr.b, positions, views))
            kind = type(expr)
            return _apply(kind, pair)
        if isinstance(expr, Call):
            op, dtype = expr.op, expr.ty
            args = tuple(self._node(arg, positions, views) for arg in expr.args)
            return _apply(lambda *a: Call(op, list(a), ret_ty=dtype), args)
        if isinstance(expr, Var) and expr not in positions:
            return Scalar(expr)
        raise NotCanonical(f"cannot read {type(expr).__name__} {expr}")

    def _load(self, load: TensorLoad, positions: dict[Any, int], views: dict[Any, Tensor]) -> Node:
        source = load.source
        if len(source.shape) == 0 or not is_float(source):
            return Scalar(self._scalar(load, {}))
        tensor = views.get(source) or self.tensors.get(source)
        if tensor is None:
            raise NotCanonical(f"{source.name} is read before it is made")
        if source not in views:
            for axis, index in enumerate(load.indices):
                own = any(same(index, var) and at == axis for var, at in positions.items())
                if not own and not is_one(source.shape[axis]):
                    raise NotCanonical(f"{source.name} is indexed by {index} along axis {axis}")
        return Load(tensor)

    def _scalar(self, expr: Expr, values: dict[Any, Expr]) -> Expr:
        """The value of an expression over shapes, counts and 0-d tensors."""
        if isinstance(expr, TensorLoad):
            return self._scalar_load(expr, values)
        if isinstance(expr, Var):
            return values.get(expr, expr)
        if isinstance(expr, tirx.Cast):
            return tirx.Cast(str(expr.ty.dtype), self._scalar(expr.value, values))
        if isinstance(expr, BINARY):
            return type(expr)(self._scalar(expr.a, values), self._scalar(expr.b, values))
        if isinstance(expr, tirx.Not):
            return tirx.Not(self._scalar(expr.a, values))
        if isinstance(expr, Call):
            return Call(expr.op, [self._scalar(a, values) for a in expr.args], ret_ty=expr.ty)
        if isinstance(expr, (IntImm, FloatImm)):
            return expr
        raise NotCanonical(f"cannot read {type(expr).__name__} {expr}")

    def _scalar_load(self, load: TensorLoad, values: dict[Any, Expr]) -> Expr:
        source = load.source
        if source in self.bound:
            return self.bound[source]
        block = self.by_buffer.get(source)
        if block is None:
            if len(source.shape):
                raise NotCanonical(f"{source.name} is used as a scalar")
            return self._bind(source, load)  # a 0-d input
        if is_float(source) and len(source.shape):
            raise NotCanonical(f"{source.name} is used as a scalar")
        inner = {
            var: self._scalar(index, values)
            for var, index in zip(block.spatial, load.indices, strict=False)
        }
        if block.combine == "map":
            return self.analyzer.simplify(self._scalar(block.value, inner))
        (var, extent), *more = block.reduce
        if more or not isinstance(extent, IntImm):
            raise NotCanonical(f"{block.name} reduces an unknown number of counts")
        total: Expr = None
        for k in range(int(extent.value)):
            term = self._scalar(block.value, {**inner, var: IntImm("int64", k)})
            if total is None:
                total = term
            else:
                total = total * term if block.combine == "product" else total + term
        return self.analyzer.simplify(total)


def _apply(make: Callable[..., Expr], args: tuple[Node, ...]) -> Node:
    if all(isinstance(arg, Scalar) for arg in args):
        return Scalar(make(*(arg.expr for arg in args if isinstance(arg, Scalar))))
    return Apply(make, args)
