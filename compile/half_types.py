"""Conversions between float32 and the half types, of whole vectors on every target.

TVM's own casts become a function call an element where the CPU does not convert float16
(x86-64-v2), and arithmetic on bits for bfloat16 on every CPU. So the rules write two operators of
their own instead, which vectorise as any other. Each is lowered to the call of an LLVM function;
`functions` writes those for a target, and LLVM inlines them.

 - Where the CPU converts (float16: F16C, any aarch64; bfloat16: AVX512-BF16) by its instruction,
   elsewhere by arithmetic on the bits, without branches.
 - Rounded to the nearest, ties to even; to infinity beyond the largest number; a NaN stays one,
   whatever its bits.
 - The instruction of AVX512-BF16 takes numbers below 2^-126 for zero, the least that float32 and
   bfloat16 hold to full precision. Every other conversion keeps them.
"""

from __future__ import annotations

import struct
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, Op, PrimType
from tvm.target import codegen

Expr = Any  # a TVM scalar expression; TVM ships no types

HALF_TYPES = ("float16", "bfloat16")
# No rule makes longer vectors.
_MOST_LANES = 128
_WITHOUT_EFFECTS = 1  # of TVM's kinds of calls


def widen(value: Expr) -> Expr:
    """A value of a half type as float32."""
    operator = _operator("widen", str(value.ty.dtype))
    return Call(operator, [tirx.reinterpret("uint16", value)], ret_ty=PrimType("float32"))


def narrow(half: str, value: Expr) -> Expr:
    """A float32 value rounded to a half type."""
    bits = Call(_operator("narrow", half), [value], ret_ty=PrimType("uint16"))
    return tirx.reinterpret(half, bits)


def before_rounding(value: Expr) -> Expr | None:
    """The float32 value that `value` was rounded from, or None where it was not."""
    if not (isinstance(value, Call) and value.op == Op.get("tirx.reinterpret")):
        return None
    bits = value.args[0]
    rounds = isinstance(bits, Call) and bits.op in [_operator("narrow", h) for h in HALF_TYPES]
    return bits.args[0] if rounds else None


# The operators.


def _operator(way: str, half: str) -> Any:
    return Op.get(f"normgraph.{way}_{half}")


def _register(name: str) -> None:
    full = f"normgraph.{name}"
    tvm.ir.register_op_attr(full, "TVectorizable", True)
    tvm.ir.register_op_attr(full, "TCallEffectKind", _WITHOUT_EFFECTS)
    tvm.ir.register_op_attr(full, "TScriptPrinterName", full)

    def lowered(call: Any) -> Any:
        dtype = call.ty.dtype
        return tirx.call_pure_extern(str(dtype), _function(name, dtype.lanes), *call.args)

    tirx.register_intrin_lowering(full, target="llvm", f=lowered)


for _half in HALF_TYPES:
    _register(f"widen_{_half}")
    _register(f"narrow_{_half}")


# The LLVM functions.


def functions(target: Any) -> str:
    """LLVM's text of the conversions for a TVM target."""
    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    converts = {
        "float16": "f16c" in features or "neon" in features,
        "bfloat16": {"avx512bf16", "avx512vl"} <= features,
    }
    lines: list[str] = []
    lanes = 1
    while lanes <= _MOST_LANES:
        for half in HALF_TYPES:
            lines += _define(half, lanes, native=converts[half])
        lanes *= 2
    return "\n".join([*lines, ""])


def _function(name: str, lanes: int) -> str:
    return f"normgraph_{name}x{lanes}"


def _define(half: str, lanes: int, *, native: bool) -> list[str]:
    words = _Words(lanes)
    floats, halves = words.of("float"), words.of("i16")
    if native:
        stored = words.of("half" if half == "float16" else "bfloat")
        widened = [
            f"%half = bitcast {halves} %v to {stored}",
            f"%result = fpext {stored} %half to {floats}",
        ]
        narrowed = [
            f"%half = fptrunc {floats} %v to {stored}",
            f"%result = bitcast {stored} %half to {halves}",
        ]
    else:
        widened = (_widen_float16 if half == "float16" else _widen_bfloat16)(words)
        narrowed = (_narrow_float16 if half == "float16" else _narrow_bfloat16)(words)
    if half == "bfloat16":
        # An instruction of AVX512-BF16 narrows; to widen is a shift everywhere.
        widened = _widen_bfloat16(words)
    return [
        f"define {floats} @{_function(f'widen_{half}', lanes)}({halves} %v) {{",
        *widened,
        f"ret {floats} %result",
        "}",
        f"define {halves} @{_function(f'narrow_{half}', lanes)}({floats} %v) {{",
        *narrowed,
        f"ret {halves} %result",
        "}",
    ]


class _Words:
    """Writes operations on vectors of 32-bit integers, `%name = operation`."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.ints = self.of("i32")

    def of(self, element: str) -> str:
        """A vector type, or the element's own for one."""
        return element if self.lanes == 1 else f"<{self.lanes} x {element}>"

    def all(self, element: str, value: object) -> str:
        """A constant in every lane."""
        return str(value) if self.lanes == 1 else f"splat ({element} {value})"

    def with_constant(self, name: str, operation: str, operand: str, value: int) -> str:
        """%name = operation %operand, value"""
        return f"%{name} = {operation} {self.ints} %{operand}, {self.all('i32', value)}"

    def both(self, name: str, operation: str, left: str, right: str) -> str:
        """%name = operation %left, %right"""
        return f"%{name} = {operation} {self.ints} %{left}, %{right}"

    def choose(self, name: str, condition: str, yes: str, no: str) -> str:
        """%name = %condition ? %yes : %no"""
        bits = self.of("i1")
        return f"%{name} = select {bits} %{condition}, {self.ints} {yes}, {self.ints} {no}"

    def change(self, name: str, operation: str, source: str, operand: str, to: str) -> str:
        """%name = operation %operand, from one element type to another"""
        return f"%{name} = {operation} {self.of(source)} %{operand} to {self.of(to)}"


def _widen_bfloat16(words: _Words) -> list[str]:
    return [
        words.change("low", "zext", "i16", "v", "i32"),
        words.with_constant("bits", "shl", "low", 16),
        words.change("result", "bitcast", "i32", "bits", "float"),
    ]


def _narrow_bfloat16(words: _Words) -> list[str]:
    floats = words.of("float")
    return [
        words.change("bits", "bitcast", "float", "v", "i32"),
        words.with_constant("shifted", "lshr", "bits", 16),
        words.with_constant("odd", "and", "shifted", 1),
        words.with_constant("half", "add", "odd", 0x7FFF),
        words.both("sum", "add", "bits", "half"),
        words.with_constant("upper", "lshr", "sum", 16),
        # The sum carries a NaN of many mantissa bits over into a zero.
        f"%nan = fcmp uno {floats} %v, {words.all('float', 0.0)}",
        words.choose("kept", "nan", words.all("i32", 0x7FC0), "%upper"),
        words.change("result", "trunc", "i32", "kept", "i16"),
    ]


def _widen_float16(words: _Words) -> list[str]:
    """The bits moved into place and the exponent's bias changed.

    What is added or subtracted for some lanes only is zero in the others. Comparing numbers, not
    their bits, keeps LLVM from comparing 16-bit halves and widening what that gives.
    """
    floats, least = words.of("float"), 2.0**-14
    return [
        words.change("wide", "sext", "i16", "v", "i32"),
        words.with_constant("moved", "shl", "wide", 13),
        words.with_constant("size", "and", "moved", 0x0FFFE000),
        words.with_constant("normal", "add", "size", (127 - 15) << 23),
        words.change("number", "bitcast", "i32", "normal", "float"),
        # Infinity and NaN: the largest exponent stays the largest.
        f"%is_special = fcmp oge {floats} %number, {words.all('float', 2.0**16)}",
        words.choose("more", "is_special", words.all("i32", (127 - 15) << 23), words.all("i32", 0)),
        # A subnormal number: the fraction behind a leading one, which is then taken away.
        f"%is_subnormal = fcmp olt {floats} %number, {words.all('float', least)}",
        words.choose("one", "is_subnormal", words.all("i32", 1 << 23), words.all("i32", 0)),
        words.both("lifted", "add", "normal", "one"),
        words.change("sum", "bitcast", "i32", "lifted", "float"),
        f"%leading = select {words.of('i1')} %is_subnormal, "
        f"{floats} {words.all('float', least)}, {floats} {words.all('float', 0.0)}",
        f"%exact = fsub {floats} %sum, %leading",
        words.change("finite", "bitcast", "float", "exact", "i32"),
        words.both("unsigned", "add", "finite", "more"),
        words.with_constant("sign", "and", "moved", -(1 << 31)),
        words.both("bits", "or", "unsigned", "sign"),
        words.change("result", "bitcast", "i32", "bits", "float"),
    ]


def _narrow_float16(words: _Words) -> list[str]:
    """The number is added to a power of two above it, whose last bit is the half's last one.

    The formula is that of the FP16 library (Marat Dukhan, fp16_ieee_from_fp32_value).
    """
    floats = words.of("float")
    return [
        words.change("bits", "bitcast", "float", "v", "i32"),
        words.with_constant("size", "and", "bits", 0x7FFFFFFF),
        words.change("positive", "bitcast", "i32", "size", "float"),
        # What is too large for a half becomes infinity, and what is not is scaled by 4.
        f"%scaled = fmul {floats} %positive, {words.all('float', _hexadecimal(2.0**112))}",
        f"%number = fmul {floats} %scaled, {words.all('float', _hexadecimal(2.0**-110))}",
        words.with_constant("doubled", "shl", "bits", 1),
        words.with_constant("exponent", "and", "doubled", 0xFF000000 - (1 << 32)),
        words.with_constant("is_subnormal", "icmp ult", "exponent", 0x71000000),
        words.choose("above", "is_subnormal", words.all("i32", 0x71000000), "%exponent"),
        words.with_constant("place", "lshr", "above", 1),
        words.with_constant("power_bits", "add", "place", 15 << 23),
        words.change("power", "bitcast", "i32", "power_bits", "float"),
        f"%sum = fadd {floats} %power, %number",
        words.change("sum_bits", "bitcast", "float", "sum", "i32"),
        words.with_constant("moved", "lshr", "sum_bits", 13),
        words.with_constant("half_exponent", "and", "moved", 0x7C00),
        # With the bit that carries into the exponent.
        words.with_constant("fraction", "and", "sum_bits", 0x0FFF),
        words.both("finite", "add", "half_exponent", "fraction"),
        f"%nan = fcmp uno {floats} %v, {words.all('float', 0.0)}",
        words.choose("unsigned", "nan", words.all("i32", 0x7E00), "%finite"),
        words.with_constant("lowered", "lshr", "bits", 16),
        words.with_constant("sign", "and", "lowered", 0x8000),
        words.both("whole", "or", "unsigned", "sign"),
        words.change("result", "trunc", "i32", "whole", "i16"),
    ]


def _hexadecimal(number: float) -> str:
    """A float as LLVM writes those without a short decimal form."""
    return f"0x{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}"
