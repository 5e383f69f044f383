"""What surrounds the kernels of a function: `kernel_frame` with one workspace in device memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad

from normgraph.compile.addressing import Position, element_count, offset
from normgraph.compile.blocks import BINARY, NotCanonical
from normgraph.compile.cuda_kernel import VECTOR_BYTES, on_host, rounded_sum
from normgraph.compile.kernel_frame import Frame, replace_scalars
from normgraph.compile.slice_plan import SlicePlan
from normgraph.compile.tensor_program import Node, Scalar, Tensor
from normgraph.compile.tir import (
    Expr,
    Stmt,
    both,
    constant,
    i64,
    plus,
    times,
    when,
)

# Elements to which the parts of the workspace are aligned: 256 bytes of float32.
_PART = 64


class Room:
    """A part of a workspace, from element `units` * 64 on."""

    def __init__(self, buffer: Any, units: Expr) -> None:
        self.buffer = buffer
        self.units = units
        self.base = times(units, i64(_PART))


class Workspace:
    """Device memory of one allocation, for what outlives a kernel."""

    def __init__(self, name: str, dtype: str) -> None:
        self.units: Expr = i64(0)
        self.stmts: list[Stmt] = []
        self.size: Any = tirx.Var(f"{name}_size", "int64")
        self.buffer = tirx.decl_buffer(
            (self.size,), dtype, name, scope="global", data_alignment=VECTOR_BYTES
        )

    def room(self, name: str, size: Expr) -> Room:
        """A part for `size` elements."""
        units = on_host(f"{name}_at", self.units, self.stmts)
        self.units = plus(units, tirx.FloorDiv(plus(size, i64(_PART - 1)), i64(_PART)))
        return Room(self.buffer, units)

    def allocation(self) -> list[Stmt]:
        """The statements that allocate it; none where nothing needs room."""
        if constant(self.units) == 0:
            return []
        size = tirx.reinterpret("int64", times(self.units, i64(_PART)))
        return [*self.stmts, tirx.Bind(self.size, size), tirx.AllocBuffer(self.buffer)]


class CudaFrame(Frame):
    """Opens and closes the function; all that outlives a kernel is kept in one workspace.

    The host part may not read tensors, which lie in device memory: scalars that come from a 0-d
    input (a momentum) are made inside of each kernel.
    """

    def __init__(self, plan: SlicePlan, outputs: Sequence[str]) -> None:
        super().__init__(plan, outputs, i64(0))
        self.widened = {}  # the hardware converts half types in one instruction
        self.workspaces = {}
        self.partials = {}
        dtypes = {s.op.out.dtype for p in plan.passes for s in p.wide if s.is_sum} or {"float32"}
        if len(dtypes) > 1:
            raise NotCanonical("sums of several types")
        self.dtype = dtypes.pop()
        self.device_scalars: list[tuple[Any, Expr]] = []
        self.host_scalars: list[tuple[Any, Expr]] = []
        self._split_scalars()
        self.workspace_now = Workspace("kept", self.dtype)
        self.stored: dict[Tensor, Room] = {}

    def start_workspace(self) -> None:
        """A workspace of its own for the kernels that are emitted from now on."""
        self.workspace_now = Workspace("workspace", self.dtype)

    def _split_scalars(self) -> None:
        on_device: set[Any] = set()
        for variable, value in self.program.scalars:
            if _reads(value, on_device):
                on_device.add(variable)
                self.device_scalars.append((variable, value))
            else:
                self.host_scalars.append((variable, value))

    def open(self) -> list[Stmt]:
        """Requests, shape checks, views, the scalars of the host, room for stored tensors."""
        every = self.program.scalars
        self.program.scalars = self.host_scalars
        stmts = super().open()
        self.program.scalars = every
        return stmts

    def room(self, name: str, size: Expr) -> Room:
        """A part of the workspace at hand for `size` elements."""
        return self.workspace_now.room(name, size)

    def keep_stored(self, tensors: Sequence[Tensor]) -> None:
        """Make room for tensors that later kernels read."""
        self.stored = {}
        for tensor in tensors:
            if tensor.dtype != self.dtype:
                raise NotCanonical(f"{tensor.name} is {tensor.dtype}, not {self.dtype}")
            self.stored[tensor] = self.room(tensor.name, element_count(tensor))

    def allocation(self) -> list[Stmt]:
        """The statements that allocate the workspace at hand."""
        return self.workspace_now.allocation()

    # Memory.

    def load(self, tensor: Tensor, at: Expr) -> Expr:
        """An element of a stored tensor or of a parameter's memory."""
        if tensor in self.stored:
            return self.load_room(self.stored[tensor], at)
        return tirx.BufferLoad(self.flat[tensor], [at])

    def store(self, tensor: Tensor, value: Expr, at: Expr) -> Stmt:
        """Put an element into a stored tensor."""
        return self.store_room(self.stored[tensor], value, at)

    def load_room(self, room: Room, at: Expr) -> Expr:
        """An element of a part of the workspace."""
        return tirx.BufferLoad(room.buffer, [plus(room.base, at)])

    def store_room(self, room: Room, value: Expr, at: Expr) -> Stmt:
        """Put an element into a part of the workspace."""
        return tirx.BufferStore(room.buffer, value, [plus(room.base, at)])

    def vector_at(self, tensor: Tensor, vector: Expr, width: int) -> tuple[Any, Expr]:
        """The buffer and the index, provably a multiple of `width`, of a tensor's vector."""
        if tensor not in self.stored:
            return self.flat[tensor], vector * i64(width) if width > 1 else vector
        room = self.stored[tensor]
        units = times(room.units, i64(_PART // width))
        return room.buffer, plus(units, vector) * i64(width)

    def element(self, tensor: Tensor, position: Position) -> Expr:
        """The element of a tensor in memory at a position."""
        return self.load(tensor, offset(tensor, position, self.program.extents))

    def put_output(self, tensor: Tensor, value: Expr, position: Position) -> Stmt:
        """Write or add to an output's element as asked, rounding to its type at the end."""
        assert tensor.output_index is not None
        buffer, at = self.flat[tensor], offset(tensor, position, self.program.extents)
        grown = rounded_sum(tirx.BufferLoad(buffer, [at]), value)
        added = when(self.is_add(tensor.output_index), tirx.BufferStore(buffer, grown, [at]))
        written = tirx.BufferStore(buffer, value, [at])
        return when(self.is_write(tensor.output_index), written, added)

    def aligned(self, tensors: Sequence[Tensor]) -> Expr | None:
        """Whether these tensors begin at a multiple of a vector; None where there are none."""
        mask = i64(VECTOR_BYTES - 1)
        found = []
        for tensor in tensors:
            address = tirx.call_extern("int64", "normgraph_address", self.flat[tensor].data)
            found.append(tirx.EQ(tirx.BitwiseAnd(address, mask), i64(0)))
        return both(found) if found else None

    # Scalars.

    def kernel_scalars(self, stmts: list[Stmt]) -> Callable[[Node], Node]:
        """Make the device's scalars in a kernel; gives the rewriting of values to use them."""
        made: dict[Any, Expr] = {}
        for variable, value in self.device_scalars:
            own = tirx.Var(variable.name, str(variable.ty.dtype))
            stmts.append(tirx.Bind(own, _replaced(replace_scalars(value, self.scalars), made)))
            made[variable] = own
        return lambda node: (
            Scalar(_replaced(node.expr, made)) if made and isinstance(node, Scalar) else node
        )


def _reads(value: Expr, variables: set[Any]) -> bool:
    if isinstance(value, TensorLoad):
        return True
    if isinstance(value, tirx.Var):
        return value in variables
    return any(_reads(part, variables) for part in _parts(value))


def _parts(value: Expr) -> list[Expr]:
    if isinstance(value, BINARY):
        return [value.a, value.b]
    if isinstance(value, tirx.Cast):
        return [value.value]
    if isinstance(value, Call):
        return list(value.args)
    return [value.a] if isinstance(value, tirx.Not) else []


def _replaced(value: Expr, variables: dict[Any, Expr]) -> Expr:
    if isinstance(value, tirx.Var):
        return variables.get(value, value)
    if isinstance(value, BINARY):
        return type(value)(_replaced(value.a, variables), _replaced(value.b, variables))
    if isinstance(value, tirx.Cast):
        return tirx.Cast(str(value.ty.dtype), _replaced(value.value, variables))
    if isinstance(value, Call):
        args = [_replaced(arg, variables) for arg in value.args]
        return Call(value.op, args, ret_ty=value.ty)
    return tirx.Not(_replaced(value.a, variables)) if isinstance(value, tirx.Not) else value
