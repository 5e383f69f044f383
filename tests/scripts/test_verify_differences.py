"""Central differences find the gradient, and tell a wrong one from a right one."""

from __future__ import annotations

import numpy as np
import pytest

import normgraph.graphs.reference as reference
from normgraph import NormSpec
from normgraph.scripts.verify_differences import differences
from normgraph.scripts.verify_inputs import Case, Inputs, forward_names

SPECS = (
    (NormSpec("batch_norm"), (3, 4, 5)),
    (NormSpec("instance_norm", correction=1), (2, 4, 5)),
    (NormSpec("group_norm", groups=2), (2, 4, 5)),
    (NormSpec("layer_norm", normalized_ndim=2), (3, 4, 5)),
    (NormSpec("rms_norm"), (3, 4, 5)),
)


@pytest.mark.parametrize(("spec", "shape"), SPECS, ids=lambda value: getattr(value, "op", ""))
def test_they_agree_with_the_equations(spec: NormSpec, shape: tuple[int, ...]) -> None:
    inputs = Inputs(spec, "float64", Case(shape, 2.0), seed=1)
    given = inputs.take([*forward_names(spec), "dy"])
    v = inputs.values
    names = ["dy", "x", "gamma", "inv_std"] + (["mean"] if "mean" in v else [])
    exact = reference.run(spec, "backward", inputs.take(names))
    random = np.random.default_rng(0)
    for output, gradient in exact.items():
        found = differences(spec, "backward", given, output, positions=8, random=random)
        assert len({each.index for each in found}) == min(8, gradient.size)
        for each in found:
            assert abs(gradient[each.index] - each.value) <= each.uncertainty + 1e-9
            assert each.uncertainty < 1e-4


def test_frozen_statistics_are_constants() -> None:
    """The frozen gradient is dy * gamma / sqrt(var + eps); the training one is another."""
    spec = NormSpec("batch_norm")
    inputs = Inputs(spec, "float64", Case((3, 4, 5), 0.0), seed=2)
    v = inputs.values
    given = inputs.take([*forward_names(spec), "dy"])
    by_kind = {
        kind: differences(spec, kind, given, "dx", positions=8, random=np.random.default_rng(0))
        for kind in ("backward", "backward_frozen")
    }
    scale = v["gamma"] / np.sqrt(v["running_var"] + spec.eps)
    frozen = v["dy"] * scale[None, :, None]
    for each in by_kind["backward_frozen"]:
        assert frozen[each.index] == pytest.approx(each.value, abs=1e-8)
    assert any(abs(frozen[each.index] - each.value) > 1e-2 for each in by_kind["backward"])
