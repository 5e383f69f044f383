"""The CUDA rule's source: what it takes, what a known shape leaves of it, how it accesses memory.

That the kernels compute what they should is shown where they are run, in tests/simt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import normgraph as ng
from normgraph.compile import cuda_codegen, cuda_rules, importing, resolve

Shape = tuple[int | str, ...]
Sources = Callable[..., str]
_SHARED = re.compile(r"__shared__ alignas\(\d+\) (\w+) \w+\[(\d+)\];")
_SIZES = {"float": 4, "double": 8}
_PLANES: Shape = ("N", 6, "H", "W")
_CASES = [
    *(("batch_norm", k, _PLANES) for k in ("forward", "inference", "backward", "backward_frozen")),
    ("batch_norm", "backward", ("N", 20)),
    ("batch_norm", "forward", ("N", 20)),
    *(("instance_norm", k, _PLANES) for k in ("forward", "backward", "backward_from_output")),
    *(("group_norm", k, _PLANES) for k in ("forward", "backward", "backward_from_output")),
    *(("layer_norm", k, ("N", 40)) for k in ("forward", "backward", "backward_from_output")),
    *(("rms_norm", k, ("N", 40)) for k in ("forward", "backward", "backward_from_output")),
]


def scheduled(op: str, kind: str, shape: Shape, dtype: str) -> Any:
    options = {"groups": 2} if op == "group_norm" else {}
    spec = ng.NormSpec(op, **options)  # type: ignore[arg-type]
    model = ng.graphs.build(spec, kind, shape=shape, dtype=dtype)
    func = importing.fuse(importing.legalize(importing.to_relax(model)))
    func = importing.with_every_input(func, model)
    names = [output.name for output in model.graph.output]
    return cuda_rules.apply(func, names, resolve("cuda"))


@pytest.fixture(scope="session")
def source() -> Sources:
    """source(op, kind, shape, dtype): the kernels of one graph as CUDA, without TVM's prelude."""
    made: dict[tuple[Any, ...], str] = {}

    def get(op: str, kind: str, shape: Shape, dtype: str = "float32") -> str:
        key = (op, kind, shape, dtype)
        if key not in made:
            func = scheduled(*key)
            assert func is not None, f"the rule does not take {key}"
            text = cuda_codegen.cuda_source({kind: func}, resolve("cuda")).text
            made[key] = text[text.index('extern "C" __global__') :]
        return made[key]

    return get


def kernels(text: str) -> dict[str, str]:
    """The body of each kernel by its name."""
    parts = re.split(r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?', text)
    return {part[: part.index("(")]: part for part in parts[1:] if "{" in part.split("\n")[0]}


@pytest.mark.parametrize(("op", "kind", "shape"), _CASES)
def test_takes_every_graph(op: str, kind: str, shape: Shape, source: Sources) -> None:
    text = source(op, kind, shape)
    assert kernels(text)
    # Sums have one order: no atomics, and nothing is left to approximate units.
    for banned in ("atomic", "rsqrt", "__fdividef", "__expf"):
        assert banned not in text


@pytest.mark.parametrize(("op", "kind", "shape"), _CASES)
def test_shared_memory_fits(op: str, kind: str, shape: Shape, source: Sources) -> None:
    for name, body in kernels(source(op, kind, shape)).items():
        used = sum(_SIZES[kind] * int(count) for kind, count in _SHARED.findall(body))
        assert used <= 48 * 1024, name


@pytest.mark.parametrize(("dtype", "vector"), [("float32", "float4"), ("bfloat16", "uint4")])
def test_accesses_are_of_sixteen_bytes(dtype: str, vector: str, source: Sources) -> None:
    text = source("layer_norm", "forward", ("N", 4096), dtype)
    first = next(iter(kernels(text).values()))
    assert f"*({vector}*)(x_held_ptr" in first
    assert re.search(rf"\*\({vector}\*\)\(y_flat_ptr", first)
    assert not re.search(r"= x_flat_ptr\[", first)


def test_a_known_shape_leaves_one_kernel_and_the_one_for_any_pointer(source: Sources) -> None:
    assert len(kernels(source("layer_norm", "forward", ("N", 4096)))) == 2
    # The parts of the parameters' gradients are added up by a kernel each.
    assert len(kernels(source("layer_norm", "backward", ("N", 4096)))) == 4


def test_an_odd_length_is_held_by_single_elements(source: Sources) -> None:
    (body,) = kernels(source("layer_norm", "forward", ("N", 37))).values()
    assert "float4" not in body
    assert "__shfl_xor_sync" in body
    assert "__syncthreads" not in body


def test_open_lengths_have_kernels_for_every_size(source: Sources) -> None:
    text = source("instance_norm", "forward", _PLANES)
    bounds = [int(n) for n in re.findall(r"__launch_bounds__\((\d+)[^)]*\) \w+\([^;{]*\) {", text)]
    # Five teams of vectors, three of single elements; for longer slices, of either, two kernels
    # where a team of blocks holds them and two where none does.
    assert bounds == [256, 128, 256, 512, 1024, 256, 256, 1024, *[256] * 8]


def test_sums_across_slices_hold_the_blocks_they_count_on(source: Sources) -> None:
    text = source("layer_norm", "backward", ("N", 4096), "bfloat16")
    threads, blocks = map(int, re.findall(r"__launch_bounds__\((\d+), (\d+)\)", text)[0])
    assert blocks >= 1
    assert threads * blocks >= 512


def test_a_slice_longer_than_a_block_holds_is_split(source: Sources) -> None:
    names = kernels(source("instance_norm", "forward", (2, 4, 512, 512)))
    # For either width: held by a team, behind the kernel that clears its words; or a traversal
    # for the sums and one for y.
    assert len(names) == 8
    assert sum("mean_flat_ptr[" in body for body in names.values()) == 4
    assert sum("normgraph_await(" in body for body in names.values()) == 2


def test_the_host_reads_no_tensor() -> None:
    """A momentum given as an input lies in device memory: only kernels load it."""
    spec = ng.NormSpec("batch_norm", momentum=None)
    model = ng.graphs.build(spec, "forward", shape=_PLANES, dtype="float32")
    func = importing.fuse(importing.legalize(importing.to_relax(model)))
    func = importing.with_every_input(func, model)
    made = cuda_rules.apply(func, [o.name for o in model.graph.output], resolve("cuda"))
    parts = cuda_codegen.split({"forward": made}, resolve("cuda"))
    assert "momentum_ptr[0]" in cuda_codegen.source_of(parts, resolve("cuda"))
    assert "momentum[" not in parts.host.script()
