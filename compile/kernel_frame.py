"""What surrounds the loops of a kernel: its signature, its memory and the callers' requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad

from normgraph.compile.addressing import element_count
from normgraph.compile.half_types import HALF_TYPES, before_rounding, narrow, widen
from normgraph.compile.slice_plan import SlicePlan, Step
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    both,
    constant,
    demand,
    either,
    floordiv,
    i64,
    loop,
    modulo,
    plus,
    seq,
    times,
    vector_loop,
    when,
    zero,
)

NULL, WRITE, ADD = 0, 1, 2

# Parameters along a row of up to so many elements are worth widening once: as float32 longer ones
# crowd the rows out of the first cache. A vector's elements are widened together.
_WIDENED_MOST, _WIDENED_LANES = 2048, 16


class Frame:
    """Opens and closes the function and gives access to every tensor as flat memory.

    The function takes the graph's inputs and outputs as DLTensors and then `req`, an int64 with two
    bits for each output: 0 null, 1 write, 2 add. Shapes are checked on entry; an output whose
    request is null may be any compact tensor of its rank and dtype and is not touched.
    """

    def __init__(self, plan: SlicePlan, outputs: Sequence[str], partials: Expr) -> None:
        self.plan = plan
        self.program = plan.program
        self.func = self.program.func
        self.n_partials = partials
        self.output_names = outputs
        self.n_outputs = len(outputs)
        self.req = tirx.Var("req", "int64")
        self.requests: list[Expr] = []
        self.flat: dict[Tensor, Any] = {}
        self.workspaces: dict[Tensor, Any] = {
            t: _workspace(t, element_count(t)) for t in plan.stored
        }
        self.partials: dict[Tensor, Any] = {
            s.op.out: _workspace(s.op.out, times(partials, element_count(s.op.out)))
            for s in plan.column_sums
        }
        # Parameters along a row, of a half type: widened once and not for every row.
        self.widened: dict[Tensor, Any] = {
            t: tirx.decl_buffer((element_count(t),), "float32", f"{t.name}_wide", scope="global")
            for t in self.program.inputs
            if t.dtype in HALF_TYPES and _is_short_along_rows(t, plan)
        }
        self.params: list[Any] = []
        self.scalars: dict[Any, Expr] = {}

    # The function.

    def open(self) -> list[Stmt]:
        """The statements in front of the loops: requests, shape checks, views, workspaces."""
        stmts: list[Stmt] = []
        n_inputs = len(self.func.params) - self.n_outputs
        by_param: dict[int | None, Tensor] = {t.input_index: t for t in self.program.inputs}
        for tensor in self.program.outputs:
            assert tensor.output_index is not None
            by_param[n_inputs + tensor.output_index] = tensor
        checks: list[Stmt] = []
        for k in range(self.n_outputs):
            mode = tirx.BitwiseAnd(tirx.shift_right(self.req, i64(2 * k)), i64(3))
            self.requests.append(bind(f"request{k}", mode, stmts))
        for index, param in enumerate(self.func.params):
            shape, name = param.shape, param.name
            if index >= n_inputs:
                name = self.output_names[index - n_inputs]
                # Sizes of its own: a null output may be a placeholder of any size.
                shape = [tirx.Var(f"{name}_{i}", "int64") for i in range(len(shape))]
                fits = [tirx.EQ(own, want) for own, want in zip(shape, param.shape, strict=True)]
                if fits:
                    unused = tirx.EQ(self.requests[index - n_inputs], i64(NULL))
                    message = f"{name} does not have the shape the inputs give"
                    checks.append(demand(tirx.Or(unused, both(fits)), message))
            own = tirx.decl_buffer(shape, param.dtype, name, data_alignment=item_size(param.dtype))
            self.params.append(own)
            if len(param.shape) == 0:
                self.scalars[param] = tirx.BufferLoad(own, [])
            shown = by_param.get(index)
            if shown is not None:
                size = element_count(shown)
                view = tirx.decl_buffer(
                    (size,),
                    param.dtype,
                    f"{name}_flat",
                    data=own.data,
                    data_alignment=item_size(param.dtype),
                )
                stmts.append(tirx.DeclBuffer(view, data=own.data))
                self.flat[shown] = view
        stmts[self.n_outputs : self.n_outputs] = checks
        for variable, value in self.program.scalars:
            stmts.append(tirx.Bind(variable, replace_scalars(value, self.scalars)))
        stmts.extend(tirx.AllocBuffer(b) for b in self.workspaces.values())
        stmts.extend(tirx.AllocBuffer(b) for b in self.partials.values())
        for tensor, buffer in self.widened.items():
            stmts += [tirx.AllocBuffer(buffer), _widen_all(self.flat[tensor], buffer)]
        return stmts

    def close(self, body: Stmt) -> Any:
        """The function of all parameters with this body.

        No argument overlaps another, but for a new_running_* that is exactly its running_*: each of
        its elements is read before it is written.
        """
        return tirx.PrimFunc([*self.params, self.req], body).with_attr("tirx.noalias", True)

    # Requests.

    def output_of(self, step: Step) -> int:
        """The index of the output a step computes."""
        index = step.op.out.output_index
        assert index is not None
        return index

    def any_of(self, outputs: Iterable[int]) -> Expr | None:
        """Whether any of these outputs is wanted; None where that is certain."""
        wanted = sorted(outputs)
        if len(wanted) == self.n_outputs and self.n_outputs > 1:
            return None
        return either([tirx.NE(self.requests[k], i64(NULL)) for k in wanted])

    def is_write(self, output: int) -> Expr:
        """Whether the caller asked for an output to be written."""
        return tirx.EQ(self.requests[output], i64(WRITE))

    def is_add(self, output: int) -> Expr:
        """Whether the caller asked for an output to be added to."""
        return tirx.EQ(self.requests[output], i64(ADD))

    # Memory.

    def load(self, tensor: Tensor, at: Expr) -> Expr:
        """An element of a workspace or of a parameter's memory, float32 where it was widened."""
        for own in (self.workspaces, self.widened):
            if tensor in own:
                return tirx.BufferLoad(own[tensor], [at])
        return tirx.BufferLoad(self.flat[tensor], [at])

    def store(self, tensor: Tensor, value: Expr, at: Expr) -> Stmt:
        """Put an element into a tensor's workspace."""
        return tirx.BufferStore(self.workspaces[tensor], value, [at])

    def write_output(self, step: Step, value: Expr, at: Expr) -> Stmt:
        """Put an element into an output."""
        return tirx.BufferStore(self.flat[step.op.out], value, [at])

    def add_output(self, step: Step, value: Expr, at: Expr, new: Expr | None = None) -> Stmt:
        """Add to an element of an output; `new` says whether it was not added to before."""
        buffer = self.flat[step.op.out]
        old = tirx.BufferLoad(buffer, [at])
        grown = rounded_sum(old, value)
        if new is not None:
            grown = tirx.Select(new, grown, old)
        return tirx.BufferStore(buffer, grown, [at])

    def on_request(self, tensor: Tensor, code: Callable[[bool], Stmt]) -> Stmt:
        """code(False) where a small output is to be written, code(True) where added to.

        Around a loop the request is looked at once, and no store of it depends on a condition.
        """
        assert tensor.output_index is not None
        added = when(self.is_add(tensor.output_index), code(True))
        return when(self.is_write(tensor.output_index), code(False), added)

    def put(self, tensor: Tensor, value: Expr, at: Expr, add: bool) -> Stmt:
        """Store into a small output, or add to it."""
        buffer = self.flat[tensor]
        if add:
            value = rounded_sum(tirx.BufferLoad(buffer, [at]), value)
        return tirx.BufferStore(buffer, value, [at])

    def clear_partials(self, chunk: Expr) -> Stmt:
        """Set a row range's partial sums to zero."""
        stmts = []
        for tensor, buffer in self.partials.items():
            stmts.append(_clear(buffer, tensor, chunk))
        return seq(stmts)


def replace_scalars(value: Expr, scalars: dict[Any, Expr]) -> Expr:
    """`value` with reads of 0-d inputs made from the function's own parameters."""
    if isinstance(value, TensorLoad):
        return scalars[value.source]
    if isinstance(value, tirx.Cast):
        return tirx.Cast(str(value.ty.dtype), replace_scalars(value.value, scalars))
    if isinstance(value, Call):
        args = [replace_scalars(arg, scalars) for arg in value.args]
        return Call(value.op, args, ret_ty=value.ty)
    if isinstance(value, tirx.Not):
        return tirx.Not(replace_scalars(value.a, scalars))
    if hasattr(value, "a") and hasattr(value, "b"):
        return type(value)(replace_scalars(value.a, scalars), replace_scalars(value.b, scalars))
    return value


def _clear(buffer: Any, tensor: Tensor, chunk: Expr) -> Stmt:
    size = element_count(tensor)
    none = zero(tensor.dtype)
    return loop(
        size,
        lambda i: tirx.BufferStore(buffer, none, [tirx.Add(times(chunk, size), i)]),
        name="clear",
    )


def rounded_sum(old: Expr, value: Expr) -> Expr:
    """old + value; of a half type, from what the value was rounded from, and rounded once."""
    dtype = str(value.ty.dtype)
    if dtype not in HALF_TYPES:
        return tirx.Add(old, value)
    exact = before_rounding(value)
    return narrow(dtype, tirx.Add(widen(old), widen(value) if exact is None else exact))


def _is_short_along_rows(tensor: Tensor, plan: SlicePlan) -> bool:
    """Whether it is read along every row, and short."""
    length, whole = constant(element_count(tensor)), tensor.axes == frozenset(plan.wide_axes)
    if length is None or length > _WIDENED_MOST or whole or not plan.inner_axes:
        return False
    return plan.inner_axes[-1] in tensor.axes


def _widen_all(source: Any, wide: Any) -> Stmt:
    size, lanes = wide.shape[0], _WIDENED_LANES

    def one(index: Expr) -> Stmt:
        return tirx.BufferStore(wide, widen(tirx.BufferLoad(source, [index])), [index])

    def vector(k: Expr) -> Stmt:
        return vector_loop(lanes, lambda lane: one(plus(times(k, i64(lanes)), lane)))

    done = times(floordiv(size, lanes), i64(lanes))
    return seq(
        [
            loop(floordiv(size, lanes), vector, name="vector"),
            loop(modulo(size, lanes), lambda k: one(plus(done, k)), name="rest"),
        ]
    )


def _workspace(tensor: Tensor, size: Expr) -> Any:
    return tirx.decl_buffer((size,), tensor.dtype, f"{tensor.name}_all", scope="global")


def item_size(dtype: Any) -> int:
    """Bytes of an element, which is all the alignment that kernels ask of a pointer."""
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[str(dtype)]
