"""`normgraph.build`: export, compile and load in one call."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normgraph.errors import ToolMissing

if TYPE_CHECKING:
    from normgraph.runtime import Operator
    from normgraph.spec import NormSpec


def build(
    spec: NormSpec,
    *,
    shape: str | Iterable[object],
    dtype: str = "float32",
    target: str | Sequence[str] = "cpu",
    kinds: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Operator:
    """Export `spec`'s graphs, compile them and load the artifact.

    shape: of x, ints and names such as ("N", 64, "H", "W"). dtype: of x. target: one or several, as
    in `compile.build`. kinds: all the spec has by default. out: where the artifact stays; by
    default in a temporary directory that goes when the operator does.

    Raises SpecError, TargetError, CompileError as its parts do; ToolMissing where the compiler's
    packages are not installed.
    """
    try:
        from normgraph import compile as compiler
        from normgraph import graphs
    except ImportError as error:
        raise ToolMissing(
            f"building needs the compiler, and {error.name} is not installed. "
            "pip install 'normgraph[compile]'"
        ) from error
    from normgraph.runtime import load

    folder = tempfile.mkdtemp(prefix="normgraph-")
    try:
        graphs.export(spec, shape=shape, dtype=dtype, out=Path(folder, "graphs"), kinds=kinds)
        place = Path(folder, "artifact") if out is None else Path(out)
        compiler.build(Path(folder, "graphs"), target, place)
        operator = load(place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(operator, shutil.rmtree, folder, ignore_errors=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return operator
