"""Sizes beyond what kernels count in 32 bits: refused on the host, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm_ffi

import normgraph as ng
from normgraph import cuda_memory, dlpack_types
from normgraph.compile import cuda_kernel, pipeline, resolve

REACH, BILLIONS = cuda_kernel.REACH, 2**31
BATCH, INSTANCE = ng.NormSpec("batch_norm"), ng.NormSpec("instance_norm")


@pytest.fixture
def call(link_library: Callable[..., Any], driver: Any) -> Callable[..., list[str]]:
    """call(spec, kind, shape, size, at=0): what is launched for float16 arrays that have no memory.

    at: bytes by which x lies off its alignment.
    """

    def made(port: Any, sizes: dict[str, int], at: int) -> Any:
        dims = [d.dim_value or sizes[d.dim_param] for d in port.type.tensor_type.shape.dim]
        bits = {1: 32, 10: 16}[port.type.tensor_type.elem_type]
        address = 1 << 40
        if port.name == "x":
            address += at
        memory = cuda_memory.Memory(dims, dlpack_types.FLOAT, bits, 0, address)
        return tvm_ffi.from_dlpack(memory)

    def run(
        spec: ng.NormSpec,
        kind: str,
        shape: tuple[int | str, ...],
        size: tuple[int, ...],
        at: int = 0,
    ) -> list[str]:
        model = ng.graphs.build(spec, kind, shape=shape, dtype="float16")
        func = pipeline.schedule(
            kind, model, resolve("cuda"), pipeline.Dump(None), lambda line: None
        ).func
        library = link_library({kind: func})
        sizes = {d: n for d, n in zip(shape, size, strict=True) if isinstance(d, str)}
        ports = [*model.graph.input, *model.graph.output]
        tensors = [made(port, sizes, at) for port in ports]
        every = sum(1 << 2 * k for k in range(len(model.graph.output)))
        driver.take()
        library.module[kind](*tensors, every)
        lines: list[str] = driver.take("launch")
        return lines

    return run


@pytest.mark.parametrize(
    ("spec", "kind", "size", "what"),
    [
        (BATCH, "forward", (BILLIONS, 4), "rows in a slice"),
        (BATCH, "backward", (REACH + 1, 4), "rows in a slice"),
        (BATCH, "inference", (1, 8 * REACH + 8), "vectors of 8 elements, 1 where unaligned, in a"),
        (BATCH, "inference", (1, REACH + 1), "elements in a row"),
        (BATCH, "forward", (BILLIONS, 2, 1), "rows in a slice"),
        (BATCH, "inference", (1, 2, 8 * REACH + 8), "vectors of 8 elements, 1 where unaligned"),
        (INSTANCE, "backward", (BILLIONS, 2, 1), "slices in a sum"),
    ],
)
def test_what_indices_do_not_reach_is_refused(
    spec: ng.NormSpec,
    kind: str,
    size: tuple[int, ...],
    what: str,
    call: Callable[..., list[str]],
    driver: Any,
) -> None:
    with pytest.raises(RuntimeError, match=f"expected at most {REACH} {what}.*smaller tensor"):
        call(spec, kind, ("N", size[1], "L")[: len(size)], size)
    assert driver.take("launch", "workspace") == []


def test_so_are_sizes_that_are_known(call: Callable[..., list[str]], driver: Any) -> None:
    shape = (1, 2, 2**35)
    with pytest.raises(RuntimeError, match="vectors of 8 elements, 1 where unaligned, in a row"):
        call(BATCH, "inference", shape, shape)
    assert driver.take("launch", "workspace") == []


def test_unaligned_rows_end_sooner(call: Callable[..., list[str]], driver: Any) -> None:
    shape, size = ("N", 2, "L"), (1, 2, 8 * REACH)
    assert len(call(BATCH, "inference", shape, size)) == 1
    with pytest.raises(RuntimeError, match="vectors of 8 elements, 1 where unaligned"):
        call(BATCH, "inference", shape, size, at=2)


def test_columns_as_long_as_indices_reach(call: Callable[..., list[str]]) -> None:
    lines = call(BATCH, "forward", ("N", 8), (REACH, 8))
    grids = [int(line.split()[line.split().index("grid") + 1]) for line in lines]
    rows = -(-REACH // 1056)
    assert grids == [-(-REACH // rows), 1, -(-REACH // rows)]


def test_a_grid_of_too_many_blocks_is_refused(call: Callable[..., list[str]]) -> None:
    """2^37 blocks of 64 slices each: 0 in 32 bits."""
    with pytest.raises(RuntimeError, match=f"a launch of {2**37} along x is beyond"):
        call(ng.NormSpec("layer_norm"), "forward", ("N", 3), (2**43, 3))
