"""One kind of an operator as a callable: checks, allocation, and the kernel call itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

from normgraph.errors import ArgumentTypeError
from normgraph.runtime import dlpack, empty, rules
from normgraph.runtime.adapters import Adapter, View, adapter_for_call
from normgraph.runtime.arguments import (
    Checked,
    compact,
    in_order,
    input_view,
    is_scalar,
    output_view,
)
from normgraph.runtime.bound_call import repeated
from normgraph.runtime.numpy_call import Plan, plain_call
from normgraph.runtime.options import GradReq, Selection, Want, check_out, freeze, select
from normgraph.runtime.output_pool import LARGE
from normgraph.runtime.overlap import check_overlap
from normgraph.runtime.signature import Shape, Signature
from normgraph.spec import NormSpec

# Shapes remembered as checked; a caller with more than this many starts over.
MOST_PLANS = 1024


class _Fast:
    """What the short path needs of one array library; `arrays` are inputs that were good."""

    def __init__(self, adapter: Adapter, signature: Signature, arrays: Sequence[Any]) -> None:
        self.ready = adapter.ready
        self.writable = adapter.writable
        self.empty = adapter.empty
        self.empty_large = adapter.empty_large
        self.has_zero = adapter.has_zero
        self.scalar = adapter.scalar
        self.written = adapter.written if adapter.notes_writes else None
        names = [spec.dtype for spec in (*signature.inputs, *signature.outputs)]
        dtypes = adapter.native_dtypes(names, arrays)
        self.inputs, self.outputs = dtypes[: len(arrays)], dtypes[len(arrays) :]
        self.arguments = adapter.kernel_arguments(names)


class Call:
    """A compiled kind: call it with the arrays of `signature.inputs`, by position or by name.

    NumPy arrays give NumPy arrays back, torch CPU tensors give torch tensors, and other DLPack CPU
    arrays give tvm_ffi.Tensor, which every DLPack library reads; one call takes one kind of array.
    `momentum`, where it is an input, may also be a Python number. The outputs come in the order of
    `signature.outputs`: one bare, several as a named tuple.

    An input without elements is answered without the kernel: y and dx are empty, parameter
    gradients 0, new_running_* equal to running_*, and mean 0 and inv_std 1/sqrt(eps) where they
    have elements.

    May be called from many threads at once, as long as no two write the same array.
    """

    def __init__(self, signature: Signature, spec: NormSpec, function: Callable[..., Any]) -> None:
        self.signature = signature
        self._spec = spec
        self._function = function
        self._names = signature.output_names
        self._select = lru_cache(maxsize=128)(lambda want, req: select(signature, want, req))
        self._every = select(signature, None, "write")
        self._arity = len(signature.inputs)
        self._in_place = signature.in_place
        self._takes_momentum = "momentum" in signature.input_names  # then it is the last one
        # Where x is recovered from y by dividing by gamma, the index of gamma among the inputs.
        self._gamma = -1
        if signature.kind == "backward_from_output":
            self._gamma = _index(signature, "gamma")
        self._plans: dict[tuple[Shape, ...], Plan] = {}
        self._fast: dict[type, _Fast] = {}
        # Kernels do not touch an output that is not requested; any memory of its rank will do.
        self._placeholders = [
            dlpack.owned_tensor((1,) * len(spec_.shape), spec_.dtype) for spec_ in signature.outputs
        ]

    def __repr__(self) -> str:
        return f"<normgraph kernel {self.signature}>"

    def __call__(
        self,
        *args: Any,
        out: Mapping[str, Any] | None = None,
        want: Want | None = None,
        grad_req: GradReq = "write",
        copy: bool = True,
        **named: Any,
    ) -> Any:
        """Run the kernel.

        Options:
            out: arrays to write into, by output name; they are also what is returned for these
                names. Each must be wanted and have the output's exact dtype and shape, compact,
                writable, of the same kind as the inputs, and share memory with no other argument.
                One exception: new_running_mean and new_running_var may be exactly running_mean
                and running_var, which then are updated in place (not with "add"). The others are
                allocated, large ones in the memory of `normgraph.pool`.
            want: the outputs to compute, a name or several; the others are neither computed,
                allocated nor written, and are not in the result. The result keeps the table's
                order. By default all whose grad_req is not "null".
            grad_req: "write", "add" (add to the array given in out, which is then required) or
                "null" (the same as not wanted): one for all wanted outputs, or a dict by name,
                where "write" holds for the names it leaves out.
            copy: True copies an input whose memory the kernel cannot take as it is (strided,
                not aligned to its elements, lazily negated); False refuses it. Read-only inputs
                are never copied.

        Raises ArgumentTypeError (a TypeError) for a wrong dtype, kind of array or name and for a
        missing or surplus argument, ArgumentError (a ValueError) for everything else that is wrong
        with an argument; nothing has been written by then. Contradictions (out or "add" for what
        is not wanted, "null" for what is, "add" without out, nothing wanted) are refused.
        """
        if copy is not True and copy is not False:
            raise ArgumentTypeError(
                f"{self.signature.kind}: copy must be True or False, but it is {copy!r}."
            )
        if want is None and type(grad_req) is str and grad_req == "write":
            selection = self._every
        else:
            selection = self._select(*freeze(self.signature, want, grad_req))
        if named or len(args) != self._arity:
            args = in_order(self.signature, args, named, "out, want, grad_req, copy")
        fast = self._fast.get(args[0].__class__)
        if fast is not None:
            if self._takes_momentum and type(args[-1]) is float:
                args = (*args[:-1], fast.scalar(args[-1], self.signature.inputs[-1].dtype))
            ready = fast.ready(args, fast.inputs)
            if ready is not None:
                plan = self._plans.get(ready[0])
                if plan is not None:
                    result = self._short(fast, args, ready[1], plan, selection, out)
                    if result is not None:
                        return result
        return self._full(args, selection, out, copy)

    def kernel(self, inputs: Sequence[Any]) -> list[Any]:
        """All outputs of the bare kernel, from tvm_ffi tensors known to be good."""
        shapes = self.signature.output_shapes(tuple(tuple(tensor.shape) for tensor in inputs))
        outputs = [
            dlpack.owned_tensor(shape, spec.dtype)
            for shape, spec in zip(shapes, self.signature.outputs, strict=True)
        ]
        self._function(*inputs, *outputs, self._every.request)
        return outputs

    def function(self) -> Callable[..., Any]:
        """This call as a function, which costs less where it is small; it does the same."""
        if self._gamma >= 0:
            return self.__call__
        return plain_call(self.signature, self._function, self._every, self._plans, self.__call__)

    def _short(
        self,
        fast: _Fast,
        args: tuple[Any, ...],
        owned: bool,
        plan: Plan,
        selection: Selection,
        out: Any,
    ) -> Any:
        """The call for arrays and shapes known to be good; None leaves it to the full path."""
        if self._gamma >= 0 and fast.has_zero(args[self._gamma]):
            return None
        shapes, large = plan
        make = fast.empty_large if large else fast.empty
        if out is not None:
            buffers = self._given(fast, args, owned, shapes, selection, out, make)
            if buffers is None:
                return None
        elif selection.added:
            return None
        elif selection is self._every:
            buffers = make(shapes, fast.outputs)
        else:
            buffers = self._placeholders.copy()
            for index in selection.wanted:
                (buffers[index],) = make((shapes[index],), (fast.outputs[index],))
        given = (*args, *buffers)
        self._function(*(fast.arguments(given) if fast.arguments else given), selection.request)
        if fast.written is not None and out is not None:
            fast.written(out.values())
        if selection.result is None:
            return buffers[selection.wanted[0]]
        if len(selection.wanted) < len(buffers):
            buffers = [buffers[index] for index in selection.wanted]
        return tuple.__new__(selection.result, buffers)

    def _given(
        self,
        fast: _Fast,
        args: tuple[Any, ...],
        owned: bool,
        shapes: tuple[Shape, ...],
        selection: Selection,
        out: Any,
        make: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """The kernel's outputs where some are the caller's; None leaves it to the full path."""
        if type(out) is not dict:
            return None
        buffers = self._placeholders.copy()
        others = args
        left = len(out)
        names = self._names
        for index in selection.wanted:
            array = out.get(names[index])
            if array is not None:
                left -= 1
                beside = others
                position = self._in_place[index]
                if position >= 0 and array is args[position] and index not in selection.added:
                    beside = (*others[:position], *others[position + 1 :])
                if not fast.writable(array, fast.outputs[index], shapes[index], beside, owned):
                    return None
                buffers[index] = array
                others = (*beside, array)
            elif index in selection.added:
                return None
            else:
                (buffers[index],) = make((shapes[index],), (fast.outputs[index],))
        return None if left else buffers

    def bind(
        self,
        *args: Any,
        out: Mapping[str, Any] | None = None,
        want: Want | None = None,
        grad_req: GradReq = "write",
        **named: Any,
    ) -> Callable[[], Any]:
        """The call of these arrays again and again; see `Operator.bind`."""
        signature, kind = self.signature, self.signature.kind
        selection = self._select(*freeze(signature, want, grad_req))
        arrays = in_order(signature, args, named, "out, want, grad_req")
        checked = self._check(arrays, selection, out, copy=False, bound=True)
        adapter = checked.adapter
        result = self._result(checked, selection)
        held = [
            (f"{kind}: {spec.name}", view.array if is_scalar(spec, array) else array, view)
            for spec, array, view in zip(signature.inputs, arrays, checked.inputs, strict=True)
        ]
        outputs = list(result) if selection.result else [result]
        for index, array in zip(selection.wanted, outputs, strict=True):
            where = f"{kind}: {self._names[index]}"
            checked.outputs[index] = adapter.view(array, where)
            held.append((where, array, checked.outputs[index]))
        checks = adapter.guards(held)
        if self._gamma >= 0:
            checks = [*checks, partial(self._check_gamma, adapter, checked.inputs[self._gamma])]
        if checked.is_empty:
            kernel, arguments = self._answer, (checked, selection)
        else:
            kernel = self._function
            arguments = (*self._arguments(checked, adapter.lasting), selection.request)
        written = partial(adapter.written, outputs) if adapter.notes_writes else None
        return repeated(signature, kernel, arguments, result, checks, written)

    def _full(self, arrays: tuple[Any, ...], selection: Selection, out: object, copy: bool) -> Any:
        """The call with every check, which also knows how to say what is wrong."""
        checked = self._check(arrays, selection, out, copy=copy)
        adapter = checked.adapter
        if checked.is_empty:
            self._answer(checked, selection)
        else:
            arguments = self._arguments(checked, adapter.kernel_argument)
            self._function(*arguments, selection.request)
            self._remember(checked, arrays)
        adapter.written(checked.given.values())
        return self._result(checked, selection)

    def _check(
        self,
        arrays: tuple[Any, ...],
        selection: Selection,
        out: object,
        *,
        copy: bool,
        bound: bool = False,
    ) -> Checked:
        """Raise for what is wrong with any argument; allocate what is not given."""
        signature, kind = self.signature, self.signature.kind
        given = check_out(signature, selection, out)
        named = [
            (spec.name, array)
            for spec, array in zip(signature.inputs, arrays, strict=True)
            if not is_scalar(spec, array)
        ]
        adapter = self._adapter([*named, *((f"out[{name!r}]", given[name]) for name in given)])
        views = self._views(adapter, arrays)
        input_shapes = tuple(view.shape for view in views)
        known = self._plans.get(input_shapes)
        if known is None:
            shapes = signature.output_shapes(input_shapes)
            rules.check_enough_values(self._spec, signature, input_shapes)
        else:
            shapes = known[0]
        views = [
            compact(kind, adapter, spec, view, copy=copy, bound=bound)
            for spec, view in zip(signature.inputs, views, strict=True)
        ]
        if self._gamma >= 0 and not bound:  # what is bound may be filled later
            self._check_gamma(adapter, views[self._gamma])
        outputs: dict[int, View] = {}
        for index in selection.wanted:
            if self._names[index] in given:
                spec, array = signature.outputs[index], given[self._names[index]]
                outputs[index] = output_view(kind, adapter, spec, shapes[index], array)
        check_overlap(signature, selection, views, outputs)
        for index in selection.wanted:
            if index not in outputs:
                dtype = signature.outputs[index].dtype
                outputs[index] = adapter.allocate(shapes[index], dtype, views)
        return Checked(adapter, views, outputs, given, shapes)

    def _check_gamma(self, adapter: Adapter, gamma: View) -> None:
        if adapter.has_zero(gamma.array):
            rules.check_no_zero(self.signature.kind, adapter.memory(gamma), gamma.dtype)

    def _arguments(self, checked: Checked, argument: Callable[[View], Any]) -> tuple[Any, ...]:
        """What the kernel takes, but for the request."""
        buffers = self._spare(checked)
        for index, view in checked.outputs.items():
            buffers[index] = argument(view)
        return (*map(argument, checked.inputs), *buffers)

    def _result(self, checked: Checked, selection: Selection) -> Any:
        """What the caller gets: the outputs as they were given, or new ones."""
        outputs = [
            checked.given.get(self._names[index], checked.outputs[index].array)
            for index in selection.wanted
        ]
        if selection.result is None:
            return outputs[0]
        return tuple.__new__(selection.result, outputs)

    def _answer(self, checked: Checked, selection: Selection) -> None:
        """Write the outputs where an input has no elements."""
        memory = checked.adapter.memory
        empty.answer(
            self._spec,
            dict(zip(self.signature.input_names, map(memory, checked.inputs), strict=True)),
            {
                self._names[index]: (memory(view), index in selection.added)
                for index, view in checked.outputs.items()
            },
        )

    def _spare(self, checked: Checked) -> list[Any]:
        """What a kernel takes for each output that is not requested."""
        del checked  # on a device they are where the arrays are
        return self._placeholders.copy()

    def _remember(self, checked: Checked, arrays: Sequence[Any]) -> None:
        kind = type(arrays[0])
        if kind not in self._fast:
            self._fast[kind] = _Fast(checked.adapter, self.signature, arrays)
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        large = any(
            prod(shape) * placeholder.dtype.itemsize >= LARGE
            for shape, placeholder in zip(checked.shapes, self._placeholders, strict=True)
        )
        self._plans[checked.input_shapes] = checked.shapes, large

    def _adapter(self, arrays: Sequence[tuple[str, Any]]) -> Any:
        return adapter_for_call(self.signature.kind, arrays)

    def _views(self, adapter: Any, arrays: Sequence[Any]) -> list[View]:
        return [
            input_view(self.signature.kind, adapter, spec, array)
            for spec, array in zip(self.signature.inputs, arrays, strict=True)
        ]


def _index(signature: Signature, name: str) -> int:
    names = signature.input_names
    return names.index(name) if name in names else -1
