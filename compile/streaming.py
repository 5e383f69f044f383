"""Stores that go past the caches, for arrays larger than those, and what is asked for ahead.

An ordinary store first reads the line it writes to. What does not stay in cache anyway is written
without: two arrays move in a forward instead of three. TVM has no such store, so a few LLVM
functions are brought along and inlined.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir.expr import StringImm

from normgraph.compile import cache_size
from normgraph.compile.targets import Target
from normgraph.compile.tir import Expr, Stmt

_LLVM_TYPES = {"float32": "float", "float64": "double", "float16": "half", "bfloat16": "i16"}
_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_LINE = 64


class Streaming:
    """The stores and the fence of a target."""

    def __init__(self, target: Target) -> None:
        self.used: set[tuple[str, int]] = set()
        self.aligned: set[str] = set()
        self.prefetches = False
        self.hides = False
        self.wide = target.vector_bytes == 64
        self.x86 = target.triple.startswith("x86_64")
        usual = cache_size.USUAL
        self.cache_bytes = cache_size.last_level_cache() if target.name == "cpu" else usual

    def line(self, dtype: str) -> int:
        """The elements of a cache line."""
        return _LINE // _BYTES[dtype]

    def unaligned(self, element: Expr, dtype: str) -> Expr:
        """How many elements from this one on lie in front of the first whole cache line."""
        self.aligned.add(dtype)
        return tirx.call_extern("int64", f"normgraph_unaligned_{dtype}", tirx.address_of(element))

    def store(self, element: Expr, vector: Expr, dtype: str, lanes: int) -> Stmt:
        """Store a vector of whole lines at the address of `element`, where a line begins."""
        self.used.add((dtype, lanes))
        name = f"normgraph_stream_{dtype}x{lanes}"
        call = tirx.call_extern("int32", name, tirx.address_of(element), vector)
        return tirx.Evaluate(call)

    def prefetch(self, element: Expr) -> Stmt:
        """Bring the line of `element` to the second level of the caches, wherever it lies.

        There need not be such an element: what lies behind the array is not touched.
        """
        self.prefetches = True
        call = tirx.call_extern("int32", "normgraph_prefetch", tirx.address_of(element))
        return tirx.Evaluate(call)

    def opaque(self, value: Expr) -> Expr:
        """`value`, an int64, as the result of a function that LLVM sees through and TVM does not.

        TVM's passes put what a variable stands for in its place wherever they simplify. Where that
        has comparisons in it and is part of every address, compiling takes ten times as long.
        """
        self.hides = True
        return tirx.call_extern("int64", "normgraph_opaque", value)

    def fence(self) -> Stmt:
        """Make this thread's streamed stores visible before what it stores next.

        The threads of the pool do so at the end of their tasks (thread_pool.c).
        """
        return tirx.Evaluate(tirx.call_extern("int32", "normgraph_fence"))

    def wrap(self, body: Stmt) -> Stmt:
        """`body` with the functions at hand."""
        return tirx.AttrStmt(0, "pragma_import_llvm", StringImm(self._functions()), body)

    def _functions(self) -> str:
        lines = [line for each in sorted(self.aligned) for line in _count_function(each)]
        lines += [line for each in sorted(self.used) for line in _store_function(*each, self.wide)]
        lines += _PREFETCH if self.prefetches else []
        lines += _OPAQUE if self.hides else []
        # x86 orders such stores by sfence only; elsewhere the end of the task does.
        fence = ["  call void @llvm.x86.sse.sfence()"] if self.x86 else []
        lines += ["define i32 @normgraph_fence() {", *fence, "  ret i32 0", "}"]
        if self.x86:
            lines.append("declare void @llvm.x86.sse.sfence()")
        return "\n".join([*lines, "!0 = !{i32 1}", ""])


_PREFETCH = [
    "define i32 @normgraph_prefetch(ptr %p) {",
    "  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)",
    "  ret i32 0",
    "}",
    "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
]
_OPAQUE = ["define i64 @normgraph_opaque(i64 %value) {", "  ret i64 %value", "}"]


def _count_function(dtype: str) -> list[str]:
    return [
        f"define i64 @normgraph_unaligned_{dtype}(ptr %p) {{",
        "  %address = ptrtoint ptr %p to i64",
        "  %behind = sub i64 0, %address",
        f"  %bytes = and i64 %behind, {_LINE - 1}",
        f"  %count = udiv i64 %bytes, {_BYTES[dtype]}",
        "  ret i64 %count",
        "}",
    ]


def _store_function(dtype: str, lanes: int, wide: bool) -> list[str]:
    given, words = f"<{lanes} x {_LLVM_TYPES[dtype]}>", f"<{_LINE // 4} x i32>"
    lines = [f"define i32 @normgraph_stream_{dtype}x{lanes}(ptr %p, {given} %v) {{"]
    stored = f"{given} %v"
    if wide and dtype == "float16" and lanes * _BYTES[dtype] == _LINE:
        # For AVX-512 LLVM has no such store of halves and takes the usual one, and it looks through
        # a cast. Not through assembly, be it empty.
        lines += [
            f"  %words = bitcast {given} %v to {words}",
            f'  %same = call {words} asm "", "=v,0"({words} %words)',
        ]
        stored = f"{words} %same"
    return [
        *lines,
        f"  store {stored}, ptr %p, align {_LINE}, !nontemporal !0",
        "  ret i32 0",
        "}",
    ]
