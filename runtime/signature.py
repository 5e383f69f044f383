"""What a kernel takes and gives: names, dtypes and shapes, and how concrete shapes are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normgraph.errors import ArgumentError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dim is an int (fixed) or a name (any extent, equal wherever used)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        dims = ", ".join(str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one kind, in the order in which they are passed and returned."""

    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __str__(self) -> str:
        taken = ", ".join(str(spec) for spec in self.inputs)
        given = ", ".join(str(spec) for spec in self.outputs)
        return f"{self.kind}({taken}) -> ({given})"

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @property
    def in_place(self) -> tuple[int, ...]:
        """For each output the index of the input it may be written over, new_x over x, or -1."""
        names = self.input_names
        return tuple(
            names.index(name[4:]) if name.startswith("new_") and name[4:] in names else -1
            for name in self.output_names
        )

    def output_shapes(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        """The outputs' shapes for these input shapes.

        Raises ArgumentError for a wrong rank, a wrong fixed dim, or one name with two extents.
        """
        dims: dict[str, tuple[int, str]] = {}
        for spec, shape in zip(self.inputs, shapes, strict=True):
            self._bind(spec, shape, dims)
        return tuple(
            tuple(dim if isinstance(dim, int) else dims[dim][0] for dim in spec.shape)
            for spec in self.outputs
        )

    def _bind(self, spec: TensorSpec, shape: Shape, dims: dict[str, tuple[int, str]]) -> None:
        if len(shape) != len(spec.shape):
            raise ArgumentError(
                f"{self.kind}: {spec.name} must have rank {len(spec.shape)} ({spec}), but it has"
                f" rank {len(shape)}: shape {shape}. Reshape it, or build an artifact of that rank."
            )
        for axis, (dim, extent) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(dim, int):
                if extent != dim:
                    raise ArgumentError(
                        f"{self.kind}: {spec.name} must have extent {dim} along axis {axis}"
                        f" ({spec}), but its shape is {shape}. Pass that shape, or build an"
                        f" artifact for the other extent."
                    )
                continue
            known, owner = dims.setdefault(dim, (extent, spec.name))
            if extent != known:
                raise ArgumentError(
                    f"{self.kind}: {spec.name} must have {dim} = {known} along axis {axis}, as"
                    f" {owner} has, but its shape is {shape} ({spec}). Pass arrays that belong"
                    f" together."
                )
