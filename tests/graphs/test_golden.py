"""Every operator and kind as ONNX text, so that a change of a graph shows in a diff.

`pytest tests/graphs/test_golden.py --update-golden` writes the files anew.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from normgraph import NormSpec, graphs

SPECS = {
    "batch_norm": (NormSpec("batch_norm"), "N,64,H,W"),
    "instance_norm": (NormSpec("instance_norm"), "N,64,H,W"),
    "group_norm": (NormSpec("group_norm", groups=32), "N,64,H,W"),
    "layer_norm": (NormSpec("layer_norm"), "B,T,512"),
    "rms_norm": (NormSpec("rms_norm"), "B,T,512"),
}


@pytest.mark.parametrize(
    ("op", "kind"), [(op, kind) for op, (spec, _) in SPECS.items() for kind in graphs.kinds(spec)]
)
def test_golden_text(op: str, kind: str, repository: Path, update_golden: bool) -> None:
    spec, shape = SPECS[op]
    path = repository / "tests" / "graphs" / "golden" / f"{op}-{kind}.txt"
    model = graphs.build(spec, kind, shape)
    for node in model.graph.node:
        node.ClearField("name")  # the name of what it makes, which the text has already
    text = onnx.printer.to_text(model.graph) + "\n"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
