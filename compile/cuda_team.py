"""Slices longer than a block holds: a team of blocks holds one on the chip, in one launch.

1. As many blocks are launched as the device has room for at a time, all resident from the first to
   the last (a cooperative launch). B of them are a team, whose teams share the slices out; B is
   what the host finds best for the device at hand (in cuda_team.c), 0 for none.
2. A block loads its chunk of a slice once, keeps it in shared memory in its own type, and adds its
   sums up on the way. Where those are centred, it centres on the mean of its chunk, from what it
   keeps (the formula is that of `cuda_split`).
3. The blocks of a team tell each other their parts of the sums: words of 64 bits in device memory,
   a float32 and the number of the round, which are written and read as a whole. A word is waited
   for until it shows the round, so that no barrier, no fence and no atomic is needed. Every block
   adds the parts up for itself in one order: results are the same from run to run.
4. The next traversal, and the outputs, come from shared memory. A team takes the same columns of
   all its slices, so that sums across them (layer norm's parameters) stay in shared memory too.

Words are used again two rounds later. A block writes the word of round r + 2 after it has seen all
of the team's of r + 1, which were written when round r had been read. The words are cleared by a
launch before: memory of a workspace may hold anything.

Roofline. A, the bytes of one array; B, the bandwidth of device memory; e, the part of the blocks
that has work, as teams divide neither the blocks nor the slices; L, of the launch that clears (1
us); w, of an exchange (1.5 us: a store to and a load from L2, reductions within the block).

    forward   2 A / (B e) + L + n w      backward   3 A / (B e) + L + n w

n is between 1 and the rounds: two blocks stand on a multiprocessor, and while one waits for its
team the other, of another team, loads or stores: 100 KB at 1/132 of 4.3 TB/s are 3 us. If all wait
at a time, every exchange counts. Bytes in flight: 40 KB a block. Shared memory sees 3 (forward) and
6 (backward) bytes for 2 and 3 of device memory; sums of columns add 16 an element to each of these.

By this model, as shares of the copy bandwidth on an H200 (132 x 2 blocks of 109 KB, float32):

                          blocks a team   rounds    e              share
    BN 32,128,56,56           4,  8        2,  4    0.97, 0.97     83-88 %, 82-91 %
    BN 2,32,512,512          24, 66        3,  8    0.97, 1.00     83-90 %, 78-95 %
    BN 256,64,56,56          33, 66        8, 16    1.00, 1.00     88-97 %, 85-98 %
    IN 2,32,512,512          12, 20        3,  5    0.97, 0.97     83-90 %, 82-92 %
    GN 4,128,512,512 by 32   44, 88       22, 43    0.97, 0.99     86-96 %, 85-99 %
    LN 256,262144            10, 44       10, 43    0.97, 0.99     86-95 %, 74-98 %
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_chunk import ROW, ChunkTile, Cut
from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_gather import Centring, Parts, Stage, gather, stages
from normgraph.compile.cuda_geometry import Geometry, Mapping, Span
from normgraph.compile.cuda_kernel import (
    WARP,
    as_i32,
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
    over_block,
    put,
    quotient,
    registers,
    shared,
    sync,
)
from normgraph.compile.cuda_settle import Settler, is_row_sum
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.shifted_sums import Match
from normgraph.compile.slice_plan import Step
from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import Expr, Stmt, bind, i64, seq, times, when

THREADS = 256
# Blocks a multiprocessor has registers for, 128 a thread; how many of these hold elements and the
# parameters along them.
_RESIDENT = 2
_HELD = 40
# Blocks of a team at most, as `team_blocks` has it, for each of which a block has room; and the
# bytes of shared memory that are not the chunk's, beside that room.
_MOST = 256
_OTHER = 1024


class TeamSlices:
    """Emits the kernels of one vector width; `found` are the sums centred on the mean.

    Raises NotCanonical where the graph reads a slice only once or has sums of other kinds.
    """

    def __init__(
        self, frame: CudaFrame, geometry: Geometry, vector: int, found: Match | None
    ) -> None:
        self.frame = frame
        self.geometry = geometry
        self.plan = geometry.plan
        wide = [s for p in self.plan.passes for s in p.wide]
        slices = frozenset(self.plan.slice_axes)
        self.column_steps = self.plan.column_sums
        self.columns = [s.op.out for s in self.column_steps]
        if self.columns and (geometry.row_axes or any(t.axes & slices for t in self.columns)):
            raise NotCanonical("sums across slices of several rows")
        if frame.dtype != "float32":
            raise NotCanonical("words of an exchange hold float32")
        self.first, self.stages = stages(self.plan.passes, set(self.columns), found)
        if sum(bool(s.sums or s.outputs) for s in self.stages) < 2:
            raise NotCanonical("a slice is read once in any case")
        self.exchanged = [s for s in self.stages if s.parts]
        every = frozenset(self.plan.wide_axes)
        inputs = [t for t in self.plan.program.inputs if t.axes == every]
        self.read = vector * sum(item_size(t.dtype) for t in inputs)
        self.bytes = self.read + vector * len(self.columns) * item_size(frame.dtype)
        words = max(item_size(t.dtype) for t in inputs) * vector * len(inputs) // 4
        count = min((_HELD - geometry.along(vector)) // max(words, 1), 16)
        self.mapping = Mapping(
            vector, count, THREADS, i32(THREADS.bit_length() - 1), i32(0), i32(0), False
        )
        self.cut = Cut(geometry, vector, THREADS, any(is_row_sum(self.plan, s) for s in wide))
        self.room = max((s.parts for s in self.exchanged), default=0) * _MOST
        self.teams: Expr = i64(1)
        self.words: Any = None
        self.launched: Expr = i64(0)
        self.partials: dict[Tensor, tuple[Room, Expr]] = {}
        self.tile()

    def tile(self) -> ChunkTile:
        """What a block does with its chunks."""
        return ChunkTile(self.frame, self.geometry, self.mapping, self.cut, self.columns)

    def team(self, stmts: list[Stmt]) -> Expr:
        """The blocks of a team, asked on the host; 0 where slices are better done otherwise."""
        self.cut.measure(stmts)
        rows = self.geometry.rows if self.cut.by_rows else i64(1)
        blocks = tirx.call_extern(
            "int64",
            "normgraph_team_blocks",
            self.geometry.slices,
            rows,
            self.cut.row if self.cut.by_rows else self.cut.slice,
            i64(self.read),
            i64(self.bytes),
            i64(THREADS),
            i64(_RESIDENT),
            i64(4 * self.room + _OTHER),
        )
        wanted = bind("team_wanted", blocks, stmts)
        if self.geometry.row_axes and not self.cut.by_rows:
            wanted = tirx.Select(tirx.LT(self.cut.row, i64(ROW)), wanted, i64(0))
        return on_host("wanted", wanted, stmts)

    def prepare(self, wanted: Expr, stmts: list[Stmt]) -> None:
        """What the host computes in front of the allocation, for `wanted` blocks a team or less."""
        self.cut.cut(wanted, stmts)
        resident = tirx.call_extern(
            "int64", "normgraph_resident_blocks", i64(THREADS), i64(_RESIDENT)
        )
        resident = bind("resident", resident, stmts)
        teams = tirx.Min(tirx.Div(resident, self.cut.blocks), self.geometry.slices)
        self.teams = on_host("teams", teams, stmts)
        size = on_host("words_size", times(self.teams, self._team_words()), stmts)
        self.words = tirx.decl_buffer((size,), "int64", "words", scope="global")
        self.launched = on_host("blocks", times(self.teams, self.cut.blocks), stmts)
        for tensor in self.columns:
            room = self.frame.room("team_columns", times(self.teams, self.geometry.length))
            self.partials[tensor] = room, self.teams

    def emit(self) -> Stmt:
        """The launches."""
        size = self.words.shape[0]
        clear = kernel(ceildiv(size, i64(THREADS)), THREADS, partial(self._clear, size))
        work = kernel(self.launched, THREADS, self._body, _RESIDENT)
        return seq([tirx.AllocBuffer(self.words), clear, work])

    def _team_words(self) -> Expr:
        """Words of a team: two rounds of each exchange, a word a block and a number of it."""
        numbers = sum(stage.parts for stage in self.exchanged)
        return times(i64(2 * numbers), self.cut.blocks)

    def _clear(self, size: Expr, block: Expr, thread: Expr) -> Stmt:
        at = as_i64(block) * i64(THREADS) + as_i64(thread)
        return when(tirx.LT(at, size), tirx.BufferStore(self.words, i64(0), [at]))

    def _body(self, block: Expr, thread: Expr) -> Stmt:
        stmts: list[Stmt] = []
        member = _Member(self, block, thread, stmts)
        slices, teams = as_i32(self.geometry.slices), as_i32(self.teams)
        count = quotient(slices - member.team + teams - 1, teams)
        stmts.append(counted(count, member.round, "round"))
        stmts += [member.put_columns(step) for step in self.column_steps]
        return seq(stmts)


class _Member:
    """What one block of a team does."""

    def __init__(self, work: TeamSlices, block: Expr, thread: Expr, stmts: list[Stmt]) -> None:
        self.work = work
        self.frame = work.frame
        self.thread = thread
        self.lane = tirx.BitwiseAnd(thread, i32(WARP - 1))
        self.tile = work.tile()
        self.tile.rewrite = self.frame.kernel_scalars(stmts)
        self.blocks = as_i32(work.cut.blocks)
        self.team = named_index("team", quotient(block, self.blocks), stmts)
        self.part = named_index("part", block - self.team * self.blocks, stmts)
        self.tile.open(thread, stmts)
        self.tile.take_part(self.part, stmts)
        self.parts_here = shared(work.room, self.frame.dtype, "team_parts")
        stmts.append(tirx.AllocBuffer(self.parts_here))
        self.number: Expr = i32(0)
        self.settler: Settler
        self.kept = False

    def round(self, number: Expr) -> Stmt:
        """One slice."""
        work, stmts = self.work, list[Stmt]()
        self.number, self.kept = number, False
        index = as_i64(self.team) + as_i64(number) * work.teams
        self.tile.at_slice(named_index("slice_index", index, stmts), None, stmts)
        self.settler = Settler(self.tile, self.lane, i32(WARP), self._row_value)
        self.settler.read_inputs(stmts)
        self.settler.settle(work.first, stmts)
        for stage in work.stages:
            values = self._traverse(stage, stmts)
            if values:
                self._exchange(stage, values, stmts)
                gather(stage, self._parts(), self.settler, self.frame, stmts)
                self._keep_rows(stage, stmts)
            self.settler.settle(stage.after, stmts)
        kept = self.settler.keep([*work.plan.per_slice])
        if kept:
            leads = tirx.And(tirx.EQ(self.part, i32(0)), tirx.EQ(self.thread, i32(0)))
            stmts.append(when(leads, seq(kept)))
        return seq(stmts)

    # Traversals.

    def _traverse(self, stage: Stage, stmts: list[Stmt]) -> list[Expr]:
        """Go through the chunk; the block's parts of the sums."""
        if stage.centred is not None:
            return self._centred(stage.centred, stmts)
        values = self._sums(stage.sums, stmts) if stage.sums else []
        columns = self.work.column_steps if stage is self.work.stages[-1] else []
        if stage.outputs or columns:
            needs = {self.frame.output_of(s) for s in stage.outputs}
            wanted = self.frame.any_of(needs.union(*(s.needs for s in columns)))

            def write(span: Span) -> Stmt:
                ready = self._at_hand(span, [*stage.outputs, *columns])
                add = self.tile.add_columns(span, columns, self.number) if columns else None
                return seq([ready, self.tile.outputs(span, stage.outputs), add])

            stmts.append(when(wanted, self.tile.each_tile(write)))
        return values

    def _at_hand(self, span: Span, steps: list[Step]) -> Stmt:
        """A tile in registers: from memory the first time, with all that later traversals read."""
        if self.kept:
            return self.tile.find(span, steps)
        self.kept = True
        every = [s for p in self.work.plan.passes for s in p.wide]
        return self.tile.bring(span, every)

    def _sums(self, steps: list[Step], stmts: list[Stmt]) -> list[Expr]:
        totals = {s.op.out: registers(1, s.op.out.dtype, f"{s.op.out.name}_part") for s in steps}
        stmts += [cleared(buffer) for buffer in totals.values()]

        def add(span: Span) -> Stmt:
            grown = self.tile.each(span, partial(self.tile.add_up, steps, totals))
            return seq([self._at_hand(span, steps), grown])

        stmts.append(self.tile.each_tile(add))
        over_block([*totals.values()], self.thread, THREADS, stmts)
        return [get(buffer) for buffer in totals.values()]

    def _centred(self, found: Match, stmts: list[Stmt]) -> list[Expr]:
        around = Centring(found)
        totals = self._sums(around.samples, stmts)
        count = tirx.Var("sampled", self.frame.dtype)
        stmts.append(tirx.Bind(count, self._elements(self.part)))
        around.take([total / count for total in totals], self.settler, stmts)
        return [self.tile.values[around.shift], *self._sums(around.sums, stmts)]

    # What the team's blocks tell each other.

    def _exchange(self, stage: Stage, values: list[Expr], stmts: list[Stmt]) -> None:
        work = self.work
        before = sum(s.parts for s in work.exchanged[: work.exchanged.index(stage)])
        numbers = sum(s.parts for s in work.exchanged)
        half = tirx.BitwiseAnd(self.number, i32(1)) * numbers + before
        first = self.team * (2 * numbers) + half
        place = named_index("words_at", first * self.blocks, stmts)
        turn = self.number + 1

        def post(k: int, value: Expr) -> Stmt:
            at = place + self.blocks * k + self.part
            return tirx.Evaluate(
                tirx.call_extern("int32", "normgraph_post", work.words.data, at, value, turn)
            )

        posts = [post(k, value) for k, value in enumerate(values)]
        stmts.append(when(tirx.EQ(self.thread, i32(0)), seq(posts)))

        def wait(k: Expr) -> Stmt:
            inner: list[Stmt] = []
            mine = named_index("word", self.thread + k * THREADS, inner)
            value = tirx.call_extern(
                "float32", "normgraph_await", work.words.data, place + mine, turn
            )
            return seq([*inner, put(self.parts_here, value, mine)])

        count = self.blocks * len(values)
        share = quotient(count - self.thread + (THREADS - 1), THREADS)
        stmts += [counted(share, wait, "share"), sync()]

    def _parts(self) -> Parts:
        """How the parts of the slice's sums are read, after an exchange."""

        def part(stage: Stage, number: int, p: Expr) -> Expr:
            del stage
            return get(self.parts_here, self.blocks * number + p)

        def each(body: Any) -> Stmt:
            count = quotient(self.blocks - self.lane + (WARP - 1), WARP)
            return counted(count, lambda k: body(self.lane + k * WARP), "share")

        return Parts(part, each, butterfly, self._elements)

    def _elements(self, part: Expr) -> Expr:
        """How many elements chunk `part` has, in the sums' type."""
        _, first = self.work.cut.first(part)
        count = self.work.cut.size(first) * self.work.mapping.vector
        return tirx.Cast(self.frame.dtype, count)

    # Sums of rows, each of some of the team's blocks, and of columns.

    def _row_value(self, tensor: Tensor, row: Expr, stmts: list[Stmt]) -> Expr:
        """The sum of one row, from the parts of the exchange that was last."""
        stage = next(s for s in self.work.exchanged for t in s.sums if t.op.out is tensor)
        first = self.blocks * [s.op.out for s in stage.sums].index(tensor)
        total = registers(1, tensor.dtype, f"{tensor.name}_of_row")
        parts = as_i32(self.work.cut.parts)

        def one(k: Expr) -> Stmt:
            return grow(total, get(self.parts_here, first + row * parts + k))

        stmts += [cleared(total), counted(parts, one, "p")]
        return get(total)

    def _keep_rows(self, stage: Stage, stmts: list[Stmt]) -> None:
        rows = [s.op.out for s in stage.sums if is_row_sum(self.work.plan, s)]
        if not rows:
            return

        def row(index: Expr, inner: list[Stmt]) -> None:
            for tensor in rows:
                value = self._row_value(tensor, index, inner)
                inner.append(self.settler.store(tensor, value, index))

        leads = tirx.And(tirx.EQ(self.part, i32(0)), tirx.LT(self.thread, i32(WARP)))
        stmts.append(when(leads, self.settler.each_row(row)))

    def put_columns(self, step: Step) -> Stmt:
        """Store the team's part of a sum across slices."""
        self.tile.base = i64(0)  # that of no slice
        room, _ = self.work.partials[step.op.out]
        start = as_i64(self.team) * self.work.geometry.length

        def put_one(column: Expr, value: Expr) -> Stmt:
            return self.frame.store_room(room, value, start + column)

        return when(self.frame.any_of(step.needs), self.tile.each_column(step.op.out, put_one))
