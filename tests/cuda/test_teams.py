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
def forward(link_library: Callable[..., Any], on_device: Callable[..., Any], driver: Any) -> Any:
    """forward(rows): layer norm of so many long rows, with nothing that runs the kernels."""
    func = scheduled(ng.NormSpec("layer_norm"), "forward", ("N", ROW), "float32")
    library = link_library({"forward": func})
    every = 0b010101

    def call(rows: int) -> None:
        wide, narrow = np.zeros((rows, ROW)), np.zeros((rows, 1))
        parameter = np.zeros(ROW)
        given = [on_device(each) for each in (wide, parameter, parameter, wide, narrow, narrow)]
        driver.take()
        library.module["forward"](*given, every)

    return call


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
    driver.fail("cuLaunchCooperativeKernel", 720)
    with pytest.raises(RuntimeError, match="forward_kernel"):
        forward(32)
    assert [line.split()[0] for line in driver.take("workspace", "release")] == [
        "workspace",
        "release",
    ]


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
