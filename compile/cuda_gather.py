"""Adding up what the blocks of a traversal stored, for the values that follow from the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tvm import tirx

from normgraph.compile.cuda_frame import CudaFrame, Room
from normgraph.compile.cuda_kernel import (
    cleared,
    finite_or_zero,
    get,
    grow,
    put,
    registers,
)
from normgraph.compile.cuda_settle import Settler
from normgraph.compile.half_types import HALF_TYPES
from normgraph.compile.shifted_sums import Match
from normgraph.compile.slice_plan import Pass, Step
from normgraph.compile.tensor_program import Apply, Load, Node, Operation, Tensor, loads
from normgraph.compile.tir import Expr, Stmt, seq, when, zero


@dataclass
class Stage:
    """One traversal: its sums (each with its number among the parts stored), its outputs."""

    sums: list[Step] = field(default_factory=list)
    outputs: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    centred: Match | None = None
    room: Room | None = None

    @property
    def parts(self) -> int:
        """Numbers stored for each chunk."""
        return 3 if self.centred is not None else len(self.sums)


def stages(
    passes: Sequence[Pass], columns: set[Tensor], found: Match | None
) -> tuple[list[Step], list[Stage]]:
    """What needs no traversal, and the traversals; the last one stores what is kept.

    columns: sums across slices, which are left out.
    """
    first: list[Step] = []
    made: list[Stage] = []
    k = 0
    while k < len(passes):
        work = passes[k]
        if found is not None and k == found.index:
            rest = [s for s in work.after if s is not found.mean]
            after = [*rest, *passes[k + 1].after]
            made.append(Stage([found.centred], [], after, centred=found))
            k += 2
            continue
        sums = [s for s in work.wide if s.is_sum and s.op.out not in columns]
        outputs = [s for s in work.wide if not s.is_sum]
        if sums or outputs:
            made.append(Stage(sums, outputs, list(work.after)))
        elif made:
            made[-1].after.extend(work.after)
        else:
            first.extend(work.after)
        k += 1
    if not made or made[-1].sums:
        made.append(Stage())
    return first, made


class Centring:
    """The sums of a traversal that centres on a number near the mean.

    samples: what is added up of a part of the elements, for `shift`: sum(x), and for half types
    sum(|x|). sums: sum(x - shift) and sum((x - shift)^2).
    """

    def __init__(self, found: Match) -> None:
        out, x = found.total.op.out, found.total.value
        needs = found.total.needs | found.centred.needs | found.squares.needs

        def step(name: str, value: Node) -> Step:
            return Step(Operation(Tensor(name, out.dtype, out.dims), value), value, needs)

        self.shift = Tensor("shift", out.dtype, out.dims)
        around = Apply(tirx.Sub, (x, Load(self.shift)))
        self.dtype = next(iter(loads(x))).dtype
        self.samples = [step("sample", x)]
        if self.dtype in HALF_TYPES:
            self.samples.append(step("sample_sizes", Apply(tirx.abs, (x,))))
        self.sums = [step("near", around), step("squares", Apply(tirx.Mul, (around, around)))]

    def take(self, means: Sequence[Expr], settler: Settler, stmts: list[Stmt]) -> None:
        """Centre on what follows from `samples`, divided by the number of elements."""
        settler.take(self.shift, self.near_mean(means, stmts), stmts)

    def near_mean(self, means: Sequence[Expr], stmts: list[Stmt]) -> Expr:
        """What to centre on, given the means of `samples`.

        For half types x - shift has to be exact: else all elements of a binade would be off by the
        same, and the mean with them. So it is rounded to their type, and 0 where it is at most half
        of the mean of |x|: the first digits of x and the last of a smaller number would be too far
        apart. As it is, they are so only for elements beyond 2^11 times the shift, which have a
        part of 2^-24 of the sum of |x| at most to lose.
        """
        shift = finite_or_zero(means[0])
        if self.dtype not in HALF_TYPES:
            return shift
        rounded = registers(1, self.dtype, "rounded_shift")
        small = tirx.LE(tirx.abs(shift) * tirx.FloatImm("float32", 2.0), means[1])
        stmts += [tirx.AllocBuffer(rounded), put(rounded, tirx.Cast(self.dtype, shift))]
        widened = tirx.Cast(self.shift.dtype, get(rounded))
        return tirx.Select(small, zero(self.shift.dtype), widened)


@dataclass
class Parts:
    """How a kernel reads what a traversal stored.

    part(stage, number, p): the number-th value of chunk p. each(body): this thread's share of the
    chunks. combine(buffers): add the threads' shares up, for all of them. elements(p): the elements
    behind chunk p.
    """

    part: Callable[[Stage, int, Expr], Expr]
    each: Callable[[Callable[[Expr], Stmt]], Stmt]
    combine: Callable[[list[Any]], Stmt]
    elements: Callable[[Expr], Expr]


def gather(
    stage: Stage, parts: Parts, settler: Settler, frame: CudaFrame, stmts: list[Stmt]
) -> None:
    """Take the per-slice sums of a traversal."""
    if stage.centred is not None:
        _gather_centred(stage, stage.centred, parts, settler, stmts)
        return
    for number, step in enumerate(stage.sums):
        if step.op.out not in settler.plan.per_slice:
            continue
        total = registers(1, step.op.out.dtype, f"{step.op.out.name}_sum")
        stmts.append(cleared(total))
        add = parts.each(partial(_add, parts, total, stage, number))
        stmts += [when(frame.any_of(step.needs), add), parts.combine([total])]
        settler.take(step.op.out, get(total), stmts)


def _add(parts: Parts, total: Any, stage: Stage, number: int, part: Expr) -> Stmt:
    return grow(total, parts.part(stage, number, part))


def _gather_centred(
    stage: Stage, found: Match, parts: Parts, settler: Settler, stmts: list[Stmt]
) -> None:
    dtype = found.total.op.out.dtype
    divisor = found.mean.value.args[1]  # type: ignore[union-attr]
    count = settler.tile.value(divisor, lambda t: settler.tile.values[t])
    total = registers(1, dtype, "total")

    def of_chunk(p: Expr) -> Stmt:
        return grow(total, parts.elements(p) * parts.part(stage, 0, p) + parts.part(stage, 1, p))

    # Not as a distance from one of the shifts: far from a mean near 0, it would cost its digits.
    stmts += [cleared(total), parts.each(of_chunk), parts.combine([total])]
    settler.take(found.mean.op.out, get(total) / count, stmts)
    mean = settler.tile.values[found.mean.op.out]
    near, square = registers(1, dtype, "near"), registers(1, dtype, "square")

    def from_mean(p: Expr) -> Stmt:
        away, residue = tirx.Var("away", dtype), tirx.Var("residue", dtype)
        moved = tirx.Var("moved", dtype)
        return seq(
            [
                tirx.Bind(away, mean - parts.part(stage, 0, p)),
                tirx.Bind(residue, parts.part(stage, 1, p)),
                tirx.Bind(moved, parts.elements(p) * away),
                grow(near, residue - moved),
                grow(square, parts.part(stage, 2, p) - away * (residue + residue - moved)),
            ]
        )

    stmts += [cleared(near), cleared(square), parts.each(from_mean), parts.combine([near, square])]
    settler.take(found.centred.op.out, get(near), stmts)
    settler.take(found.squares.op.out, get(square), stmts)
