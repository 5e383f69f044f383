"""The generated kernels assemble for sm_80 and sm_90 without spills, and access 16 bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.compile import cuda_codegen, cuda_compilers, cuda_report, pipeline, resolve

Images = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def images(make_once: Callable[..., Path], name_of_build: Callable[..., str]) -> Images:
    """images(spec, shape, dtype, target="cuda", kinds=both ways): by NVRTC; made once."""

    def make(
        spec: ng.NormSpec,
        shape: tuple[int | str, ...],
        dtype: str,
        name: str = "cuda",
        kinds: tuple[str, ...] = ("forward", "backward"),
    ) -> dict[str, Any]:
        def compile_into(folder: Path) -> None:
            target, dump = resolve(name), pipeline.Dump(None)
            functions = {}
            for kind in kinds:
                model = ng.graphs.build(spec, kind, shape=shape, dtype=dtype)
                scheduled = pipeline.schedule(kind, model, target, dump, lambda line: None)
                assert scheduled.rule != "plain"
                functions[kind] = scheduled.func
            text = cuda_codegen.cuda_source(functions, target).text
            nvrtc = cuda_compilers.nvrtc()
            assert nvrtc is not None
            made = {arch: nvrtc.compile(text, arch) for arch in target.images}
            (folder / "images").write_bytes(pickle.dumps(made))

        build = name_of_build(spec, shape, dtype, kinds)
        folder = make_once(f"images-{name}-{build}", compile_into)
        found: dict[str, Any] = pickle.loads((folder / "images").read_bytes())
        return found

    return make


IMAGE = ("N", 64, "H", "W")
LARGE = ("N", 32, 512, 512)
# Kinds whose kernels come near to the registers they may have, and went beyond when places and
# float32 copies were kept from one pass to the next.
CROWDED = [
    (ng.NormSpec("batch_norm"), IMAGE, "bfloat16", "backward"),
    (ng.NormSpec("batch_norm"), IMAGE, "bfloat16", "backward_frozen"),
    (ng.NormSpec("batch_norm"), IMAGE, "bfloat16", "backward_from_output"),
    (ng.NormSpec("batch_norm"), IMAGE, "bfloat16", "forward"),
    (ng.NormSpec("group_norm", groups=32), IMAGE, "float16", "backward_from_output"),
    (ng.NormSpec("group_norm", groups=32), IMAGE, "bfloat16", "backward_from_output"),
    (ng.NormSpec("batch_norm"), LARGE, "float32", "backward"),
    (ng.NormSpec("batch_norm"), LARGE, "bfloat16", "backward_from_output"),
    (ng.NormSpec("group_norm", groups=32), ("N", 64, 512, 512), "float16", "backward"),
    (ng.NormSpec("layer_norm"), ("N", 16384), "bfloat16", "backward_from_output"),
    (ng.NormSpec("layer_norm", weight=False, bias=False), ("N", "D"), "bfloat16", "backward"),
]
CASES = [
    (ng.NormSpec("batch_norm"), ("N", 64, "H", "W"), "float32"),
    (ng.NormSpec("instance_norm"), ("N", 64, "H", "W"), "float16"),
    (ng.NormSpec("group_norm", groups=32), ("N", 64, "H", "W"), "bfloat16"),
    (ng.NormSpec("layer_norm"), ("N", 768), "float32"),
    (ng.NormSpec("rms_norm"), ("N", 768), "bfloat16"),
]
NAMES = [f"{spec.op}-{dtype}" for spec, _, dtype in CASES]


@pytest.mark.parametrize(("spec", "shape", "dtype"), CASES, ids=NAMES)
def test_kernels_assemble_without_spills(
    images: Images, spec: ng.NormSpec, shape: tuple[int | str, ...], dtype: str
) -> None:
    made = images(spec, shape, dtype)
    for arch in ("sm_80", "sm_90"):
        found = cuda_report.usage(made[arch].log)
        assert {name.split("_kernel")[0] for name in found} == {"forward", "backward"}
        for kernel, used in found.items():
            assert (used.spill_stores, used.spill_loads) == (0, 0), f"{kernel} for {arch}: {used}"


@pytest.mark.parametrize("target", ["cuda", "sm_100"])
@pytest.mark.parametrize(
    "case", CROWDED, ids=lambda case: "-".join(map(str, (case[0].op, *case[1:])))
)
def test_crowded_kernels_do_not_spill(
    images: Images, case: tuple[ng.NormSpec, tuple[int | str, ...], str, str], target: str
) -> None:
    *of, kind = case
    logs = {arch: image.log for arch, image in images(*of, target, (kind,)).items()}
    found = cuda_report.assembled(logs)
    assert set(found) == ({"sm_80", "sm_90"} if target == "cuda" else {"sm_100"})
    for arch, each in found.items():
        assert each["count"] > 5
        assert each["spilling"] == [], arch


@pytest.mark.parametrize(("spec", "shape", "dtype"), CASES, ids=NAMES)
def test_whole_arrays_are_accessed_by_16_bytes(
    images: Images, spec: ng.NormSpec, shape: tuple[int | str, ...], dtype: str
) -> None:
    ptx = images(spec, shape, dtype)["compute_90"].content.rstrip(b"\0").decode()
    found = cuda_report.accesses(ptx)
    for kind in ("forward", "backward"):
        kernels = [each for name, each in found.items() if name.startswith(f"{kind}_kernel")]
        assert max(each.wide_loads for each in kernels) > 0, kind
        assert max(each.wide_stores for each in kernels) > 0, kind


def test_the_next_architecture_assembles_too(images: Images) -> None:
    made = images(ng.NormSpec("layer_norm"), ("N", 768), "bfloat16", "sm_100")
    assert set(made) == {"sm_100", "compute_100"}
    assert made["sm_100"].content.startswith(b"\x7fELF")
    found = cuda_report.usage(made["sm_100"].log)
    assert {name.split("_kernel")[0] for name in found} == {"forward", "backward"}
    assert all(used.spill_stores == used.spill_loads == 0 for used in found.values())
    assert b".target sm_100" in made["compute_100"].content
