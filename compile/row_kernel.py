"""One row: contiguous elements read once, for all sums and outputs of a pass together.

The row is done in vectors of several registers, then in single ones. What is left behind the last
whole vector is done by one more vector that ends with the row and overlaps the one before it: lanes
that were done already count as zero in a sum, and are written once more in an output. Rows shorter
than a vector are done element by element. So any length works without masked memory accesses.

A sum keeps one accumulator a lane, moves it into a second one after every run of vectors (a row of
one run needs no second), and adds the lanes pairwise at the end. The order is fixed, no
reassociation is left to the compiler, and the error grows with run + length / (lanes * run), not
with length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from normgraph.compile.row_lengths import Length
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    constant,
    floordiv,
    i64,
    loop,
    modulo,
    plus,
    runs,
    seq,
    times,
    vector_loop,
    when,
    zero,
)
from normgraph.compile.turned_order import TurnedOrder, step_of

# Vectors that one accumulator takes before it is moved on; rows of a million elements have as many
# runs as a run has vectors.
_RUN = 64

# A value at element `index` of the row.
At = Callable[[Expr], Expr]


@dataclass
class RowSum:
    """Add `value` over the row.

    `take` receives the total; or, with `collect`, each lane's part of it for the caller to add up.
    """

    value: At
    dtype: str
    take: Callable[[Expr], Stmt] | None = None
    collect: Callable[[Expr, Expr], Stmt] | None = None


@dataclass(eq=False)
class RowStore:
    """Store a value for each element of the row.

    store(index, value, new): `new` is None, or says whether the element was not stored before.
    twice: it can be told so; where it cannot (what is added to a half type), no vector overlaps
    another. stream: what is stored may go past the caches, to the element `stream(index)`. ahead:
    the inputs' elements that are read for element `index` of the next block's row, to be asked for
    where `asks`.
    """

    value: At
    store: Callable[[Expr, Expr, Expr | None], Stmt]
    dtype: str
    twice: bool = True
    stream: At | None = None
    ahead: Sequence[At] = ()
    asks: Expr | None = None

    def put(self, index: Expr, new: Expr | None = None) -> Stmt:
        """The statement for one element."""
        return self.store(index, self.value(index), new)


def row(
    length: Length,
    sums: list[RowSum],
    stores: list[RowStore],
    *,
    lanes: int,
    unroll: int,
    order: TurnedOrder | None = None,
) -> Stmt:
    """The statement that does one row.

    lanes: elements of one vector register. unroll: registers used side by side for each sum.
    order: of the vectors, where there are no sums.
    """
    return _Row(length, sums, stores, lanes, unroll, order).emit()


def registers_a_sum(sums: int, vector_bytes: int) -> int:
    """The `unroll` of a row: enough chains to hide the adder's latency, few enough not to spill.

    16 registers at up to 32 bytes (AVX2, NEON has 32 but of 16 bytes), 32 at 64 (AVX-512).
    """
    if sums == 0:
        return 2
    return 4 if sums == 1 or (sums == 2 and vector_bytes == 64) else 2


class _Row:
    def __init__(
        self,
        length: Length,
        sums: list[RowSum],
        stores: list[RowStore],
        lanes: int,
        unroll: int,
        order: TurnedOrder | None,
    ) -> None:
        self.bounds = length
        self.length = length.elements
        self.stores = stores
        self.lanes = lanes
        self.wide = lanes * unroll
        self.order = order
        self.sums = [_Accumulator(s, lanes, self.wide) for s in sums]

    def emit(self) -> Stmt:
        body: list[Stmt] = []
        for acc in self.sums:
            body.extend(acc.start(clear=self.bounds.least < self.wide))
        if self.bounds.least >= self.lanes:
            body.append(self._long())
        elif self.bounds.most is not None and self.bounds.most < self.lanes:
            body.append(self._short())
        else:
            enough = tirx.GE(self.length, i64(self.lanes))
            body.append(when(enough, self._long(), self._short()))
        body.extend(acc.finish() for acc in self.sums)
        return seq(body)

    def _short(self) -> Stmt:
        return seq([self._one_by_one(i64(0), self.length), *(a.add_rest() for a in self.sums)])

    def _one_by_one(self, start: Expr, count: Expr) -> Stmt:
        def one(k: Expr) -> Stmt:
            index = plus(start, k)
            return seq(
                [
                    *(acc.grow(acc.rest, i64(0), acc.sum.value(index)) for acc in self.sums),
                    *(s.put(index) for s in self.stores),
                ]
            )

        return loop(count, one, name="rest")

    def _long(self) -> Stmt:
        """A row of at least one vector."""
        body: list[Stmt] = []
        n_wide = bind("n_wide", self.bounds.whole(self.wide), body)
        done_wide = bind("done_wide", times(n_wide, i64(self.wide)), body)
        body.append(self._in_runs(n_wide) if self.sums else self._in_order(n_wide))
        done = done_wide
        if self.wide > self.lanes:
            n_single = bind("n_single", floordiv(modulo(self.length, self.wide), self.lanes), body)
            done = bind("done", plus(done_wide, times(n_single, i64(self.lanes))), body)
            body.append(self._vectors(done_wide, n_single, False))
        rest = modulo(self.length, self.lanes)
        if constant(rest) == 0:
            return seq(body)
        if all(s.twice for s in self.stores):
            last = self._last_vector(rest)
            body.append(last if constant(rest) else when(tirx.GT(rest, i64(0)), last))
        else:
            body.append(self._one_by_one(done, rest))
            body.extend(acc.add_rest() for acc in self.sums)
        return seq(body)

    def _in_order(self, n_wide: Expr) -> Stmt:
        before: list[Stmt] = []
        step = step_of(self.order, n_wide, before)

        def one(k: Expr) -> Stmt:
            return self._vector(times(step(k), i64(self.wide)), self.wide, [])

        body = loop(n_wide, one, name="vector") if constant(n_wide) != 0 else None
        return seq([*before, body])

    def _vectors(self, start: Expr, count: Expr, wide: bool) -> Stmt:
        width = self.wide if wide else self.lanes

        def one(block: Expr) -> Stmt:
            into = [acc.run if wide else acc.single for acc in self.sums]
            return self._vector(plus(start, times(block, i64(width))), width, into)

        return loop(count, one, name="vector") if constant(count) != 0 else seq([])

    def _vector(self, base: Expr, width: int, into: list[Any], *, first: bool = False) -> Stmt:
        """The `width` elements from `base` on, each sum grown by them or, with `first`, begun."""

        def at(lane: Expr) -> Stmt:
            index = plus(base, lane)
            added = []
            for acc, buffer in zip(self.sums, into, strict=True):
                value = acc.sum.value(index)
                added.append(
                    tirx.BufferStore(buffer, value, [lane])
                    if first
                    else acc.grow(buffer, lane, value)
                )
            return seq([*added, *(s.put(index) for s in self.stores)])

        return vector_loop(width, at)

    def _last_vector(self, rest: Expr) -> Stmt:
        base = tirx.Sub(self.length, i64(self.lanes))
        body: list[Stmt] = []
        done = tirx.Sub(i64(self.lanes), rest)
        if constant(rest) is None:
            done = bind("done_lanes", done, body)

        def at(lane: Expr) -> Stmt:
            new = tirx.GE(lane, done)
            index = plus(base, lane)
            added = [
                acc.grow(
                    acc.single,
                    lane,
                    tirx.Select(new, acc.sum.value(index), zero(acc.sum.dtype)),
                )
                for acc in self.sums
            ]
            return seq([*added, *(s.put(index, new) for s in self.stores)])

        return seq([*body, vector_loop(self.lanes, at)])

    def _in_runs(self, n_wide: Expr) -> Stmt:
        """The multi-register part, with each accumulator emptied after every run."""

        def run(first: Expr, count: Expr) -> Stmt:
            return seq(
                [
                    *(stmt for acc in self.sums for stmt in acc.start_run()),
                    self._vectors(times(first, i64(self.wide)), count, True),
                    *(acc.end_run() for acc in self.sums),
                ]
            )

        if self.bounds.most is not None and self.bounds.most < self.wide:
            return seq([])
        certain = self.bounds.least >= self.wide
        if certain and self.bounds.most is not None and self.bounds.most // self.wide <= _RUN:
            return self._in_one_run(n_wide)
        body = seq(
            [
                *(stmt for acc in self.sums for stmt in acc.start_wide()),
                runs(n_wide, _RUN, run),
                *(stmt for acc in self.sums for stmt in acc.end_wide(first=certain)),
            ]
        )
        # A row shorter than a wide vector is spared the clearing and folding of the registers.
        return body if certain else when(tirx.GT(n_wide, i64(0)), body)

    def _in_one_run(self, n_wide: Expr) -> Stmt:
        """At least one wide vector, and no more than a run of them."""
        into = [acc.wide for acc in self.sums]

        def one(block: Expr) -> Stmt:
            return self._vector(times(block, i64(self.wide)), self.wide, into)

        fixed = constant(n_wide)
        more = tirx.Sub(n_wide, i64(1)) if fixed is None else i64(fixed - 1)
        return seq(
            [
                *(tirx.AllocBuffer(buffer) for buffer in into),
                self._vector(i64(0), self.wide, into, first=True),
                loop(more, one, name="vector", start=i64(1)) if fixed != 1 else None,
                *(stmt for acc in self.sums for stmt in acc.end_wide(first=True)),
            ]
        )


class _Accumulator:
    """One sum: a register of its own, the registers of the wide part and of its run, the rest."""

    def __init__(self, row_sum: RowSum, lanes: int, wide: int) -> None:
        self.sum = row_sum
        self.lanes = lanes
        self.width = wide
        dtype = row_sum.dtype
        self.single: Any = tirx.decl_buffer((lanes,), dtype, "lanes", scope="global")
        self.wide: Any = tirx.decl_buffer((wide,), dtype, "wide_lanes", scope="global")
        self.run: Any = tirx.decl_buffer((wide,), dtype, "run_lanes", scope="global")
        self.rest: Any = tirx.decl_buffer((1,), dtype, "rest_sum", scope="global")

    def start(self, *, clear: bool) -> list[Stmt]:
        """clear: the register of its own is added to before it is given a value."""
        none = zero(self.sum.dtype)
        single = tirx.AllocBuffer(self.single)
        return [
            *(self._cleared(self.single, self.lanes) if clear else [single]),
            tirx.AllocBuffer(self.rest),
            tirx.BufferStore(self.rest, none, [i64(0)]),
        ]

    def _cleared(self, buffer: Any, width: int) -> list[Stmt]:
        none = zero(self.sum.dtype)
        clear = vector_loop(width, lambda lane: tirx.BufferStore(buffer, none, [lane]))
        return [tirx.AllocBuffer(buffer), clear]

    def start_wide(self) -> list[Stmt]:
        return self._cleared(self.wide, self.width)

    def start_run(self) -> list[Stmt]:
        return self._cleared(self.run, self.width)

    def end_run(self) -> Stmt:
        return vector_loop(
            self.width,
            lambda lane: self.grow(self.wide, lane, tirx.BufferLoad(self.run, [lane])),
        )

    def end_wide(self, *, first: bool) -> list[Stmt]:
        """first: the register of its own has no value yet, nor was it cleared."""

        def into(lane: Expr) -> Stmt:
            value = tirx.BufferLoad(self.wide, [lane])
            if first:
                return tirx.BufferStore(self.single, value, [lane])
            return self.grow(self.single, lane, value)

        return [*fold(self.wide, self.width, self.lanes), vector_loop(self.lanes, into)]

    def grow(self, buffer: Any, lane: Expr, value: Expr) -> Stmt:
        return tirx.BufferStore(buffer, tirx.Add(tirx.BufferLoad(buffer, [lane]), value), [lane])

    def add_rest(self) -> Stmt:
        """What was added element by element, into the first lane."""
        value = tirx.BufferLoad(self.rest, [i64(0)])
        return self.grow(self.single, i64(0), value)

    def finish(self) -> Stmt:
        collect, take = self.sum.collect, self.sum.take
        if collect is not None:
            return vector_loop(
                self.lanes, lambda lane: collect(lane, tirx.BufferLoad(self.single, [lane]))
            )
        assert take is not None
        first = tirx.BufferLoad(self.single, [i64(0)])
        return seq([*fold(self.single, self.lanes, 1), take(first)])


def fold(buffer: Any, width: int, lanes: int, base: Expr | None = None) -> list[Stmt]:
    """Add pairs of halves until `lanes` of the `width` elements from `base` on hold the sum."""
    start = i64(0) if base is None else base
    stmts: list[Stmt] = []
    half = width // 2
    while half >= lanes:

        def one(lane: Expr, half: int = half) -> Stmt:
            near = plus(start, lane)
            pair = tirx.Add(
                tirx.BufferLoad(buffer, [near]), tirx.BufferLoad(buffer, [plus(near, i64(half))])
            )
            return tirx.BufferStore(buffer, pair, [near])

        stmts.append(vector_loop(half, one))
        half //= 2
    return stmts
