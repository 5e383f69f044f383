"""A block's rows of an output, made ready in the first cache and stored past the caches from there.

A store that bypasses the caches has to fill its line (`output_row`), and short rows leave much in
lines that two of them share. The rows of a block follow one another, so they are put side by side
in memory that stays in the first cache, each element as far into a line as in the output, and go on
from there in whole lines. What lies in front of the first and behind the last is stored as usual.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from normgraph.compile.kernel_frame import Frame
from normgraph.compile.knobs import knobs
from normgraph.compile.streaming import Streaming
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import (
    Expr,
    Stmt,
    bind,
    i64,
    least,
    loop,
    modulo,
    plus,
    seq,
    times,
    when,
)


class StagedBlock:
    """Where `count` slices of an output are made ready, the first from flat offset `first` on.

    length: elements of a slice. inputs: what is read at the output's places, asked for `ahead`
    elements on, where that is not 0, while lines are stored. before: takes what comes first.
    """

    def __init__(
        self,
        frame: Frame,
        tensor: Tensor,
        first: Expr,
        count: Expr,
        length: Expr,
        *,
        streaming: Streaming,
        inputs: list[Tensor],
        ahead: Expr,
        before: list[Stmt],
    ) -> None:
        self.frame = frame
        self.tensor = tensor
        self.streaming = streaming
        self.line = streaming.line(tensor.dtype)
        self.inputs = inputs
        self.ahead = ahead
        self.before = before
        self.count = count
        self.length = length
        self.elements = bind("elements", times(count, length), before)
        self.first = bind("first_element", first, before)
        unaligned = streaming.unaligned(frame.load(tensor, self.first), tensor.dtype)
        self.head = bind("head", unaligned, before)
        # From an element's place in the output to its place here, where `head` begins a line.
        into_line = modulo(tirx.Sub(i64(self.line), self.head), self.line)
        self.shift = bind("shift", tirx.Sub(into_line, self.first), before)
        room = bind("room", plus(self.elements, i64(self.line)), before)
        self.buffer: Any = tirx.decl_buffer((room,), tensor.dtype, "staged", scope="global")
        before.append(tirx.AllocBuffer(self.buffer))

    def ragged(self) -> Expr:
        """Whether slices are short and end within lines, which the next ones then begin in."""
        short = tirx.LE(self.length, i64(knobs().staged_columns))
        return tirx.And(short, tirx.NE(modulo(self.length, self.line), i64(0)))

    def put(self, value: Expr, place: Expr) -> Stmt:
        """Make the output's element at `place` ready."""
        return tirx.BufferStore(self.buffer, value, [plus(place, self.shift)])

    def follow(self, c: Expr) -> Stmt:
        """Store the lines that are whole since slice `c` - 1, in front of slice `c`.

        So what is stored and what is computed take turns.
        """
        first = tirx.Max(tirx.Sub(c, i64(1)), i64(0))
        return self._lines(self._filled(first), self._filled(c))

    def _filled(self, slices: Expr) -> Expr:
        """The whole lines that so many slices fill."""
        filled = tirx.Sub(times(slices, self.length), self.head)
        return tirx.shift_right(tirx.Max(filled, i64(0)), i64(self.line.bit_length() - 1))

    def _lines(self, begin: Expr, end: Expr) -> Stmt:
        def line(k: Expr) -> Stmt:
            place = plus(self.first, plus(self.head, times(k, i64(self.line))))
            start = plus(place, self.shift)
            whole = tirx.BufferLoad(self.buffer, [tirx.Ramp(start, i64(1), self.line)])
            out = self.frame.load(self.tensor, place)
            asked = [
                self.streaming.prefetch(self.frame.load(t, plus(place, self.ahead)))
                for t in self.inputs
            ]
            asks = when(tirx.NE(self.ahead, i64(0)), seq(asked)) if asked else None
            return seq([asks, self.streaming.store(out, whole, self.tensor.dtype, self.line)])

        stmts: list[Stmt] = []
        begin = bind("begin", begin, stmts)
        return seq(
            [*stmts, loop(tirx.Sub(end, begin), lambda k: line(plus(begin, k)), name="line")]
        )

    def emit(self, rows: Stmt, *, followed: bool) -> Stmt:
        """`rows`, and then what they made ready to the output, less what they had `follow`."""
        stmts = self.before
        head = bind("before_lines", least(self.head, self.elements), stmts)
        lines = bind("lines", self._filled(self.count), stmts)
        done = bind(
            "done", least(plus(self.head, times(lines, i64(self.line))), self.elements), stmts
        )

        def copied(k: Expr) -> Stmt:
            place = plus(self.first, k)
            value = tirx.BufferLoad(self.buffer, [plus(place, self.shift)])
            return tirx.BufferStore(self.frame.flat[self.tensor], value, [place])

        begun = self._filled(tirx.Sub(self.count, i64(1))) if followed else i64(0)
        return seq(
            [
                *stmts,
                rows,
                self._lines(begun, lines),
                loop(head, copied, name="head"),
                loop(tirx.Sub(self.elements, done), lambda k: copied(plus(done, k)), name="rest"),
            ]
        )
