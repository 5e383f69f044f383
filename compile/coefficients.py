"""Takes what is the same for a whole slice out of its rows.

After the element-wise values are multiplied out, every part of them that has one value a slice
becomes a step of its own, done once a slice (and for neighbouring slices in vectors) in front of
the pass that uses it.
"""

from __future__ import annotations

from normgraph.compile.affine import multiplied_out
from normgraph.compile.slice_plan import SlicePlan, Step
from normgraph.compile.tensor_program import (
    Apply,
    Cast,
    Load,
    Node,
    Operation,
    Tensor,
    loads,
)


def settle(plan: SlicePlan) -> None:
    """Rewrite the passes of `plan` so."""
    _Coefficients(plan).run()


class _Coefficients:
    def __init__(self, plan: SlicePlan) -> None:
        self.plan = plan
        self.slice_axes = frozenset(plan.slice_axes)
        self.ready: dict[Tensor, int] = {
            step.op.out: k for k, work in enumerate(plan.passes) for step in work.after
        }
        for k, work in enumerate(plan.passes):
            self.ready |= {step.op.out: k for step in work.wide if step.is_sum}

    def run(self) -> None:
        for work in self.plan.passes:
            for step in work.wide:
                step.value = self._taken_out(multiplied_out(step.value, self._varies), step)

    def _varies(self, node: Node) -> bool:
        return not all(self._is_narrow(tensor) for tensor in loads(node))

    def _is_narrow(self, tensor: Tensor) -> bool:
        given = tensor.input_index is not None and tensor.axes <= self.slice_axes
        whole = tensor.axes == frozenset(self.plan.wide_axes)
        return tensor in self.plan.per_slice or (given and not whole)

    def _taken_out(self, node: Node, step: Step) -> Node:
        if not isinstance(node, Apply):
            return node
        if self._varies(node):
            return Apply(node.make, tuple(self._taken_out(arg, step) for arg in node.args))
        tensor = self.plan.slice_value("coefficient", dtype_of(node))
        # Inputs are there before the first pass, which has steps of its own only.
        at = max((self.ready.get(t, 0) for t in loads(node)), default=0)
        self.plan.passes[at].after.append(Step(Operation(tensor, node), node, step.needs))
        self.ready[tensor] = at
        return Load(tensor)


def dtype_of(node: Node) -> str:
    """The type of a value."""
    while isinstance(node, Apply) and not isinstance(node.make, Cast):
        node = node.args[0]
    if isinstance(node, Apply):
        assert isinstance(node.make, Cast)
        return node.make.dtype
    return node.tensor.dtype if isinstance(node, Load) else str(node.expr.ty.dtype)
