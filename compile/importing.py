"""From an ONNX graph to one fused PrimFunc, still unscheduled: steps 2 to 4 of the pipeline."""

from __future__ import annotations

from typing import Any

import onnx
import tvm
from tvm import relax, tirx
from tvm.ir.prim.expr import IntImm
from tvm.relax.frontend.onnx import from_onnx


def to_relax(model: onnx.ModelProto) -> Any:
    """Import the graph as it stands; dimension names become symbolic extents."""
    return from_onnx(_without_passed_inputs(model), keep_params_in_input=False)


def _without_passed_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A function cannot return its own input, so an output that is one becomes input * 1."""
    inputs = {value.name: value for value in model.graph.input}
    passed = [n for n in model.graph.node if n.op_type == "Identity" and n.input[0] in inputs]
    if not passed:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Identity" and node.input[0] in inputs:
            one = f"{node.output[0]}_one"
            dtype = inputs[node.input[0]].type.tensor_type.elem_type
            copy.graph.initializer.append(onnx.helper.make_tensor(one, dtype, [], [1.0]))
            node.op_type = "Mul"
            node.input.append(one)
    return copy


def legalize(module: Any) -> Any:
    """Every node becomes a call of a TIR function; constants are folded, dead nodes dropped."""
    module = relax.transform.LegalizeOps()(module)
    module = relax.transform.FoldConstant()(module)
    return relax.transform.DeadCodeElimination()(module)


def fuse(module: Any) -> Any:
    """The whole graph becomes one PrimFunc, inputs first, then outputs, one block a node."""
    main = module["main"]
    parts = {gv: func for gv, func in module.functions.items() if gv.name_hint != "main"}
    whole = main.without_attr("num_input").without_attr("global_symbol").with_attr("Primitive", 1)
    builder = relax.BlockBuilder(tvm.IRModule(parts))
    fused = builder.add_func(relax.utils.copy_with_new_vars(whole), "fused")
    outer = relax.utils.copy_with_new_vars(main)
    with builder.function("main", outer.params):
        with builder.dataflow():
            out = builder.emit_output(relax.Call(fused, outer.params))
        builder.emit_func_output(out)
    return relax.transform.FuseTIR()(builder.get())["fused"]


def with_every_input(func: Any, model: onnx.ModelProto) -> Any:
    """The function with the inputs that the graph declares and no node reads, in their places.

    The import drops them, but a caller passes all of a graph's inputs.
    """
    present = {param.name: param for param in func.params}
    n_outputs = len(model.graph.output)
    outputs = list(func.params)[len(func.params) - n_outputs :]
    symbols = {
        dim.name: dim for param in func.params for dim in param.shape if isinstance(dim, tirx.Var)
    }
    inputs = [
        present[i.name] if i.name in present else _unread(i, symbols) for i in model.graph.input
    ]
    if len(inputs) + n_outputs == len(func.params):
        return func
    return tirx.PrimFunc([*inputs, *outputs], func.body, func.ret_type, func.attrs)


def _unread(value: onnx.ValueInfoProto, symbols: dict[str, Any]) -> Any:
    tensor = value.type.tensor_type
    shape = [
        symbols.setdefault(d.dim_param, tirx.Var(d.dim_param, "int64"))
        if d.HasField("dim_param")
        else IntImm("int64", d.dim_value)
        for d in tensor.shape.dim
    ]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return tirx.decl_buffer(shape, dtype, value.name)
