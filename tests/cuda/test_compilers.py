"""The compilers that are here: code for each architecture, IEEE arithmetic, what they report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import normgraph as ng
from normgraph.compile import cuda_codegen, cuda_compilers, cuda_report, resolve
from normgraph.errors import CompileError

NVCC = cuda_compilers.nvcc_path()
COMPILERS = ["nvrtc", *(["nvcc"] if NVCC else [])]

VECTORS = """
extern "C" __global__ void vectors(const float4* x, float4* y, const float* a, float* b) {
  y[threadIdx.x] = x[threadIdx.x];
  b[threadIdx.x] = a[threadIdx.x] / (a[threadIdx.x + 1] + 3.0f) + sqrtf(a[threadIdx.x + 2]);
}
extern "C" __global__ void fused(const double* x, double* y) {
  y[threadIdx.x] = x[threadIdx.x] * x[threadIdx.x + 1] + x[threadIdx.x + 2];
}
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) many(const volatile float* x, float* y) {
  float held[128];
  #pragma unroll
  for (int i = 0; i < 128; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 128; ++i) y[i * 1024 + threadIdx.x] = held[i] * held[127 - i];
}
"""


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> Any:
    found = cuda_compilers.nvcc(NVCC) if request.param == "nvcc" else cuda_compilers.nvrtc()
    assert found is not None
    return found


def test_machine_code_and_ptx(compiler: Any) -> None:
    assert compiler.version >= (13, 0)
    for arch in resolve("cuda").images:
        image = compiler.compile(VECTORS, arch)
        if arch.startswith("sm_"):
            assert image.content.startswith(b"\x7fELF")
            assert set(cuda_report.usage(image.log)) == {"vectors", "fused"}
        else:
            assert f".target {arch.replace('compute', 'sm')}".encode() in image.content


def test_arithmetic_is_ieee(compiler: Any) -> None:
    ptx = compiler.compile(VECTORS, "compute_80").content.decode()
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f32" in ptx
    assert "fma.rn.f64" in ptx
    assert not re.search(r"\.ftz|\.approx|div\.full", ptx)


def test_a_mistake_is_told_with_the_compilers_words(compiler: Any) -> None:
    with pytest.raises(CompileError, match="nothing_like_it"):
        compiler.compile("__global__ void k() { nothing_like_it(); }", "sm_80")


def test_spills_are_seen(compiler: Any) -> None:
    image = compiler.compile(SPILLING, "sm_80")
    used = cuda_report.usage(image.log)["many"]
    assert min(used.stack, used.spill_stores, used.spill_loads) > 0
    assert used.registers == 64


def test_wide_accesses_are_counted(compiler: Any) -> None:
    ptx = compiler.compile(VECTORS, "compute_80").content.rstrip(b"\0").decode()
    found = cuda_report.accesses(ptx)["vectors"]
    assert (found.loads, found.stores) == (4, 2)
    assert (found.wide_loads, found.wide_stores) == (1, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_plain_rule_compiles(dtype: str, tmp_path: Path) -> None:
    """Every half type's source, as TVM prints it, with NVRTC's headers alone."""
    from normgraph.compile import cuda_plain_rule, importing

    target = resolve("cuda")
    model = ng.graphs.build(ng.NormSpec("layer_norm"), "backward", shape=("N", 6), dtype=dtype)
    func = importing.fuse(importing.legalize(importing.to_relax(model)))
    func = importing.with_every_input(func, model)
    names = [output.name for output in model.graph.output]
    plain = cuda_plain_rule.apply(func, names, target)
    source = cuda_codegen.cuda_source({"backward": plain}, target)
    assert [kernel.name for kernel in source.kernels] == ["backward_kernel"]
    nvrtc = cuda_compilers.nvrtc()
    assert nvrtc is not None
    assert nvrtc.compile(source.text, "sm_90").content.startswith(b"\x7fELF")
