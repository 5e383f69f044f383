"""From scheduled PrimFuncs to CUDA source and to the host code that launches its kernels.

TVM splits each function into kernels and the host's part, and prints the kernels as CUDA. The
host's part looks a kernel up by its name and calls it with its arguments and then its launch
parameters; `cuda_launcher.c` is what answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from normgraph.compile import half_types
from normgraph.compile.targets import Target

_PRINT_ONLY = "TVM_COMPILE_FORCE_FALLBACK"
_LAUNCH_TAGS = {
    "blockIdx.x": "x",
    "blockIdx.y": "y",
    "blockIdx.z": "z",
    "threadIdx.x": "X",
    "threadIdx.y": "Y",
    "threadIdx.z": "Z",
    "tirx.use_dyn_shared_memory": "m",
}
# Words of 64 bits by which the blocks of a launch tell each other values: a float32 and its turn.
# Volatile accesses of 64 bits are done as a whole (PTX ISA, "Memory consistency model"), so that a
# word of the right turn holds the value of that turn, and nothing else has to be ordered by it.
_POST, _AWAIT = "normgraph_post", "normgraph_await"
_WORDS = f"""
__device__ __forceinline__ void {_POST}(int64_t* words, int at, float value, int turn) {{
  *(volatile unsigned long long*)(words + at) =
      (unsigned long long)(unsigned)turn << 32 | __float_as_uint(value);
}}
__device__ __forceinline__ float {_AWAIT}(const int64_t* words, int at, int turn) {{
  unsigned long long word;
  do {{
    word = *(const volatile unsigned long long*)(words + at);
  }} while ((unsigned)(word >> 32) != (unsigned)turn);
  return __uint_as_float((unsigned)word);
}}

"""
# A variable that passes here is another one to the compiler: what followed from it before is made
# again and does not take registers in the meantime.
_ANEW, _PACKED = "normgraph_anew", "normgraph_packed"
_REGISTERS = f"""
__device__ __forceinline__ void {_ANEW}(int* index) {{
  asm volatile("" : "+r"(*index));
}}
__device__ __forceinline__ void {_PACKED}(void* halves, int words) {{
#pragma unroll
  for (int k = 0; k < words; ++k) {{
    asm volatile("" : "+r"(((unsigned*)halves)[k]));
  }}
}}

"""
_HELPERS = ((_AWAIT, _WORDS), (_ANEW, _REGISTERS))
_LETTERS = {"int64": "l", "int32": "i", "bool": "b", "float32": "f", "float64": "d"}


def _register(half: str) -> None:
    """The conversions that CPU kernels call functions for are instructions of a GPU."""

    def widened(call: Any) -> Any:
        return tirx.Cast("float32", tirx.reinterpret(half, call.args[0]))

    def narrowed(call: Any) -> Any:
        return tirx.reinterpret("uint16", tirx.Cast(half, call.args[0]))

    tirx.register_intrin_lowering(f"normgraph.widen_{half}", target="cuda", f=widened)
    tirx.register_intrin_lowering(f"normgraph.narrow_{half}", target="cuda", f=narrowed)


for _half in half_types.HALF_TYPES:
    _register(_half)


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched.

    params: a letter each, p pointer, l int64, i int32, b bool, f float32, d float64. launch: a
    letter each, x y z the grid, X Y Z the block, m bytes of dynamic shared memory; and a c at the
    end where blocks wait for one another, so that all have to be resident together.
    """

    name: str
    params: str
    launch: str


@dataclass(frozen=True)
class CudaSource:
    """The CUDA source of all kernels, as it goes to the compiler."""

    text: str
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Split:
    """Functions lowered and split: the device's module, and the host's, which launches it."""

    device: Any
    host: Any
    kernels: tuple[Kernel, ...]


def lower(functions: Mapping[str, Any], target: Target) -> Any:
    """The functions as loops over flat memory, kernels and host apart, in one module."""
    named = {
        name: func.with_attr("global_symbol", name).with_attr("tirx.is_entry_func", False)
        for name, func in functions.items()
    }
    module = tirx.transform.BindTarget(target.to_tvm())(tvm.IRModule(named))
    return tvm.ir.transform.Sequential(_lowering_passes())(module)


def _lowering_passes() -> list[Any]:
    """As for CPUs, but that half types are CUDA's own and are computed with in float32."""
    return [
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]


def split(functions: Mapping[str, Any], target: Target) -> Split:
    """Lower the functions of an artifact, and part them."""
    device: dict[Any, Any] = {}
    host: dict[Any, Any] = {}
    for name, func in lower(functions, target).functions.items():
        (device if func.attrs["target"].kind.name == "cuda" else host)[name] = func
    # StmtSimplify is not among these: it folds x - x to 0, which it is not for infinities and NaN.
    for_device = [tirx.transform.LowerWarpMemory(), tirx.transform.LowerIntrin()]
    for_host = [
        tirx.transform.BF16StorageLegalize(),  # LLVM has no bfloat16 here
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]
    return Split(
        tvm.ir.transform.Sequential(for_device)(tvm.IRModule(device)),
        tvm.ir.transform.Sequential(for_host)(tvm.IRModule(host)),
        tuple(sorted(map(_kernel, device.values()), key=lambda kernel: kernel.name)),
    )


def cuda_source(functions: Mapping[str, Any], target: Target) -> CudaSource:
    """The CUDA source of these functions, and its kernels."""
    parts = split(functions, target)
    return CudaSource(source_of(parts, target), parts.kernels)


def source_of(parts: Split, target: Target) -> str:
    """The device's part printed as CUDA, by TVM."""
    goal = tvm.target.Target({"kind": "cuda", "arch": target.archs[0]})
    with _not_compiled():
        module = tvm.get_global_func("target.build.cuda")(parts.device, goal)
        text = str(module.inspect_source())
    helpers = [helper.lstrip("\n") for name, helper in _HELPERS if name in text]
    if not helpers:
        return text
    first = text.index('extern "C" __global__')
    return "".join([text[:first], *helpers, text[first:]])


@contextlib.contextmanager
def _not_compiled() -> Iterator[None]:
    """Where TVM finds a GPU it would also compile what it prints, with options of its own."""
    before = os.environ.get(_PRINT_ONLY)
    os.environ[_PRINT_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PRINT_ONLY]
        else:
            os.environ[_PRINT_ONLY] = before


def host_module(parts: Split, target: Target) -> Any:
    """The host's part as a TVM runtime module, compiled by LLVM."""
    return tvm.get_global_func("target.build.llvm")(parts.host, target.to_tvm().host)


def _kernel(func: Any) -> Kernel:
    params = "".join(_letter(param) for param in func.params)
    launch = "".join(_LAUNCH_TAGS[str(tag)] for tag in func.attrs["tirx.kernel_launch_params"])
    if _AWAIT in func.script():
        launch += "c"
    return Kernel(str(func.attrs["global_symbol"]), params, launch)


def _letter(param: Any) -> str:
    if isinstance(param.ty, tvm.ir.PointerType):
        return "p"
    return _LETTERS[str(param.ty.dtype)]
