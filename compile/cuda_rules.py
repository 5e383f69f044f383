"""The CUDA schedule rule for normalization: a slice is read once where a block can hold it.

Pattern. As the CPU's rule (`slice_rule`): a function that `tensor_program` can read and
`slice_plan` can order. The arithmetic is the graph's; this rule decides who computes what, where.

Strategy. The host part of the function looks at the sizes and takes the first kernel that fits.
 1. A slice is `rows` rows of `length` contiguous elements (`cuda_geometry`): one row (layer, rms,
    instance norm), planes (group norm), samples of a channel (batch norm).
 2. Tiny slices: parts of a warp, 1 to 32 threads a slice, 256 threads a block; sums by shuffles.
 3. Slices up to 32 K elements (16 K with two inputs): a block a slice, 128 to 1024 threads with up
    to 8 vectors of each input a thread, all loaded before one is used (`cuda_held`). Everything
    is computed from the registers, the mean first and then what is centred on it.
 4. Longer slices of tensors that L2 does not hold: a team of blocks a slice, which stays on the
    chip, in one launch (`cuda_team`). The host asks the device how many blocks it has room for.
    Where L2 holds the tensors, or no team a slice, or the device launches no grid as a whole:
    several blocks a slice, a kernel a traversal (`cuda_split`). A mean and the sums centred on it
    take one, by the formula of `shifted_sums`; the next goes backwards through what L2 still holds.
 5. Sums across slices. Of whole-size values (gamma's and beta's gradients in layer norm): blocks go
    through many slices with the sums of their columns in registers and store one part each. Of
    per-slice values (instance and group norm): through the workspace. `cuda_finish` adds both up.
    All orders are fixed and nothing is atomic, so that results are the same from run to run.
 6. Slices that are columns (batch norm of a matrix, channels last): `cuda_columns`.
 7. Accesses are of 16 bytes where all rows and pointers are aligned to that, which the host part
    finds out; else of one element. A known length that is a smaller multiple takes smaller vectors.
 8. Each output has a request of two bits, the same for all threads: what is not asked for is
    neither loaded for, added up nor stored, and what is asked for in addition is added.
 9. Registers are for elements: half types are held as they came, and what a pass needs of places
    and conversions it makes again (`Tile.fresh`).

Roofline. A, the bytes of one array; B, the bandwidth of device memory; L, that of a launch (about
1 us on the device behind another kernel); everything is bound by bytes.

    held     forward   2 A / B             backward  3 A / B
    team     forward   2 A / B + 2 L       backward  3 A / B + 2 L, and the ends (see `cuda_team`)
    split    forward   (3 - h) A / B + L   backward  (5 - 2 h) A / B + L
             h, the part of a traversal's arrays that the next finds in L2: near 1 below 40 MB
    columns  as split, and one small kernel more for the columns' values
    finish   parts of at most 660 blocks from L2: 1 to 3 us

Bytes in flight decide how near a kernel comes. Little's law asks some 40 KB a multiprocessor (4.8
TB/s, 132 of them, 1 us). Threads hold 64 to 128 bytes of each input: at 40 to 72 registers a
multiprocessor keeps 900 to 1500 threads, 60 to 130 KB, of which a third to a half is in flight
while other blocks add up or store. Blocks of 1024 threads stand alone on a multiprocessor with long
slices of two inputs: their phases do not overlap, and 60 to 75 % is what to expect there.

Rejected. Schedule primitives (see `slice_rule`); stock GPU rules assert on these graphs. Holding
slices that fit a block in shared memory: every element once more through it, where registers do.
Atomic sums: their order changes from run to run. E[x^2] - E[x]^2: wrong at large means. Grid
barriers: the blocks of a team tell each other their sums in one store and one load (`cuda_team`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tvm import tirx

from normgraph.compile import coefficients, shifted_sums
from normgraph.compile.blocks import NotCanonical
from normgraph.compile.cuda_columns import ColumnSlices, ColumnSums
from normgraph.compile.cuda_finish import finish
from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_geometry import Geometry, Mapping, geometry, mapping
from normgraph.compile.cuda_held import HeldSlices
from normgraph.compile.cuda_kernel import REGISTERS, VECTOR_BYTES, ceildiv, in_reach
from normgraph.compile.cuda_settle import is_row_sum
from normgraph.compile.cuda_split import SplitSlices
from normgraph.compile.cuda_team import TeamSlices
from normgraph.compile.kernel_frame import item_size
from normgraph.compile.slice_plan import SlicePlan, plan
from normgraph.compile.targets import Target
from normgraph.compile.tensor_program import Tensor, loads, read
from normgraph.compile.tir import Expr, Stmt, constant, i64, product, seq, when

NAME = "cuda-slices"

# Registers of a thread that may hold its elements, by the threads of its block; and vectors at
# most; the last ones for single elements. Teams within a warp stand in blocks of 256.
_BUDGETS = ((128, 64, 4), (256, 64, 4), (512, 72, 4), (1024, 34, 8))
_SINGLES = ((256, 64, 8), (1024, 34, 8))
_WARPS = (256, 64)
# Registers of a thread beside the elements it holds.
_OTHER_REGISTERS = 48
# Threads that leave one another 64 registers; sums of rows take more than half.
_ALONE = 1024
# Elements of each input a thread holds at most: of half types more would fit, but not their sums.
_ELEMENTS = 32


def apply(func: Any, outputs: Sequence[str], target: Target) -> Any | None:
    """The scheduled function, or None where the pattern is not this rule's own.

    func: the fused PrimFunc of a graph. outputs: their names, for messages.
    The result takes the function's tensors and then the requests as one int64.
    """
    del target
    try:
        slice_plan = plan(read(func))
        found = shifted_sums.match(slice_plan)
        coefficients.settle(slice_plan)
        return _Emitter(slice_plan, outputs, found).emit()
    except NotCanonical:
        return None


class _Emitter:
    def __init__(
        self, slice_plan: SlicePlan, outputs: Sequence[str], found: shifted_sums.Match | None
    ) -> None:
        self.plan = slice_plan
        self.program = slice_plan.program
        self.found = found
        self.frame = CudaFrame(slice_plan, outputs)
        every = frozenset(slice_plan.wide_axes)
        self.inputs = [t for t in self.program.inputs if t.axes == every]
        self.outputs = [t for t in self.program.outputs if t.axes == every]
        if not self.inputs:
            raise NotCanonical("no input has all elements")
        sizes = {item_size(t.dtype) for t in (*self.inputs, *self.outputs)}
        self.widest = VECTOR_BYTES // max(sizes)
        self.narrowest = VECTOR_BYTES // min(sizes)

    def emit(self) -> Any:
        opening = self.frame.open()
        across = bool(self.plan.lead_axes) and not self.plan.inner_axes
        body = self._columns(opening) if across else self._slices(opening)
        return self.frame.close(seq([*opening, body]))

    # Slices that are columns.

    def _columns(self, opening: list[Stmt]) -> Stmt:
        length = self._size(self.plan.slice_axes)
        opening += self._in_reach(self._size(self.plan.lead_axes), length)
        return self._first_that_fits(
            [(self._is_aligned(v, length), self._column_work(v)) for v in self._widths(length)]
        )

    def _column_work(self, width: int) -> Stmt:
        self.frame.start_workspace()
        work = ColumnSlices(self.frame, width, self.found)
        self.frame.keep_stored(work.stored())
        host: list[Stmt] = []
        work.prepare(host)
        body = work.emit()
        return seq([*host, *self.frame.allocation(), body])

    def _size(self, axes: Iterable[int]) -> Expr:
        return product([self.program.extents[axis] for axis in axes])

    def _in_reach(self, rows: Expr, length: Expr) -> list[Stmt]:
        """Checks of what kernels count in 32 bits, in front of all allocations."""
        checks = in_reach(rows, "rows in a slice")
        width, *_ = self._widths(length)
        aligned = self._is_aligned(width, length)
        vectors = length
        if aligned is not None and in_reach(length, ""):
            vectors = tirx.Select(aligned, ceildiv(length, i64(width)), length)
        of = f"vectors of {width} elements, 1 where unaligned," if width > 1 else "elements"
        checks += in_reach(vectors, f"{of} in a row")
        columns = {step.op.out for step in self.plan.column_sums}
        for tensor, step in self.plan.finish_sums.items():
            if tensor not in columns:
                checks += in_reach(self._size(step.op.reduce), "slices in a sum")
        return checks

    # Slices of contiguous rows.

    def _slices(self, opening: list[Stmt]) -> Stmt:
        where = geometry(self.plan, opening)
        opening += self._in_reach(where.rows, where.length)
        ends: Stmt | None = None
        if not self.plan.column_sums:
            self.frame.keep_stored(self._stored())
            opening += self.frame.allocation()
            ends = finish(self.frame, {})
        choices: list[tuple[Expr | None, Stmt]] = []
        for width in self._widths(where.length):
            if any(s.is_sum for p in self.plan.passes for s in p.wide):
                choices += self._held(where, width, opening)
        if not choices or choices[-1][0] is not None:
            widest, *_, single = [*self._widths(where.length), 1]
            for width in dict.fromkeys((widest, single)):
                aligned = self._is_aligned(width, where.length)
                choices.append((aligned, self._long(where, width)))
        return seq([self._first_that_fits(choices), ends])

    def _stored(self) -> list[Tensor]:
        """Tensors that kernels after the last traversal read."""
        stored = list(self.plan.stored)
        for step in self.plan.column_sums:
            stored += [t for t in loads(step.value) if t in self.plan.per_slice]
        return list(dict.fromkeys(stored))

    def _widths(self, length: Expr) -> list[int]:
        """Vector widths worth a kernel: the widest that a known length allows, and single."""
        known = constant(length)
        width = self.widest
        if known is not None:
            while known % width:
                width //= 2
            return [width, 1] if width > 1 else [1]
        # Planes of 14 x 14 are whole vectors of 8 bytes.
        return [width, 4, 1] if width > 4 else [width, 1]

    def _is_aligned(self, width: int, length: Expr) -> Expr | None:
        """Whether all rows begin at a multiple of `width` elements; None for certain."""
        if width == 1:
            return None
        # A parameter along the rows is read in vectors too.
        last = max(self.plan.wide_axes)
        along = [t for t in self.program.inputs if last in t.axes and t not in self.inputs]
        aligned = self.frame.aligned([*self.inputs, *along, *self.outputs])
        assert aligned is not None
        if constant(length) is not None:
            return aligned
        whole = tirx.EQ(tirx.BitwiseAnd(length, i64(width - 1)), i64(0))
        return tirx.And(whole, aligned)

    def _first_that_fits(self, choices: list[tuple[Expr | None, Stmt]]) -> Stmt:
        *others, last = choices
        body = when(last[0], last[1])
        for condition, work in reversed(others):
            body = work if condition is None else tirx.IfThenElse(condition, work, body)
        return body

    def _words(self) -> float:
        """Registers a thread needs for one element of a slice."""
        words = sum(item_size(t.dtype) for t in self.inputs) / 4
        return words + sum(item_size(s.op.out.dtype) for s in self.plan.column_sums) / 4

    def _held(
        self, where: Geometry, width: int, opening: list[Stmt]
    ) -> list[tuple[Expr | None, Stmt]]:
        """Kernels that hold a slice, the smallest first."""
        made: list[tuple[Expr | None, Stmt]] = []
        rows = where.rows if where.row_axes else None
        shapes = _BUDGETS if width > 1 else _SINGLES
        if 1 < width < self.widest and constant(where.length) is None:
            shapes = _BUDGETS[1::2]
        smallest = (*_WARPS, shapes[0][2])
        tried: list[tuple[int, int, bool]] = []
        rows_apart = any(is_row_sum(self.plan, s) for p in self.plan.passes for s in p.wide)
        for (threads, budget, most), small in ((smallest, True), *((s, False) for s in shapes)):
            if rows_apart and threads == _ALONE:
                budget //= 2 if width > 1 else 4
            count = min(int(budget / (width * self._words())), most, _ELEMENTS // width)
            if count:
                count = 1 << (count.bit_length() - 1)
                if small or tried[-1][2] or threads * count > tried[-1][0] * tried[-1][1]:
                    tried.append((threads, count, small))
        aligned = self._is_aligned(width, where.length)
        length = constant(where.length)
        for threads, count, warps in tried:
            needed = -(-length // (width * threads)) if rows is None and length else count
            found, fits = mapping(
                rows,
                where.length,
                opening,
                vector=width,
                registers=count if warps else min(count, needed),
                threads=threads,
                warps=warps,
            )
            known = constant(fits)
            if known == 0:
                continue
            condition = fits if known is None else None
            if aligned is not None:
                condition = aligned if condition is None else tirx.And(aligned, condition)
            made.append((condition, self._held_work(where, found, count)))
            if known:
                break
        return made

    def _held_work(self, where: Geometry, found: Mapping, count: int) -> Stmt:
        self.frame.start_workspace()
        host: list[Stmt] = []
        words = int(count * found.vector * self._words()) + _OTHER_REGISTERS
        resident = max(REGISTERS // (found.threads * words), 1)
        work = HeldSlices(self.frame, where, found, resident)
        launch = work.emit(host)
        return seq([*host, *self.frame.allocation(), launch, self._ends(work.partials)])

    def _long(self, where: Geometry, width: int) -> Stmt:
        """Kernels for slices that no block holds."""
        split = self._split(where, width)
        try:
            work = TeamSlices(self.frame, where, width, self.found)
        except NotCanonical:
            return split
        self.frame.start_workspace()
        if self.plan.column_sums:
            self.frame.keep_stored(self._stored())
        asked: list[Stmt] = []
        before: list[Stmt] = []
        blocks = work.team(asked)
        work.prepare(blocks, before)
        # The driver may know of less room than the host; then the launch has done nothing.
        launched = tirx.EQ(tirx.call_extern("int64", "normgraph_teams_refused"), i64(0))
        ends = self._ends(work.partials)
        launches = [work.emit(), None if ends is None else when(launched, ends)]
        team = seq([*before, *self.frame.allocation(), *launches])
        wanted = tirx.GT(blocks, i64(0))
        done = tirx.And(wanted, launched)
        return seq([*asked, when(wanted, team), when(tirx.Not(done), split)])

    def _split(self, where: Geometry, width: int) -> Stmt:
        self.frame.start_workspace()
        before: list[Stmt] = []
        partials: dict[Tensor, tuple[Room, Expr]] = {}
        sums: Stmt | None = None
        if self.plan.column_sums:
            self.frame.keep_stored(self._stored())
        work = SplitSlices(self.frame, where, width, self.found)
        work.prepare(before)
        if self.plan.column_sums:
            columns = ColumnSums(self.frame, where, width)
            columns.prepare(before)
            sums, partials = columns.emit(), columns.rooms
        launches = [work.emit(), sums, self._ends(partials)]
        return seq([*before, *self.frame.allocation(), *launches])

    def _ends(self, partials: dict[Tensor, tuple[Room, Expr]]) -> Stmt | None:
        """The finish where it belongs to the kernels at hand."""
        return finish(self.frame, partials) if self.plan.column_sums else None
