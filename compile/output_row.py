"""A row's outputs where its sums are done, past the caches where the arrays are larger than those.

A store that bypasses the caches should fill its line at once: half-written lines wait in a few
buffers, and where several rows take turns each goes to memory in parts, each of which costs as much
as a whole one. So whole lines are made ready and stored together; the elements in front of the
first and behind the last are stored as usual.

Meanwhile what stores name as `ahead` is asked for, line by line: the next block's sums would wait
for the memory, and the memory waits now, while lines are stored.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from normgraph.compile.knobs import knobs
from normgraph.compile.row_kernel import RowStore, row
from normgraph.compile.row_lengths import Length
from normgraph.compile.streaming import Streaming
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    both,
    floordiv,
    i64,
    least,
    loop,
    modulo,
    plus,
    seq,
    times,
    vector_loop,
    when,
)
from normgraph.compile.turned_order import TurnedOrder, step_of


def output_row(
    length: Length,
    stores: list[RowStore],
    *,
    lanes: int,
    unroll: int,
    streaming: Streaming,
    large: Expr | None,
    apart: bool = False,
    order: TurnedOrder | None = None,
) -> Stmt:
    """A row without sums, or several side by side, past the caches where that can be.

    large: whether the arrays ask for it; None for no. apart: the next row lies elsewhere. order:
    of the row's vectors or lines. Several outputs are streamed where lines begin at one element.
    """
    cached = row(length, [], stores, lanes=lanes, unroll=unroll, order=order)
    streams = [s for s in stores if s.stream is not None]
    if large is None or not streams or not can_stream(length):
        return cached
    elements = length.elements
    streamed = _StreamedRow(elements, stores, lanes, unroll, streaming, order)
    whole = tirx.EQ(modulo(elements, streamed.line), i64(0))
    shares_none = tirx.And(whole, tirx.EQ(streamed.unaligned(), i64(0)))
    short = tirx.And(shares_none, tirx.GE(elements, i64(knobs().streamed_apart)))
    ragged = tirx.GE(elements, i64(knobs().streamed_columns if apart else knobs().streamed_ragged))
    fits = tirx.Or(tirx.GE(elements, i64(knobs().streamed_row)), short)
    if len(streams) > 1:
        alike = tirx.And(whole, streamed.alike())
        fits, ragged = tirx.And(fits, alike), tirx.And(ragged, alike)
    # Two copies, as the first one of known short rows needs no code for parts of lines.
    others = when(tirx.And(large, ragged), streamed.emit(), cached)
    return when(tirx.And(large, fits), streamed.emit(), others)


def can_stream(length: Length) -> bool:
    """Whether a row of this length may be long enough to be stored past the caches."""
    return length.most is None or length.most >= knobs().streamed_apart


class _StreamedRow:
    """`line`: elements of a cache line; `step`: of a turn of the loop."""

    def __init__(
        self,
        length: Expr,
        stores: list[RowStore],
        lanes: int,
        unroll: int,
        streaming: Streaming,
        order: TurnedOrder | None,
    ) -> None:
        self.length = length
        self.stores = stores
        self.lanes = lanes
        self.streams = [s for s in stores if s.stream is not None]
        self.line = max(lanes, *(streaming.line(s.dtype) for s in self.streams))
        self.step = max(self.line, lanes * unroll)
        self.streaming = streaming
        self.order = order

    def emit(self) -> Stmt:
        body: list[Stmt] = []
        head = bind("head", least(self.unaligned(), self.length), body)
        count = tirx.Sub(self.length, head)
        steps = bind("steps", floordiv(count, self.step), body)
        stepped = bind("stepped", plus(head, times(steps, i64(self.step))), body)
        lines = bind("lines", floordiv(modulo(count, self.step), self.line), body)
        done = bind("done", plus(stepped, times(lines, i64(self.line))), body)
        step = step_of(self.order, steps, body)
        body += [
            self._cached(i64(0), head),
            loop(steps, lambda k: self._lines(head, step(k), self.step), name="line"),
            loop(lines, lambda k: self._lines(stepped, k, self.line), name="line")
            if self.step > self.line
            else seq([]),
            self._cached(done, tirx.Sub(self.length, done)),
        ]
        return seq(body)

    def unaligned(self) -> Expr:
        """Elements in front of the first whole line."""
        return self._unaligned(self.streams[0])

    def _unaligned(self, store: RowStore) -> Expr:
        assert store.stream is not None
        return self.streaming.unaligned(store.stream(i64(0)), store.dtype)

    def alike(self) -> Expr:
        """Whether there are as many for each of the outputs."""
        others = [tirx.EQ(self._unaligned(s), self.unaligned()) for s in self.streams[1:]]
        return both(others)

    def _cached(self, start: Expr, count: Expr) -> Stmt:
        """Elements that are no whole line, stored as usual: in vectors, then one by one."""

        def put(index: Expr) -> Stmt:
            return seq([s.put(plus(start, index)) for s in self.stores])

        def vector(k: Expr) -> Stmt:
            base = times(k, i64(self.lanes))
            return vector_loop(self.lanes, lambda lane: put(plus(base, lane)))

        whole = times(floordiv(count, self.lanes), i64(self.lanes))
        return seq(
            [
                loop(floordiv(count, self.lanes), vector, name="vector"),
                loop(modulo(count, self.lanes), lambda k: put(plus(whole, k)), name="rest"),
            ]
        )

    def _lines(self, start: Expr, k: Expr, step: int) -> Stmt:
        stmts: list[Stmt] = []
        for first in range(0, step, self.line):
            base = plus(start, plus(times(k, i64(step)), i64(first)))
            stmts.extend(self._line(base))
        return seq(stmts)

    def _line(self, base: Expr) -> list[Stmt]:
        # The store takes a vector, and vectors arise in loops: TVM's passes make one of this.
        staged = {
            s: tirx.decl_buffer((self.line,), s.dtype, "staged", scope="global")
            for s in self.streams
        }
        stmts: list[Stmt] = [tirx.AllocBuffer(buffer) for buffer in staged.values()]
        for first in range(0, self.line, self.lanes):
            for s in self.stores:
                stmts.append(self._vector(s, base, first, staged.get(s)))
        for s, buffer in staged.items():
            assert s.stream is not None
            whole = tirx.BufferLoad(buffer, [tirx.Ramp(i64(0), i64(1), self.line)])
            if s.ahead:
                asked = [self.streaming.prefetch(element(base)) for element in s.ahead]
                stmts.append(when(s.asks, seq(asked)))
            stmts.append(self.streaming.store(s.stream(base), whole, s.dtype, self.line))
        return stmts

    def _vector(self, store: RowStore, base: Expr, first: int, staged: Any | None) -> Stmt:
        def at(lane: Expr) -> Stmt:
            place = plus(lane, i64(first))
            if staged is None:
                return store.put(plus(base, place))
            return tirx.BufferStore(staged, store.value(plus(base, place)), [place])

        return vector_loop(self.lanes, at)
