"""One row: contiguous elements read once, for all sums and outputs of a pass together.

The row is done in vectors of several registers, then single vectors, then single elements, so that
any length works without masks. A sum keeps one accumulator a lane, moves it into a second one after
every run of vectors, and adds the lanes pairwise at the end. The order is fixed, no reassociation
is left to the compiler, and the error grows with run + length / (lanes * run), not with length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    i64,
    loop,
    plus,
    runs,
    seq,
    times,
    when,
    zero,
)

# Vectors that one accumulator takes before it is moved on; rows of a million elements have as many
# runs as a run has vectors.
_RUN = 64

# A value or a store at element `index` of the row.
At = Callable[[Expr], Expr]


@dataclass
class RowSum:
    """Add `value` over the row; `take` receives the total."""

    value: At
    take: Callable[[Expr], Stmt]
    dtype: str


@dataclass
class RowStore:
    """Run a store for each element of the row."""

    store: Callable[[Expr], Stmt]


def row(
    length: Expr, sums: list[RowSum], stores: list[RowStore], *, lanes: int, unroll: int
) -> Stmt:
    """The statement that does one row of `length` elements.

    lanes: elements of one vector register. unroll: registers used side by side for each sum.
    """
    body: list[Stmt] = []
    wide = lanes * unroll
    accumulators = [_Accumulator(s, wide) for s in sums]
    for acc in accumulators:
        body.extend(acc.start())

    def at(index: Expr, part: str, lane: Expr) -> Stmt:
        added = [acc.add(part, lane, index) for acc in accumulators]
        return seq([*added, *(s.store(index) for s in stores)])

    def vectors(start: Expr, count: Expr, width: int, part: str) -> Stmt:
        def one(block: Expr) -> Stmt:
            base = plus(start, times(block, i64(width)))
            return loop(
                i64(width),
                lambda lane: at(plus(base, lane), part, lane),
                name="lane",
                kind="vectorized",
            )

        return loop(count, one, name=part) if constant(count) != 0 else seq([])

    n_wide = bind("n_wide", _floordiv(length, wide), body)
    done_wide = bind("done_wide", times(n_wide, i64(wide)), body)
    n_single = i64(0)
    if unroll > 1:
        n_single = bind("n_single", _floordiv(_modulo(length, wide), lanes), body)
    done = bind("done", plus(done_wide, times(n_single, i64(lanes))), body)
    if accumulators:
        in_vectors = [
            *(stmt for acc in accumulators for stmt in acc.start_vectors()),
            _in_runs(n_wide, wide, accumulators, vectors),
            vectors(done_wide, n_single, lanes, "vector"),
            *(stmt for acc in accumulators for stmt in acc.end_vectors()),
        ]
        # A row shorter than a vector is spared the clearing and folding of the lanes.
        body.append(_if_any(done, seq(in_vectors)))
    else:
        body.append(vectors(i64(0), n_wide, wide, "run"))
        body.append(vectors(done_wide, n_single, lanes, "vector"))
    rest = _modulo(length, lanes)
    if constant(rest) != 0:
        body.append(loop(rest, lambda k: at(plus(done, k), "rest", k), name="rest"))
    body.extend(acc.finish() for acc in accumulators)
    return seq(body)


def registers_a_sum(sums: int, vector_bytes: int) -> int:
    """The `unroll` of a row: enough chains to hide the adder's latency, few enough not to spill.

    16 registers at up to 32 bytes (AVX2, NEON has 32 but of 16 bytes), 32 at 64 (AVX-512).
    """
    if sums == 0:
        return 2
    return 4 if sums == 1 or (sums == 2 and vector_bytes == 64) else 2


def _if_any(count: Expr, body: Stmt) -> Stmt | None:
    known = constant(count)
    if known is None:
        return when(tirx.GT(count, i64(0)), body)
    return body if known else None


def _in_runs(
    n_wide: Expr,
    wide: int,
    accumulators: list[_Accumulator],
    vectors: Callable[[Expr, Expr, int, str], Stmt],
) -> Stmt:
    """The multi-register part, with each accumulator emptied after every run."""

    def run(first: Expr, count: Expr) -> Stmt:
        return seq(
            [
                *(stmt for acc in accumulators for stmt in acc.start_run()),
                vectors(times(first, i64(wide)), count, wide, "run"),
                *(acc.end_run() for acc in accumulators),
            ]
        )

    return runs(n_wide, _RUN, run)


class _Accumulator:
    """One sum's lanes, the lanes of the run at hand, and two scalars: their total, and the rest."""

    def __init__(self, row_sum: RowSum, wide: int) -> None:
        self.sum = row_sum
        self.wide = wide
        dtype = row_sum.dtype
        self.vector: Any = tirx.decl_buffer((wide,), dtype, "lanes", scope="global")
        self.run: Any = tirx.decl_buffer((wide,), dtype, "run_lanes", scope="global")
        self.total: Any = tirx.decl_buffer((1,), dtype, "lane_total", scope="global")
        self.rest: Any = tirx.decl_buffer((1,), dtype, "rest_sum", scope="global")

    def start(self) -> list[Stmt]:
        none = zero(self.sum.dtype)
        return [
            tirx.AllocBuffer(self.total),
            tirx.AllocBuffer(self.rest),
            tirx.BufferStore(self.total, none, [i64(0)]),
            tirx.BufferStore(self.rest, none, [i64(0)]),
        ]

    def start_vectors(self) -> list[Stmt]:
        none = zero(self.sum.dtype)
        return [tirx.AllocBuffer(self.vector), self._each(self.vector, lambda lane: none)]

    def end_vectors(self) -> list[Stmt]:
        stmts: list[Stmt] = []
        half = self.wide // 2
        while half >= 1:
            stmts.append(self._fold(half))
            half //= 2
        first = tirx.BufferLoad(self.vector, [i64(0)])
        return [*stmts, tirx.BufferStore(self.total, first, [i64(0)])]

    def start_run(self) -> list[Stmt]:
        none = zero(self.sum.dtype)
        return [tirx.AllocBuffer(self.run), self._each(self.run, lambda lane: none)]

    def end_run(self) -> Stmt:
        def grown(lane: Expr) -> Expr:
            return tirx.Add(tirx.BufferLoad(self.vector, [lane]), tirx.BufferLoad(self.run, [lane]))

        return self._each(self.vector, grown)

    def _each(self, buffer: Any, value: At) -> Stmt:
        """Store a value into every lane."""
        return loop(
            i64(self.wide),
            lambda lane: tirx.BufferStore(buffer, value(lane), [lane]),
            name="lane",
            kind="vectorized",
        )

    def add(self, part: str, lane: Expr, index: Expr) -> Stmt:
        buffer = {"run": self.run, "vector": self.vector, "rest": self.rest}[part]
        at = i64(0) if part == "rest" else lane
        value = tirx.Add(tirx.BufferLoad(buffer, [at]), self.sum.value(index))
        return tirx.BufferStore(buffer, value, [at])

    def finish(self) -> Stmt:
        both = [tirx.BufferLoad(buffer, [i64(0)]) for buffer in (self.total, self.rest)]
        return self.sum.take(tirx.Add(*both))

    def _fold(self, half: int) -> Stmt:
        def one(lane: Expr) -> Stmt:
            pair = tirx.Add(
                tirx.BufferLoad(self.vector, [lane]),
                tirx.BufferLoad(self.vector, [plus(lane, i64(half))]),
            )
            return tirx.BufferStore(self.vector, pair, [lane])

        return loop(i64(half), one, name="lane", kind="vectorized") if half > 1 else one(i64(0))


def _floordiv(a: Expr, b: int) -> Expr:
    value = constant(a)
    return i64(value // b) if value is not None else tirx.FloorDiv(a, i64(b))


def _modulo(a: Expr, b: int) -> Expr:
    """a % b for a power of two, as a mask, from which LLVM sees how short a loop is."""
    value = constant(a)
    return i64(value % b) if value is not None else tirx.BitwiseAnd(a, i64(b - 1))
