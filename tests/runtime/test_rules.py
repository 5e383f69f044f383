"""Where PyTorch refuses one value per statistic, so does the torch convention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from normgraph.errors import ArgumentError
from normgraph.runtime import Signature, TensorSpec
from normgraph.runtime.rules import check_enough_values
from normgraph.spec import NormSpec

SIZES = [
    size
    for rank in (2, 3, 4)
    for size in itertools.product((0, 1, 2), (2, 4), *[(0, 1, 2)] * (rank - 2))
]


def _signature(kind: str, rank: int) -> Signature:
    return Signature(kind, (TensorSpec("x", "float32", ("D",) * rank),), ())


def _refused(spec: NormSpec, kind: str, size: tuple[int, ...]) -> str:
    try:
        check_enough_values(spec, _signature(kind, len(size)), (size,))
    except ArgumentError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("op", ["instance_norm", "batch_norm", "group_norm", "layer_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_as_torch_does(op: str, training: bool) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for size in SIZES:
        x = torch.ones(size)
        stats = {"running_mean": torch.zeros(size[1]), "running_var": torch.ones(size[1])}
        calls: dict[str, Any] = {
            "instance_norm": lambda x=x, s=stats: functional.instance_norm(
                x, **s, use_input_stats=training
            ),
            "batch_norm": lambda x=x, s=stats: functional.batch_norm(x, **s, training=training),
            "group_norm": lambda x=x: functional.group_norm(x, 2),
            "layer_norm": lambda x=x: functional.layer_norm(x, x.shape[-1:]),
        }
        options: dict[str, Any] = {"groups": 2} if op == "group_norm" else {}
        if op == "instance_norm":
            options["track_running_stats"] = True
        try:
            calls[op]()
            expected = ""
        except ValueError as error:
            expected = str(error).partition(" when training")[0]
        refused = _refused(NormSpec(op, **options), "forward" if training else "inference", size)
        assert bool(refused) == bool(expected), size
        assert expected in refused


def test_inference_by_batch_statistics_counts_too() -> None:
    spec = NormSpec("instance_norm")
    assert "Expected more than 1 spatial element" in _refused(spec, "inference", (2, 3, 1))
    tracked = NormSpec("instance_norm", track_running_stats=True)
    assert not _refused(tracked, "inference", (2, 3, 1))


def test_not_in_a_backward_nor_under_another_convention() -> None:
    spec = NormSpec("batch_norm")
    assert "Expected more than 1 value per channel" in _refused(spec, "forward", (1, 3, 1))
    for kind in ("backward", "backward_frozen", "backward_from_output"):
        assert not _refused(spec, kind, (1, 3, 1))
    for convention in ("onnx", "mxnet"):
        assert not _refused(NormSpec("batch_norm", convention=convention), "forward", (1, 3, 1))


def test_a_call_is_refused(op: Any, toy: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected more than 1 spatial element.*\(2, 3, 1\)"):
        op.forward(*toy.inputs("forward", length=1))
    op.inference(*toy.inputs("inference", length=1))
    op.backward(*toy.inputs("backward", length=1))
