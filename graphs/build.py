"""`build` one graph as a checked ONNX model, `export` all of a spec's graphs as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import onnx

from normgraph import __version__
from normgraph.errors import SpecError
from normgraph.graphs.backward import write_backward
from normgraph.graphs.forward import write_forward
from normgraph.graphs.frame import Frame
from normgraph.graphs.layout import resolve_layout
from normgraph.graphs.signature import check_kind
from normgraph.graphs.signature import kinds as kinds_of
from normgraph.spec import NormSpec


def build(
    spec: NormSpec,
    kind: str,
    shape: str | Iterable[object],
    dtype: str = "float32",
    *,
    debug: bool = False,
) -> onnx.ModelProto:
    """The graph `kind` of `spec` for an x of `shape` and `dtype`, checked by onnx.checker.

    Args:
        spec: the operator and its options.
        kind: one of `kinds(spec)`; its equations are derived in docs/derivations.md.
        shape: of x: ints and names, such as ("N", 64, "H", "W") or "N,64,H,W". A dim that
            parameters vary along, and the one groups split, must be an int.
        dtype: of x, y and their gradients: float16, bfloat16, float32 or float64. The first two
            are cast to float32 behind the input; the statistics stay float32.
        debug: give named intermediates out as well, behind the normal outputs: dvar, dmean and
            delta of a backward, delta and var of a forward, scale and shift of an inference
            with running statistics.

    Returns:
        A model of primitive nodes. `normgraph.spec`, `.kind`, `.dtype`, `.shape` and `.version`
        stand in its metadata_props.

    Raises `SpecError` where kind, shape or dtype does not exist or does not fit the spec.
    """
    check_kind(spec, kind)
    layout = resolve_layout(spec, shape, dtype)
    frame = Frame(layout, kind)
    if kind in ("forward", "inference"):
        write_forward(frame)
    else:
        write_backward(frame)
    metadata = {
        "normgraph.spec": json.dumps(layout.spec.to_dict(), sort_keys=True),
        "normgraph.kind": kind,
        "normgraph.dtype": dtype,
        "normgraph.shape": json.dumps(layout.shape),
        "normgraph.version": __version__,
    }
    doc = f"{kind} of {spec.op}, x {dtype} {json.dumps(layout.shape)}"
    writer = frame.finish(debug=debug)
    return writer.model(f"{spec.op}_{kind}", doc, metadata, __version__)


def export(
    spec: NormSpec,
    *,
    shape: str | Iterable[object],
    dtype: str = "float32",
    out: str | PathLike[str],
    kinds: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Write `<kind>.onnx` into the directory `out`, made if need be, for each of `kinds`.

    Arguments as in `build`; `kinds` is all the spec has by default. Returns the files by kind.
    Nothing is written where a graph cannot be built. Raises `SpecError`.
    """
    wanted = kinds_of(spec) if kinds is None else tuple(kinds)
    if isinstance(kinds, str) or not wanted:
        raise SpecError(f"kinds: expected a list of {', '.join(kinds_of(spec))}; got {kinds!r}")
    dims = shape if isinstance(shape, str) else tuple(shape)
    models = {kind: build(spec, kind, dims, dtype) for kind in wanted}
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    files = {kind: directory / f"{kind}.onnx" for kind in models}
    for kind, model in models.items():
        onnx.save(model, files[kind])
    return files
