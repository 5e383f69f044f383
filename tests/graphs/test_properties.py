"""Shapes and options drawn at random: the graph in onnxruntime against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normgraph import graphs
from normgraph.spec import CONVENTIONS, OPERATORS


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """An operator, its options, the sizes of x and which of them are given as names."""
    op = draw(st.sampled_from(OPERATORS))
    rank = draw(st.integers(3 if op == "instance_norm" else 2, 5))
    shape = draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    options: dict[str, Any] = {"weight": draw(st.booleans())}
    if op != "rms_norm":
        options |= {"bias": draw(st.booleans()), "correction": draw(st.integers(0, 1))}
    fixed = {1}
    if op in ("batch_norm", "instance_norm"):
        tracks = options["track_running_stats"] = draw(st.booleans())
        if tracks:
            options["convention"] = draw(st.sampled_from(CONVENTIONS))
            options["momentum"] = draw(st.none() | st.floats(0, 1))
    elif op == "group_norm":
        groups = options["groups"] = draw(st.integers(1, 3))
        shape[1] = groups * draw(st.integers(1, 3))
    else:
        ndim = options["normalized_ndim"] = draw(st.integers(1, rank))
        fixed = set(range(rank - ndim, rank))
    named = [a not in fixed and draw(st.booleans()) for a in range(rank)]
    names = tuple(f"D{a}" if named[a] else d for a, d in enumerate(shape))
    return {"op": op, "shape": tuple(shape), "names": names, "options": options}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=drawn(), far=st.booleans())
def test_any_shape(make_case: Any, run_onnx: Any, arguments: dict[str, Any], far: bool) -> None:
    case = make_case(**arguments)
    for kind in graphs.kinds(case.spec):
        model = graphs.build(case.spec, kind, case.names, "float64")
        inputs = case.inputs(model, mean=100.0 if far else 0.0)
        got = run_onnx(model, inputs)
        for name, value in graphs.reference.run(case.spec, kind, inputs).items():
            limit = (1e-10 if far else 1e-12) * np.abs(value).max(initial=1.0)
            assert np.abs(got[name] - value).max(initial=0.0) <= limit, (kind, name)
