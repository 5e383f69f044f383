"""Slices that teams of blocks hold: what is asked of a driver, and what is assembled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm_ffi

import normgraph as ng
from normgraph.compile import cuda_codegen, cuda_compilers, cuda_report, pipeline, resolve

# Attributes of a device: CU_DEVICE_ATTRIBUTE_*.
MULTIPROCESSORS, L2, THREADS, SHARED, TOGETHER, SHARED_OF_A_BLOCK, RESERVED = (
    16, 38, 39, 81, 95, 97, 111,
)  # fmt: skip
KILO = 1024
ROW = 262144


def scheduled(spec: ng.NormSpec, kind: str, shape: tuple[int | str, ...], dtype: str) -> Any:
    model = ng.graphs.build(spec, kind, shape=shape, dtype=dtype)
    return pipeline.schedule(
        kind, model, resolve("cuda"), pipeline.Dump(None), lambda line: None
    ).func


@pytest.fixture
def become(driver: Any) -> Callable[..., None]:
    """become(multiprocessors, shared, l2): what every device is from now on."""

    def change(multiprocessors: int, shared: int, l2: int) -> None:
        driver.attribute(MULTIPROCESSORS, multiprocessors)
        driver.attribute(L2, l2 << 20)
        driver.attribute(THREADS, 2048)
        driver.attribute(SHARED, shared * KILO)
        driver.attribute(SHARED_OF_A_BLOCK, (shared - 1) * KILO)
        driver.attribute(RESERVED, KILO)

    return change


@pytest.fixture
def layer_norm(
    link_library: Callable[..., Any], on_device: Callable[..., Any], driver: Any
) -> Callable[[str], Callable[..., None]]:
    """layer_norm(kind)(rows, device=0): of long rows, captured, with nothing that runs kernels."""

    def load(kind: str) -> Callable[..., None]:
        func = scheduled(ng.NormSpec("layer_norm"), kind, ("N", ROW), "float32")
        library = link_library({kind: func})
        every = 0b010101

        def call(rows: int, device: int = 0) -> None:
            wide, narrow, parameter = np.zeros((rows, ROW)), np.zeros((rows, 1)), np.zeros(ROW)
            if kind == "forward":
                arrays = [wide, parameter, parameter, wide, narrow, narrow]
            else:
                arrays = [wide, wide, parameter, narrow, narrow, wide, parameter, parameter]
            given = [on_device(each, device) for each in arrays]
            driver.take()
            with driver.capture():
                library.module[kind](*given, every)

        return call

    return load


@pytest.fixture
def forward(layer_norm: Callable[[str], Callable[..., None]]) -> Callable[..., None]:
    """forward(rows, device=0): that of layer norm."""
    return layer_norm("forward")


def sizes(line: str) -> dict[str, int]:
    """The grid's, the block's and the shared memory's size in a line of the driver's log."""
    words = line.split()
    return {name: int(words[words.index(name) + 1]) for name in ("grid", "block", "shared")}


@pytest.mark.parametrize(
    ("multiprocessors", "shared", "rows"), [(132, 228, 32), (108, 164, 64)], ids=["H200", "A100"]
)
def test_a_grid_is_launched_together(
    multiprocessors: int,
    shared: int,
    rows: int,
    become: Callable[..., None],
    forward: Any,
    driver: Any,
) -> None:
    become(multiprocessors, shared, 50)
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), 0xC0):
        forward(rows)
    clear, team = driver.take("launch", "together")
    assert clear.startswith("launch ")
    assert team.startswith("together ")
    assert clear.split()[-1] == team.split()[-1] == "0xc0"
    size = sizes(team)
    assert size["grid"] <= 2 * multiprocessors
    # No block is without a part, nor are more than a seventh of those that have room.
    assert size["grid"] > 2 * multiprocessors * 6 // 7
    assert 2 * (size["shared"] + 4 * KILO + KILO) <= shared * KILO


def test_shared_memory_is_preferred_to_the_cache(
    become: Callable[..., None], forward: Any, driver: Any
) -> None:
    become(132, 228, 50)
    forward(32)
    asked = [line.split()[-1].split("=")[0] for line in driver.take("attribute")]
    assert asked == ["8", "9"]  # the most of dynamic shared memory, the carve-out
    forward(32)
    assert driver.take("attribute") == []


@pytest.mark.parametrize("why", ["L2 holds the rows", "never together", "no shared memory"])
def test_other_slices_are_split(
    why: str, become: Callable[..., None], forward: Any, driver: Any
) -> None:
    become(132, 3 if why == "no shared memory" else 228, 128 if why == "L2 holds the rows" else 50)
    if why == "never together":
        driver.attribute(TOGETHER, 0)
    forward(32)
    assert [line.split()[0] for line in driver.take("launch", "together")] == ["launch", "launch"]


def test_a_driver_that_refuses_is_an_error_and_leaves_no_workspace(
    become: Callable[..., None], forward: Any, driver: Any
) -> None:
    become(132, 228, 50)
    driver.fail("cuLaunchCooperativeKernel", 700)
    with pytest.raises(RuntimeError, match="forward_kernel"):
        forward(32)
    assert [line.split()[0] for line in driver.take("workspace", "release")] == [
        "workspace",
        "release",
    ]


def kernels(driver: Any, *words: str) -> list[str]:
    """The kernels that were launched."""
    return [line.split()[2] for line in driver.take(*words)]


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("how", ["a part of the device", "one block a multiprocessor"])
def test_slices_are_split_where_blocks_have_no_room_together(
    how: str,
    kind: str,
    become: Callable[..., None],
    layer_norm: Callable[[str], Callable[..., None]],
    driver: Any,
) -> None:
    become(132, 228, 50)
    call = layer_norm(kind)
    live = driver.live
    if how == "a part of the device":
        driver.room(2, multiprocessors=66)
    else:
        driver.room(1)
    call(32)
    lines = driver.take("launch", "together", "refused", "workspace", "release", "forbidden")
    words = [line.split()[0] for line in lines]
    assert words.count("workspace") == words.count("release")
    assert words.count("refused") == (how == "a part of the device")
    assert not {"together", "forbidden"} & set(words)
    clear, *split = [line.split()[2] for line in lines if line.startswith("launch")]
    assert driver.live == live
    # It is remembered, and the same kernels run as where no blocks are launched together.
    call(32)
    assert kernels(driver, "launch", "together", "refused") == split
    driver.attribute(TOGETHER, 0)
    call(32)
    assert kernels(driver, "launch") == split
    assert clear not in split


def test_a_refusal_is_of_one_device(become: Callable[..., None], forward: Any, driver: Any) -> None:
    become(132, 228, 50)
    driver.devices(90, 90)
    driver.room(1)
    forward(32, 0)
    driver.room(2)
    forward(32, 0)
    assert driver.take("together") == []
    forward(32, 1)
    assert len(driver.take("together")) == 1


def test_room_that_cannot_be_told_is_left_to_the_launch(
    become: Callable[..., None], forward: Any, driver: Any
) -> None:
    become(132, 228, 50)
    driver.fail("cuOccupancyMaxActiveBlocksPerMultiprocessor", 1)
    forward(32)
    assert len(driver.take("together")) == 1


CASES = [
    (ng.NormSpec("batch_norm"), ("N", 64, 56, 56), "float32"),
    (ng.NormSpec("instance_norm"), ("N", 64, 512, 512), "bfloat16"),
    (ng.NormSpec("group_norm", groups=32), ("N", 64, 512, 512), "float16"),
    (ng.NormSpec("layer_norm"), ("N", ROW), "float32"),
    (ng.NormSpec("rms_norm"), ("N", ROW), "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=[spec.op for spec, _, _ in CASES])
def test_kernels_of_teams_fit_twice_without_spills(
    case: tuple[ng.NormSpec, tuple[int | str, ...], str],
) -> None:
    spec, shape, dtype = case
    kinds = ("forward", "backward")
    source = cuda_codegen.cuda_source(
        {kind: scheduled(spec, kind, shape, dtype) for kind in kinds}, resolve("cuda")
    )
    together = {kernel.name for kernel in source.kernels if kernel.launch.endswith("mc")}
    assert {name.split("_kernel")[0] for name in together} == set(kinds)
    text = only(source.text, together)
    nvrtc = cuda_compilers.nvrtc()
    assert nvrtc is not None
    for arch in ("sm_80", "sm_90"):
        found = cuda_report.usage(nvrtc.compile(text, arch).log)
        assert set(found) == together
        for kernel, used in found.items():
            assert (used.spill_stores, used.spill_loads) == (0, 0), f"{kernel} for {arch}: {used}"
            assert used.registers <= 128
            assert used.shared <= 4 * KILO


def test_kernels_of_teams_access_16_bytes_and_need_no_atomics() -> None:
    func = scheduled(ng.NormSpec("layer_norm"), "backward", ("N", ROW), "bfloat16")
    source = cuda_codegen.cuda_source({"backward": func}, resolve("cuda"))
    together = sorted(kernel.name for kernel in source.kernels if kernel.launch.endswith("mc"))
    nvrtc = cuda_compilers.nvrtc()
    assert nvrtc is not None
    image = nvrtc.compile(only(source.text, {together[0]}), "compute_90")
    ptx = image.content.rstrip(b"\0").decode()
    (found,) = cuda_report.accesses(ptx).values()
    assert found.wide_loads > 0
    assert found.wide_stores > 0
    assert "ld.volatile" in ptx
    assert "atom." not in ptx


def only(text: str, kernels: set[str]) -> str:
    """The source with these kernels and no others."""
    first, *rest = text.split('extern "C" __global__')
    kept = [part for part in rest if any(f" {name}(" in part for name in kernels)]
    return 'extern "C" __global__'.join([first, *kept])
