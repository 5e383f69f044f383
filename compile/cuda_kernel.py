"""Short constructors for the statements of CUDA kernels: thread nests, registers, shuffles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Range, TensorLoad
from tvm.ir.expr import StringImm
from tvm.ir.prim.expr import IntImm
from tvm.tirx.op import tvm_storage_sync

from normgraph.compile.addressing import evaluate
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.tensor_program import Apply, Cast, Node
from normgraph.compile.tir import Expr, Stmt, bind, constant, i64, seq, when, zero

WARP = 32
_RESIDENT = "tirx.launch_bounds_min_blocks_per_sm"
_ALL_LANES = 0xFFFFFFFF
# Registers of a multiprocessor.
REGISTERS = 65536
# The largest vector one memory instruction moves.
VECTOR_BYTES = 16
# How far indices of 32 bits go, with more than a tile or a block's threads behind it.
REACH = (1 << 31) - (1 << 16)


def i32(value: int) -> Expr:
    """An int32 constant: indices inside of a kernel that cannot overflow."""
    return IntImm("int32", value)


def as_i32(value: Expr) -> Expr:
    """A size as int32; where it is none, the host refuses the call (`in_reach`)."""
    known = constant(value)
    return i32(known) if known is not None and known <= REACH else tirx.Cast("int32", value)


def as_i64(value: Expr) -> Expr:
    """An index as int64, for offsets into tensors."""
    known = constant(value)
    if known is not None:
        return i64(known)
    return value if str(value.ty.dtype) == "int64" else tirx.Cast("int64", value)


def kernel(
    blocks: Expr, threads: int, body: Callable[[Expr, Expr], Stmt], resident: int = 1
) -> Stmt:
    """A launch of `blocks` (int64) blocks of `threads`; `body(block, thread)` in int32.

    resident: blocks that a multiprocessor has to have the registers for. Where nothing is said, the
    assembler at times spills a few to make room for one block more.
    """
    # All 64 bits of the number reach the launcher, which refuses what no grid has.
    block, thread = tirx.Var("block", "int64"), tirx.Var("thread", "int32")
    work = body(tirx.Cast("int32", block), thread)
    work = tirx.AttrStmt(0, _RESIDENT, i32(resident), work)
    inner = _bound("threadIdx.x", thread, i32(threads), work)
    return _bound("blockIdx.x", block, blocks, inner)


def _bound(tag: str, var: Any, extent: Expr, body: Stmt) -> Stmt:
    first = IntImm(str(var.ty.dtype), 0)
    along = tirx.IterVar(Range(first, extent), var, tirx.IterVar.ThreadIndex, tag)
    return tirx.AttrStmt(along, "thread_extent", extent, body)


def in_reach(size: Expr, what: str) -> list[Stmt]:
    """A check on the host that int32 indices reach `size` (int64) things; none where they do.

    It raises a RuntimeError. what: the things, for its message.
    """
    known = constant(size)
    if known is not None and known <= REACH:
        return []
    # Reinterpreted as in `on_host`: a bound of the size would change the types of indices.
    fits = tirx.LE(tirx.reinterpret("int64", size), i64(REACH))
    text = f"expected at most {REACH} {what}, got more; give a smaller tensor"
    return [tirx.AssertStmt(fits, StringImm("RuntimeError"), [StringImm(text)])]


def unrolled(count: int, body: Callable[[Expr], Stmt], name: str) -> Stmt:
    """`body` for 0 .. count - 1, unrolled by the CUDA compiler, so that arrays are registers."""
    if count == 1:
        return body(i32(0))
    var = tirx.Var(name, "int32")
    note = {"pragma_unroll": i32(count)}
    return tirx.For(var, i32(0), i32(count), tirx.ForKind.SERIAL, body(var), annotations=note)


def counted(count: Expr, body: Callable[[Expr], Stmt], name: str) -> Stmt:
    """`body` for the int32 indices below `count`."""
    if constant(count) == 1:
        return body(i32(0))
    var = tirx.Var(name, "int32")
    return tirx.For(var, i32(0), count, tirx.ForKind.SERIAL, body(var))


def move(target: Any, to: Expr, source: Any, at: Expr, width: int) -> Stmt:
    """Copy `width` elements as one vector; both indices are provable multiples of it."""
    if width == 1:
        return tirx.BufferStore(target, tirx.BufferLoad(source, [at]), [to])
    lane = tirx.Var("lane", "int64")
    copied = tirx.BufferLoad(source, [as_i64(at) + lane])
    body = tirx.BufferStore(target, copied, [as_i64(to) + lane])
    return tirx.For(lane, i64(0), i64(width), tirx.ForKind.VECTORIZED, body)


def registers(size: int, dtype: str, name: str) -> Any:
    """A buffer of one thread."""
    return tirx.decl_buffer((size,), dtype, name, scope="local", data_alignment=VECTOR_BYTES)


def shared(size: int, dtype: str, name: str) -> Any:
    """A buffer of one block."""
    return tirx.decl_buffer((size,), dtype, name, scope="shared", data_alignment=VECTOR_BYTES)


def shared_of_launch(shape: tuple[Expr, ...], dtype: str, name: str) -> Any:
    """A buffer of one block whose size the launch gives; a kernel has one allocation of these."""
    return tirx.decl_buffer(shape, dtype, name, scope="shared.dyn", data_alignment=VECTOR_BYTES)


def get(buffer: Any, at: Expr | int = 0) -> Expr:
    """An element of a buffer."""
    return tirx.BufferLoad(buffer, [i32(at) if isinstance(at, int) else at])


def put(buffer: Any, value: Expr, at: Expr | int = 0) -> Stmt:
    """Set an element of a buffer."""
    return tirx.BufferStore(buffer, value, [i32(at) if isinstance(at, int) else at])


def cleared(buffer: Any) -> Stmt:
    """Declare a buffer of one thread and set it to zero."""
    none = zero(str(buffer.dtype))
    fill = unrolled(int(buffer.shape[0]), lambda k: put(buffer, none, k), "k")
    return seq([tirx.AllocBuffer(buffer), fill])


def grow(buffer: Any, value: Expr, at: Expr | int = 0) -> Stmt:
    """Add to an element of a buffer."""
    return put(buffer, get(buffer, at) + value, at)


def sync() -> Stmt:
    """Wait for all threads of the block."""
    return tirx.Evaluate(tvm_storage_sync("shared"))


def butterfly(buffers: Sequence[Any], lanes: Expr | int = WARP) -> Stmt:
    """Add each buffer's first element up over groups of `lanes` neighbouring threads.

    A power of two, at most a warp. Each thread gets the same bits: the pairs of each step add the
    same two numbers.
    """
    steps: list[Stmt] = []
    offset = WARP // 2
    width = i32(lanes) if isinstance(lanes, int) else lanes
    while offset:
        added = [grow(b, _other(get(b), offset)) for b in buffers]
        known = constant(width)
        if known is None:
            steps.append(when(tirx.LT(i32(offset), width), seq(added)))
        elif offset < known:
            steps += added
        offset //= 2
    return seq(steps)


def over_block(buffers: Sequence[Any], thread: Expr, threads: int, stmts: list[Stmt]) -> None:
    """Add each buffer's first element up over the block; each thread gets the same bits.

    Another one of the block's barriers has to stand before the same statements are run again.
    """
    warps = threads // WARP
    first = tirx.EQ(tirx.BitwiseAnd(thread, i32(WARP - 1)), i32(0))
    into, back = [], []
    stmts.append(butterfly(buffers))
    for buffer in buffers:
        scratch = shared(warps, str(buffer.dtype), "warp_sums")
        stmts.append(tirx.AllocBuffer(scratch))
        into.append(put(scratch, get(buffer), tirx.shift_right(thread, i32(5))))
        back.append(put(buffer, get(scratch, tirx.BitwiseAnd(thread, i32(warps - 1)))))
    stmts += [when(first, seq(into)), sync(), *back, butterfly(buffers, warps)]


def _other(value: Expr, offset: int) -> Expr:
    mask = IntImm("uint32", _ALL_LANES)
    dtype = str(value.ty.dtype)
    return tirx.call_extern(dtype, "__shfl_xor_sync", mask, value, i32(offset), i32(WARP))


def value_of(
    node: Node, read: Callable[[Any], Expr], rewrite: Callable[[Node], Node] = lambda node: node
) -> Expr:
    """`evaluate` with casts as the hardware does them: one instruction, every NaN stays one.

    rewrite: what scalars are replaced by.
    """
    if isinstance(node, Apply):
        args = [value_of(arg, read, rewrite) for arg in node.args]
        if isinstance(node.make, Cast):
            return tirx.Cast(node.make.dtype, args[0])
        return node.make(*args)
    return evaluate(rewrite(node), read)


def log2_ceil(size: Expr, most: int) -> Expr:
    """The least p with 2**p >= size, at most `most`; an int64 size, an int32 result."""
    known = constant(size)
    if known is not None:
        return i32(min(max(known - 1, 0).bit_length(), most))
    total: Expr = i32(0)
    for p in range(most):
        total = total + tirx.Cast("int32", tirx.GT(size, i64(1 << p)))
    return total


def ceildiv(a: Expr, b: Expr) -> Expr:
    """a / b rounded up, for sizes of one type; folded where both are constants."""
    x, y = constant(a), constant(b)
    if y == 1:
        return a
    if x is not None and y is not None:
        return IntImm(str(a.ty.dtype), -(-x // y))
    return tirx.Div(a + (b - 1), b)


def quotient(a: Expr, b: Expr | int) -> Expr:
    """a / b rounded down, for int32 indices that are not negative."""
    return tirx.Div(a, i32(b) if isinstance(b, int) else b)


def at_most(a: Expr, b: Expr) -> Expr:
    """a <= b for sizes; a constant where both are."""
    x, y = constant(a), constant(b)
    return tirx.LE(a, b) if x is None or y is None else IntImm("bool", int(x <= y))


def power(bits: Expr) -> Expr:
    """2**bits as int64."""
    known = constant(bits)
    if known is not None:
        return i64(1 << known)
    return tirx.shift_left(i64(1), tirx.Cast("int64", bits))


def on_host(name: str, value: Expr, out: list[Stmt], dtype: str = "int64") -> Expr:
    """Name a number that the host computes; constants and variables stay as they are.

    TVM's passes bound every named value by the bounds of all that it is made of, which takes time
    exponential in the depth of such definitions. They do not look into a reinterpretation.
    """
    if isinstance(value, (IntImm, tirx.Var)):
        return value
    return bind(name, tirx.reinterpret(dtype, value), out, dtype)


def named_index(name: str, value: Expr, out: list[Stmt]) -> Expr:
    """Name an index that a thread computes, in a register.

    A register and not a named value, for the same reason as in `on_host`.
    """
    if isinstance(value, (IntImm, tirx.Var)):
        return value
    buffer = registers(1, str(value.ty.dtype), name)
    out.extend([tirx.AllocBuffer(buffer), put(buffer, value)])
    return get(buffer)


def anew(value: Expr) -> Stmt | None:
    """Let what follows from a named index be computed again behind here, not kept in registers."""
    if not isinstance(value, TensorLoad):
        return None
    call = tirx.call_extern("int32", "normgraph_anew", value.source.data)
    return tirx.Evaluate(call)


def packed(buffer: Any) -> Stmt | None:
    """Let half types of a thread stay as they came, two a register, and not as float32 each.

    Each use behind here converts them again.
    """
    nbytes = int(buffer.shape[0]) * item_size(str(buffer.dtype))
    if item_size(str(buffer.dtype)) != 2 or nbytes % 4:
        return None
    call = tirx.call_extern("int32", "normgraph_packed", buffer.data, i32(nbytes // 4))
    return tirx.Evaluate(call)


def rounded_sum(old: Expr, value: Expr) -> Expr:
    """old + value; of a half type, from what the value was rounded from, and rounded once."""
    dtype = str(value.ty.dtype)
    if dtype not in ("float16", "bfloat16"):
        return old + value
    exact = value.value if isinstance(value, tirx.Cast) else tirx.Cast("float32", value)
    return tirx.Cast(dtype, tirx.Cast(str(exact.ty.dtype), old) + exact)


def finite_or_zero(value: Expr) -> Expr:
    """What to centre on: 0 where data has infinities, so that its mean is that of the sum."""
    dtype = str(value.ty.dtype)
    finite = tirx.LE(tirx.abs(value), tirx.max_value(dtype))
    return tirx.Select(finite, value, zero(dtype))
