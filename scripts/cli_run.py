"""`normgraph run`: arrays from files through one kind of an artifact, results to a file.

bfloat16, which NumPy files cannot name, is stored as its bits: uint16, in and out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from normgraph.errors import ArgumentError, ArgumentTypeError
from normgraph.scripts.console import table

Array = NDArray[Any]


class Tensor(Protocol):
    """What is asked of a kernel's input: its name, dtype and shape."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


class Source(NamedTuple):
    """One `--input`: NAME=FILE, or FILE alone with the name None."""

    name: str | None
    value: str


def run(options: argparse.Namespace) -> int:
    """Run the kernel, write what was asked for, print a line for each output."""
    from normgraph.runtime import load

    check_out(options.out)
    operator = load(options.artifact)
    signature = operator.signature(options.kind)
    arrays = read_inputs([_source(text) for text in options.input], signature.inputs)
    outputs = [tensor.name for tensor in signature.outputs]
    wanted = outputs if options.want is None else list(options.want)
    if options.out is not None and options.out.suffix == ".npy" and len(wanted) > 1:
        raise ArgumentError(
            f"{options.out}: a .npy file holds one array and {options.kind} gives "
            f"{', '.join(wanted)}. Write a .npz file, or name one output with --want."
        )
    values = operator.call(
        options.kind, *(arrays[tensor.name] for tensor in signature.inputs), want=options.want
    )
    results = dict(zip(_in_order(outputs, wanted), _as_tuple(values, len(wanted)), strict=True))
    if options.out is not None:
        write(options.out, results)
    print(table([_row(name, value) for name, value in results.items()], _HEADERS))
    return 0


def check_out(path: Path | None) -> None:
    """Refuse a file name that says neither .npz nor .npy, before any work is done."""
    if path is not None and path.suffix not in (".npz", ".npy"):
        raise ArgumentError(f"--out: expected a name that ends in .npz or .npy; got {path}")


def read_inputs(sources: Sequence[Source], wanted: Sequence[Tensor]) -> dict[str, Array]:
    """One array for each wanted input, from NAME=FILE, NAME=NUMBER and whole .npz files."""
    by_name = {tensor.name: tensor for tensor in wanted}
    takes = ", ".join(by_name)
    arrays: dict[str, Array] = {}
    for source in sources:
        for name, array in _read(source, by_name).items():
            if name not in by_name:
                raise ArgumentTypeError(f"--input: there is no input {name!r}; this takes {takes}")
            if name in arrays:
                raise ArgumentTypeError(f"--input: {name} is given twice")
            arrays[name] = _typed(array, by_name[name])
    missing = [name for name in by_name if name not in arrays]
    if missing:
        raise ArgumentTypeError(
            f"--input: {', '.join(missing)} missing; this takes {takes}. "
            f"Give each as --input NAME=FILE."
        )
    return arrays


def write(path: Path, results: Mapping[str, Array]) -> None:
    """Write the arrays to a .npz by name, or the only one to a .npy."""
    stored = {
        name: value.view(np.uint16) if value.dtype.name == "bfloat16" else value
        for name, value in results.items()
    }
    if path.suffix == ".npz":
        np.savez(path, **stored)  # type: ignore[arg-type]
    else:
        (array,) = stored.values()
        np.save(path, array)


_HEADERS = ("output", "dtype", "shape", "min", "mean", "max")


def _row(name: str, value: Array) -> tuple[str, ...]:
    shape = "x".join(map(str, value.shape)) or "scalar"
    if not value.size:
        return (name, value.dtype.name, shape, "-", "-", "-")
    wide = value.astype(np.float64)
    facts = (wide.min(), wide.mean(), wide.max())
    return (name, value.dtype.name, shape, *(f"{fact:.6g}" for fact in facts))


def _in_order(outputs: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The wanted outputs in the table's order, which is that of a call's results."""
    return [name for name in outputs if name in wanted]


def _as_tuple(values: Any, count: int) -> tuple[Array, ...]:
    return (values,) if count == 1 else tuple(values)


def _source(text: str) -> Source:
    name, separator, value = text.partition("=")
    if separator and name.isidentifier() and value:
        return Source(name, value)
    if not separator and text.endswith(".npz"):
        return Source(None, text)
    raise ArgumentTypeError(f"--input: expected NAME=FILE or a .npz file; got {text!r}")


def _read(source: Source, wanted: Mapping[str, Tensor]) -> dict[str, Array]:
    name, value = source
    tensor = wanted.get(name) if name is not None else None
    if tensor is not None and tensor.shape == () and not Path(value).exists():
        try:
            return {tensor.name: np.asarray(float(value), dtype=tensor.dtype)}
        except ValueError:
            raise ArgumentError(
                f"--input {name}: expected a number or a file; got {value!r}"
            ) from None
    held = _load(value)
    if not isinstance(held, dict):
        return {Path(value).stem if name is None else name: held}
    if name is None:
        return held
    if name not in held:
        raise ArgumentError(f"--input: {value} holds {', '.join(held)}, and no {name}")
    return {name: held[name]}


def _load(path: str) -> Array | dict[str, Array]:
    """The array of a .npy file, or those of a .npz file by name."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise ArgumentError(f"--input: there is no file {path}") from None
    except (ValueError, EOFError, OSError, BadZipFile):
        raise ArgumentError(
            f"--input: {path} is not a sound .npy or .npz file of numbers"
        ) from None


def _typed(array: Array, tensor: Tensor) -> Array:
    """bfloat16 comes as its bits; every other dtype is the loader's to check."""
    if tensor.dtype == "bfloat16" and array.dtype in (np.dtype(np.uint16), np.dtype("V2")):
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    if array.dtype == np.dtype("V2"):
        raise ArgumentTypeError(
            f"--input {tensor.name}: expected {tensor.dtype}; got two bytes a value without a "
            f"type, which is how NumPy saves bfloat16. Convert it; bfloat16 itself is stored as "
            f"its bits, uint16."
        )
    return array
