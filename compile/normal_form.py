"""A program's operations in the form that is planned: none without a use, sums of sums as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from normgraph.compile.tensor_program import Load, Operation, Tensor, TensorProgram, loads


def normal_form(program: TensorProgram) -> dict[Tensor, Operation]:
    """The operations by what they give, in order."""
    ops = {op.out: op for op in program.operations}
    _collapse_nested_sums(ops)
    return _reachable(ops, program.outputs)


def users_of(ops: Iterable[Operation]) -> dict[Tensor, list[Operation]]:
    """By tensor, the operations that read it."""
    users: dict[Tensor, list[Operation]] = defaultdict(list)
    for op in ops:
        for tensor in set(loads(op.value)):
            users[tensor].append(op)
    return users


def _collapse_nested_sums(ops: dict[Tensor, Operation]) -> None:
    """A sum that only feeds sums (batch norm over s, then n) is done in one traversal."""
    users = users_of(ops.values())
    for op in list(ops.values()):
        inner = _direct_sum(op, ops)
        if inner is None or inner.out.output_index is not None:
            continue
        if all(_direct_sum(user, ops) is inner for user in users[inner.out]):
            ops[op.out] = Operation(op.out, inner.value, op.reduce | inner.reduce)


def _direct_sum(op: Operation, ops: dict[Tensor, Operation]) -> Operation | None:
    if op.reduce and isinstance(op.value, Load):
        inner = ops.get(op.value.tensor)
        if inner is not None and inner.reduce:
            return inner
    return None


def _reachable(ops: dict[Tensor, Operation], outputs: Iterable[Tensor]) -> dict[Tensor, Operation]:
    live: set[Tensor] = set()
    stack = list(outputs)
    while stack:
        tensor = stack.pop()
        if tensor in live:
            continue
        live.add(tensor)
        if tensor in ops:
            stack.extend(loads(ops[tensor].value))
    return {tensor: op for tensor, op in ops.items() if tensor in live}
