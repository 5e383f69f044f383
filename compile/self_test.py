"""Running a fresh library on its self-test vectors before it is let out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from normgraph.compile.vectors import Array, Case, Port, dtype_of
from normgraph.errors import CompileError


def run(library: Path, cases: Sequence[Case], outputs: dict[str, Sequence[Port]]) -> None:
    """Run every case on the library. Raises CompileError for the first output that is wrong."""
    module = tvm_ffi.load_module(str(library), keep_module_alive=False)
    for case in cases:
        ports = outputs[case.kind]
        made = [_empty(case.answers[p.name].shape, p.dtype) for p in ports]
        given = [_tensor(values) for values in case.inputs.values()]
        write_all = sum(1 << (2 * k) for k in range(len(ports)))
        module[case.kind](*given, *made, write_all)
        for port, tensor in zip(ports, made, strict=True):
            _compare(case, port.name, tensor.numpy())


def _compare(case: Case, name: str, got: Array) -> None:
    want = np.asarray(case.answers[name], np.float64)
    given = got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(given - want)
    error[(given == want) | (np.isnan(given) & np.isnan(want))] = 0.0
    worst = float(np.max(error, initial=0.0))
    # Any other NaN compares false with everything and must count as an error.
    if not worst <= case.tolerance[name]:
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), want.shape)
        place = tuple(int(i) for i in at)
        raise CompileError(
            f"the compiled {case.kind} gives a wrong {name}: at {place} it is {got[at]!s}, float64 "
            f"says {want[at]:.9g}, and {case.tolerance[name]:.3g} is allowed (case {case.prefix}). "
            "Nothing was written. A graph that was changed after its export fails so; if this "
            "one was not, it is a defect."
        )


def _empty(shape: tuple[int, ...], dtype: str) -> Any:
    # NaN marks what a kernel leaves unwritten.
    return _tensor(np.full(shape, np.nan, dtype_of(dtype)))


def _tensor(values: Array) -> Any:
    return tvm.runtime.tensor(np.asarray(values, order="C"))
