"""A small writer of ONNX graphs whose first argument is the exact name of the tensor it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from normgraph.errors import NormGraphError

# Opset 18 is the first with every operator below in the form used here; the two pins are read
# by onnxruntime from 1.14 on.
OPSET = 18
IR_VERSION = 8

ELEMENT_TYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

# Primitive operators that onnxruntime and TVM both take with static and with symbolic dims.
OPERATORS = {
    *("Abs", "Add", "Cast", "Concat", "Div", "Identity", "Mul", "Neg", "Not", "Reciprocal"),
    *("ReduceSum", "Relu", "Reshape", "Shape", "Size", "Sqrt", "Sub"),
}

Operand = str | float


class GraphWriter:
    """Collects nodes: `g.Mul("dvar", dot, -0.5)` adds a Mul that makes `dvar`, and returns "dvar".

    A Python number becomes a scalar constant of the graph's dtype. Raises `NormGraphError` where
    an operator, or a tensor read before it is made, is not known, or a name is made twice.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._known: set[str] = set()
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def __getattr__(self, op: str) -> Callable[..., str]:
        if op not in OPERATORS:
            raise AttributeError(f"{op} is not one of {', '.join(sorted(OPERATORS))}")

        def add(name: str, *operands: Operand, **attributes: int) -> str:
            return self._add(op, name, operands, attributes)

        return add

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def _add(
        self, op: str, name: str, operands: Sequence[Operand], attributes: Mapping[str, Any]
    ) -> str:
        inputs = [o if isinstance(o, str) else self.scalar(o) for o in operands]
        for used in inputs:
            if used not in self._known:
                raise NormGraphError(f"{op} {name!r} reads {used!r}, which nothing makes before it")
        self._nodes.append(
            helper.make_node(op, inputs, [self._claim(name)], name=name, **attributes)
        )
        return name

    def _claim(self, name: str) -> str:
        if name in self._known:
            raise NormGraphError(f"the tensor {name!r} is made twice")
        self._known.add(name)
        return name

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare the tensor `name` an input. Raises `NormGraphError` where it is known already."""
        self._claim(name)
        self._inputs.append(_value_info(name, dtype, shape))

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare the tensor `name`, made by now, an output."""
        if name not in self._known:
            raise NormGraphError(f"the output {name!r} is made by no node")
        self._outputs.append(_value_info(name, dtype, shape))

    def scalar(self, value: float) -> str:
        """The name of a rank-0 constant of the graph's dtype."""
        name = f"const_{float(value)!r}"
        return self._constant(name, np.array(value, dtype=self.dtype))

    def integers(self, role: str, values: Sequence[int] | int) -> str:
        """The name of an int64 constant, shared by all that ask for the same role and values."""
        flat = [values] if isinstance(values, int) else values
        name = "_".join([role, *map(str, flat)])
        return self._constant(name, np.array(values, dtype=np.int64))

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self._constants.append(numpy_helper.from_array(value, name))
        return name

    def model(
        self, name: str, doc: str, metadata: Mapping[str, str], version: str
    ) -> onnx.ModelProto:
        """The graph as a checked model, without the nodes that no output needs."""
        needed = {output.name for output in self._outputs}
        nodes = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        constants = [constant for constant in self._constants if constant.name in needed]
        graph = helper.make_graph(
            nodes[::-1], name, self._inputs, self._outputs, constants, doc_string=doc
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="normgraph",
            producer_version=version,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], list(shape))
