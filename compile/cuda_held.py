"""Slices that fit a team of threads: read once, held in registers through all passes.

1. A block of threads (or a part of a warp) takes a slice; its loads are all issued at once.
2. Each sum is added up in registers, then over the warp by shuffles and over the block through
   shared memory. The mean first, and what is centred on it from the registers: two passes that
   cost no traffic.
3. Every thread computes the slice's values for itself; one stores them.
4. The outputs are computed from the registers and stored.
5. Sums across slices (parameter gradients of layer norm): a block goes through many slices and
   keeps the sums of its columns in registers; at the end each block stores its part, which
   `cuda_finish` adds up in a fixed order.

Roofline. Each array once, in one launch: 2 A / B forward, 3 A / B backward, with A the bytes of an
array and B the bandwidth of device memory; sums across slices add the finish.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_geometry import Geometry, Mapping, Span, shifted, whole
from normgraph.compile.cuda_kernel import (
    WARP,
    as_i64,
    butterfly,
    ceildiv,
    cleared,
    counted,
    get,
    grow,
    i32,
    kernel,
    named_index,
    on_host,
    put,
    quotient,
    registers,
    shared,
    sync,
)
from normgraph.compile.cuda_settle import Settler, is_row_sum
from normgraph.compile.cuda_tile import Place, Tile
from normgraph.compile.slice_plan import Pass, Step
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import Expr, Stmt, constant, i64, least, seq, times, when

# Of the largest device: a grid of as many blocks as can stand there, all for the whole time.
_MULTIPROCESSORS = 132


class HeldSlices:
    """Emits one kernel. resident: blocks that stand on a multiprocessor at a time.

    partials: where each block puts its part of the sums across slices, and how many there are.
    """

    def __init__(
        self,
        frame: CudaFrame,
        geometry: Geometry,
        mapping: Mapping,
        resident: int,
    ) -> None:
        self.frame = frame
        self.geometry = geometry
        self.mapping = mapping
        self.resident = resident
        self.plan = geometry.plan
        self.partials: dict[Tensor, tuple[Room, Expr]] = {}
        self.tile = Tile(frame, geometry, mapping)
        self.span: Span = whole(geometry, mapping.vector)
        size = mapping.registers * mapping.vector
        self.columns = {t: registers(size, t.dtype, f"{t.name}_columns") for t in self._across()}
        self.blocks: Expr = i64(1)
        self.reductions = 0
        self.lane: Expr = i32(0)
        self.thread: Expr = i32(0)
        self.settler: Settler
        self.scratch: Any = None

    # The kernel.

    def _across(self) -> list[Tensor]:
        slices = frozenset(self.plan.slice_axes)
        for step in self.plan.column_sums:
            if step.op.out.axes & slices or self.geometry.row_axes:
                raise NotCanonical("sums across slices of several rows")
        return [step.op.out for step in self.plan.column_sums]

    def emit(self, stmts: list[Stmt]) -> Stmt:
        """The launch; what the host computes for it goes to `stmts`."""
        blocks = ceildiv(self.geometry.slices, as_i64(self._teams()))
        if not self.columns:
            self.blocks = on_host("blocks", blocks, stmts)
            return kernel(self.blocks, self.mapping.threads, partial(self._body, self.blocks))
        self.blocks = on_host("blocks", least(blocks, i64(_MULTIPROCESSORS * self.resident)), stmts)
        for tensor in self.columns:
            room = self.frame.room("block_parts", times(self.blocks, self.geometry.length))
            self.partials[tensor] = room, self.blocks
        body = partial(self._body, self.blocks)
        return kernel(self.blocks, self.mapping.threads, body, self.resident)

    def _teams(self) -> Expr:
        """Slices a block does at a time."""
        if not self.mapping.warps:
            return i32(1)
        bits = self.mapping.team_bits
        known = constant(bits)
        if known is not None:
            return i32(self.mapping.threads >> known)
        return tirx.shift_right(i32(self.mapping.threads), bits)

    def _body(self, blocks: Expr, block: Expr, thread: Expr) -> Stmt:
        stmts: list[Stmt] = []
        self.tile.rewrite = self.frame.kernel_scalars(stmts)
        self.thread = thread
        if self.mapping.warps:
            mask = self.mapping.team - 1
            self.lane = named_index("lane", tirx.BitwiseAnd(thread, mask), stmts)
        else:
            self.lane = thread
        self.tile.open(self.lane, stmts)
        stmts += [cleared(buffer) for buffer in self.columns.values()]
        if not self.partials:
            stmts.append(self._slices(as_i64(block)))
            return seq(stmts)
        first = as_i64(block) * as_i64(self._teams())
        step = blocks * as_i64(self._teams())
        rounds = tirx.Div(self.geometry.slices - first + step - 1, step)
        count = tirx.Cast("int32", rounds)
        stmts.append(
            counted(count, lambda k: self._slices(as_i64(block) + as_i64(k) * blocks), "round")
        )
        self.tile.active, self.tile.base = None, i64(0)
        if self.mapping.warps:
            size = self.mapping.threads * self.mapping.registers * self.mapping.vector
            self.scratch = shared(size, self.frame.dtype, "team_columns")
            stmts.append(tirx.AllocBuffer(self.scratch))
        for number, tensor in enumerate(self.partials):
            if number and self.mapping.warps:
                stmts.append(sync())  # the next tensor takes the same scratch
            stmts.append(self._put_columns(tensor, block))
        return seq(stmts)

    def _slices(self, number: Expr) -> Stmt:
        """The slices that the block's teams do side by side; `number` counts such groups."""
        stmts: list[Stmt] = []
        index, active = number, None
        if self.mapping.warps:
            team = tirx.shift_right(self.thread, self.mapping.team_bits)
            own = named_index("own", number * as_i64(self._teams()) + as_i64(team), stmts)
            active = tirx.LT(own, self.geometry.slices)
            index = tirx.Min(own, self.geometry.slices - 1)
        named = named_index("slice", index, stmts)
        self.tile.at_slice(named, active, stmts)
        self.reductions = 0
        width = self.mapping.team if self.mapping.warps else i32(WARP)
        lane = self.lane if self.mapping.warps else tirx.BitwiseAnd(self.lane, i32(WARP - 1))
        self.settler = Settler(self.tile, lane, width, self._row_value)
        self.settler.read_inputs(stmts)
        steps = [s for p in self.plan.passes for s in p.wide]
        stmts.append(self.tile.load(self.span, steps))
        for work in self.plan.passes:
            self._pass(work, stmts)
        stmts.append(self._keep())
        if self.partials and self.reductions == 1 and not self.mapping.warps:
            stmts.append(sync())  # the next round reuses the only scratch
        return seq(stmts)

    def _pass(self, work: Pass, stmts: list[Stmt]) -> None:
        sums = [s for s in work.wide if s.is_sum and s.op.out in self.plan.per_slice]
        rows = [s for s in work.wide if is_row_sum(self.plan, s)]
        columns = [s for s in work.wide if s.op.out in self.partials]
        outputs = [s for s in work.wide if not s.is_sum]
        if len(sums) + len(rows) + len(columns) + len(outputs) < len(work.wide):
            raise NotCanonical("a sum that is neither a slice's, a row's nor a column's")
        if sums:
            self._sums(sums, stmts)
        if rows:
            self._row_sums(rows, stmts)
        self.settler.settle(work.after, stmts)
        if columns:
            add = partial(self.tile.add_up, columns, dict(self.columns))
            stmts.append(self.tile.each(self.span, add))
        stmts.append(self.tile.outputs(self.span, outputs))

    def _keep(self) -> Stmt:
        done = self.settler.keep([*self.plan.per_slice])
        if not done:
            return seq([])
        leader = tirx.EQ(self.lane, i32(0))
        if self.tile.active is not None:
            leader = tirx.And(leader, self.tile.active)
        return when(leader, seq(done))

    # Sums of the slice.

    def _sums(self, steps: list[Step], stmts: list[Stmt]) -> None:
        totals = {s.op.out: registers(1, s.op.out.dtype, f"{s.op.out.name}_sum") for s in steps}
        stmts += [cleared(buffer) for buffer in totals.values()]
        stmts.append(self.tile.each(self.span, partial(self.tile.add_up, steps, totals)))
        self._over_team([*totals.values()], stmts)
        for step in steps:
            self.settler.take(step.op.out, get(totals[step.op.out]), stmts)

    def _over_team(self, buffers: list[Any], stmts: list[Stmt]) -> None:
        if self.mapping.warps:
            stmts.append(butterfly(buffers, self.mapping.team))
            return
        warps = self.mapping.threads // WARP
        stmts.append(butterfly(buffers))
        if warps == 1:
            return
        self.reductions += 1
        first = tirx.EQ(tirx.BitwiseAnd(self.thread, i32(WARP - 1)), i32(0))
        into, back = [], []
        for buffer in buffers:
            scratch = shared(warps, str(buffer.dtype), "warp_sums")
            stmts.append(tirx.AllocBuffer(scratch))
            into.append(put(scratch, get(buffer), tirx.shift_right(self.thread, i32(5))))
            back.append(put(buffer, get(scratch, tirx.BitwiseAnd(self.thread, i32(warps - 1)))))
        stmts += [when(first, seq(into)), sync(), *back, butterfly(buffers, warps)]

    # Sums of the slice's rows: into the workspace, where the finish reads them too.

    def _row_sums(self, steps: list[Step], stmts: list[Stmt]) -> None:
        m = self.mapping
        totals = {s.op.out: registers(1, s.op.out.dtype, f"{s.op.out.name}_row") for s in steps}
        stmts += [cleared(buffer) for buffer in totals.values()]
        warps = max(m.registers * m.threads // WARP, 1)
        parts = {} if m.warps else {t: shared(warps, t.dtype, "row_parts") for t in totals}
        stmts += [tirx.AllocBuffer(buffer) for buffer in parts.values()]
        width = tirx.shift_left(i32(1), tirx.Min(m.column_bits, i32(5)))
        named = named_index("row_lanes", width, stmts)
        wide = tirx.GT(m.column_bits, i32(5))
        add = partial(self.tile.add_up, steps, totals)

        def flush(k: Expr, row: Expr) -> Stmt:
            last = shifted(i32(1), m.run_bits) - 1
            ends = tirx.EQ(tirx.BitwiseAnd(k, last), last)
            first = tirx.EQ(tirx.BitwiseAnd(self.tile.column, named - 1), i32(0))
            inside = tirx.And(first, tirx.LT(row, self.span.row_end))
            if self.tile.active is not None:
                inside = tirx.And(inside, self.tile.active)
            direct = seq([self.settler.store(t, get(b), row) for t, b in totals.items()])
            if parts:
                at = shifted(row, m.column_bits - 5) + tirx.shift_right(self.tile.column, i32(5))
                direct = when(
                    wide, seq([put(parts[t], get(b), at) for t, b in totals.items()]), direct
                )
            clear = [put(b, tirx.FloatImm(t.dtype, 0.0)) for t, b in totals.items()]
            return when(
                ends,
                seq([butterfly([*totals.values()], named), when(inside, direct), *clear]),
            )

        stmts += [self.tile.each(self.span, add, flush), sync()]
        if parts:
            stmts.append(when(wide, self._add_parts(parts)))
        self.reductions += 2

    def _add_parts(self, parts: dict[Tensor, Any]) -> Stmt:
        """What the warps of a row have, added up: a row a thread."""
        m = self.mapping
        total = {t: registers(1, t.dtype, f"{t.name}_total") for t in parts}
        bits = m.column_bits - 5

        def row(k: Expr) -> Stmt:
            index = self.thread + k * i32(m.threads)

            def part(p: Expr) -> Stmt:
                at = tirx.shift_left(index, bits) + p
                return seq([grow(total[t], get(b, at)) for t, b in parts.items()])

            stored = [self.settler.store(t, get(b), index) for t, b in total.items()]
            clear = [cleared(b) for b in total.values()]
            return seq([*clear, counted(shifted(i32(1), bits), part, "p"), *stored])

        count = quotient(self.span.row_end - self.thread + (m.threads - 1), m.threads)
        return seq([counted(count, row, "share"), sync()])

    def _row_value(self, tensor: Tensor, row: Expr, stmts: list[Stmt]) -> Expr:
        del stmts
        return self.frame.element(tensor, self.tile.position(as_i64(row)))

    # Sums across slices.

    def _put_columns(self, tensor: Tensor, block: Expr) -> Stmt:
        """This block's part of a sum across slices."""
        room, source = self.partials[tensor][0], self.columns[tensor]
        length = self.geometry.length
        start = as_i64(block) * length
        if not self.mapping.warps:

            def one(place: Place) -> Stmt:
                def lane(v: Expr) -> Stmt:
                    at = as_i64(place.column) * i64(self.mapping.vector) + as_i64(v)
                    value = get(source, place.index * self.mapping.vector + v)
                    return self.frame.store_room(room, value, start + at)

                return counted(i32(self.mapping.vector), lane, "v")

            return self.tile.each(self.span, one)
        return self._put_of_teams(room, source, start)

    def _put_of_teams(self, room: Room, source: Any, start: Expr) -> Stmt:
        m, scratch = self.mapping, self.scratch
        team = tirx.shift_right(self.thread, m.team_bits)
        length = tirx.Cast("int32", self.geometry.length)

        def one(place: Place) -> Stmt:
            def lane(v: Expr) -> Stmt:
                at = place.column * m.vector + v
                return put(scratch, get(source, place.index * m.vector + v), team * length + at)

            return counted(i32(m.vector), lane, "v")

        total = registers(1, str(source.dtype), "total")

        def column(k: Expr) -> Stmt:
            at = self.thread + k * i32(m.threads)
            add = counted(self._teams(), lambda t: grow(total, get(scratch, t * length + at)), "t")
            stored = self.frame.store_room(room, get(total), start + as_i64(at))
            return seq([cleared(total), add, stored])

        count = quotient(length - self.thread + (m.threads - 1), m.threads)
        return seq([self.tile.each(self.span, one), sync(), counted(count, column, "share")])
