"""Centred sums in one traversal less.

The graph takes the mean first and then, around it, sum(x - mean) and sum((x - mean)^2): two
traversals. Any number s near the mean serves as well to centre on, for with d = mean - s

    mean              = s + sum(x - s)/m
    sum(x - mean)     = sum(x - s) - m d
    sum((x - mean)^2) = sum((x - s)^2) - d (sum(x - s) + sum(x - mean))

exactly (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", section 3).
s is the mean of a sample: of each row the first 1/16, or at least a vector, or, where slices are
read in columns, of 1/16 of the rows; and 0 where that is not finite, so that the mean of data with
infinities is that of the plain sum. For half types it is rounded to theirs, or 0 where the sample
lies around that, which makes x - s exact: else all elements of a binade would be off by the same,
and the mean with them.

The last line cancels where d^2 is much larger than the variance, and it cannot be: with a sample of
m/16 elements the slice has d^2 <= 16 var, whatever the data (48 var for half types), so at
worst 17 (49) times the rounding of the two-pass sum is left, and for a sample drawn by chance next
to nothing is lost.

The sum that leaves the rounding of the mean, sum(x - mean), stays what it is in the graph, and all
that follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tvm import tirx

from normgraph.compile.half_types import HALF_TYPES, narrow, widen
from normgraph.compile.row_lengths import Length
from normgraph.compile.slice_plan import Pass, Sample, SlicePlan, Step
from normgraph.compile.tensor_program import (
    Apply,
    Load,
    Node,
    Operation,
    Scalar,
    Tensor,
    is_read,
    loads,
)
from normgraph.compile.tir import Expr, floordiv, i64, least, plus, times, zero

# One element in so many is sampled, in whole vectors of the widest registers.
_SHARE = 16
_VECTOR = 16


def apply(plan: SlicePlan) -> None:
    """Rewrite the passes of `plan` where they take a mean and then centre on it."""
    found = match(plan)
    if found is not None:
        _rewrite(plan, found.index, found)


@dataclass
class Match:
    """The steps of pass `index` and of the next that take a mean and centre on it."""

    index: int
    total: Step  # sum(x)
    mean: Step  # sum(x) / m
    centred: Step  # sum(x - mean)
    squares: Step  # sum((x - mean)^2)


def match(plan: SlicePlan) -> Match | None:
    """Where a plan takes a mean and then centres on it, or None."""
    found = (_match(plan, k) for k in range(1, len(plan.passes) - 1))
    return next((each for each in found if each is not None), None)


def _match(plan: SlicePlan, k: int) -> Match | None:
    first, second = plan.passes[k], plan.passes[k + 1]
    if len(first.wide) != 1 or not first.wide[0].is_sum or len(second.wide) != 2:
        return None
    total = first.wide[0]
    if total.op.out not in plan.per_slice or not is_read(total.value):
        return None
    uses = [s for work in plan.passes for s in work.after if total.op.out in loads(s.value)]
    if len(uses) != 1 or total.op.out in plan.stored or total.op.out.output_index is not None:
        return None
    mean = uses[0]
    is_mean = isinstance(mean.value, Apply) and mean.value.make is tirx.Div
    if not (is_mean and _is(mean.value.args[0], total.op.out)):  # type: ignore[union-attr]
        return None
    centred = [s for s in second.wide if s.is_sum and _is_centred(s.value, total, mean)]
    squares = [s for s in second.wide if s.is_sum and _is_square(s.value, total, mean)]
    if len(centred) != 1 or len(squares) != 1:
        return None
    return Match(k, total, mean, centred[0], squares[0])


def _rewrite(plan: SlicePlan, k: int, found: Match) -> None:
    first, second = plan.passes[k], plan.passes[k + 1]
    x, dtype = found.total.value, found.total.op.out.dtype
    m = found.mean.value.args[1]  # type: ignore[union-attr]
    sample, count = _sample(plan)
    needs = found.total.needs | found.centred.needs | found.squares.needs

    def wide(name: str, value: Node, step: Step, sample: Sample | None = None) -> Step:
        tensor = plan.slice_value(name, dtype)
        needed = needs if step is not found.squares else step.needs
        return Step(Operation(tensor, value, step.op.reduce), value, needed, sample)

    def narrow(tensor: Tensor, value: Node) -> Step:
        return Step(Operation(tensor, value), value, needs)

    sampled = wide("sample", x, found.total, sample)
    shift = plan.slice_value("shift", dtype)
    sample_mean = Apply(tirx.Div, (Load(sampled.op.out), Scalar(tirx.Cast(dtype, count))))
    sample_mean = Apply(_finite_or_zero, (sample_mean,))
    samples = [sampled]
    data = next(iter(loads(x))).dtype
    if data in HALF_TYPES:
        samples.append(wide("sample_squares", Apply(tirx.Mul, (x, x)), found.total, sample))
        square = Apply(tirx.Div, (Load(samples[1].op.out), Scalar(tirx.Cast(dtype, count))))
        sample_mean = Apply(partial(_of_few_digits, data), (sample_mean, square))
    around = Apply(tirx.Sub, (x, Load(shift)))
    centred = wide("shifted", around, found.centred)
    squares = wide("shifted_squares", Apply(tirx.Mul, (around, around)), found.squares)
    distance = plan.slice_value("distance", dtype)
    mean, rest = found.mean.op.out, found.centred.op.out
    away = Load(distance)
    after = [
        narrow(mean, _add(Load(shift), Apply(tirx.Div, (Load(centred.op.out), m)))),
        narrow(distance, Apply(tirx.Sub, (Load(mean), Load(shift)))),
        narrow(rest, _less(Load(centred.op.out), Apply(tirx.Mul, (away, m)))),
        narrow(
            found.squares.op.out,
            _less(
                Load(squares.op.out),
                Apply(tirx.Mul, (away, _add(Load(centred.op.out), Load(rest)))),
            ),
        ),
    ]
    others = [step for step in first.after if step is not found.mean]
    plan.passes[k] = Pass(samples, [narrow(shift, sample_mean)])
    plan.passes[k + 1] = Pass([centred, squares], [*after, *others, *second.after])
    del plan.per_slice[found.total.op.out]


def _sample(plan: SlicePlan) -> tuple[Sample, Expr]:
    """What to take of each slice, and how many elements that is."""
    rows, length, in_columns = plan.rows, plan.row_length, plan.in_columns
    sample = Sample(of_row=_first, rows=_share(rows, 1))
    of_rows = times(rows, _share(length, _VECTOR))
    of_columns = times(sample.rows, length)
    if isinstance(in_columns, bool):
        return sample, of_columns if in_columns else of_rows
    return sample, tirx.Select(in_columns, of_columns, of_rows)


def _first(row: Length) -> Length:
    """The sampled elements of a row."""
    whole = _SHARE * _VECTOR
    if row.most is not None and _VECTOR <= row.least <= row.most <= whole:
        return Length.of(i64(_VECTOR))
    return Length.of(_share(row.elements, _VECTOR))


def _share(extent: Expr, unit: int) -> Expr:
    """A sixteenth of `extent` or a little more, at least `unit`, a multiple of it or all."""
    each = _SHARE * unit
    return least(extent, times(floordiv(plus(extent, i64(each - 1)), each), i64(unit)))


def _finite_or_zero(value: Expr) -> Expr:
    largest = tirx.max_value(str(value.ty.dtype))
    finite = tirx.LE(tirx.abs(value), largest)
    return tirx.Select(finite, value, zero(str(value.ty.dtype)))


def _of_few_digits(data: str, mean: Expr, square: Expr) -> Expr:
    """A mean rounded to a half type, or 0 where it is small beside the root of the mean square."""
    small = tirx.LE(tirx.Mul(tirx.Mul(mean, mean), tirx.FloatImm("float32", 4.0)), square)
    return tirx.Select(small, zero("float32"), widen(narrow(data, mean)))


def _is(value: Node, tensor: Tensor) -> bool:
    return isinstance(value, Load) and value.tensor is tensor


def _is_centred(value: Node, total: Step, mean: Step) -> bool:
    if not (isinstance(value, Apply) and value.make is tirx.Sub):
        return False
    x, around = value.args
    same = list(loads(x)) == list(loads(total.value)) and is_read(x)
    return same and _is(around, mean.op.out)


def _is_square(value: Node, total: Step, mean: Step) -> bool:
    if not (isinstance(value, Apply) and value.make is tirx.Mul):
        return False
    return all(_is_centred(side, total, mean) for side in value.args)


def _add(a: Node, b: Node) -> Node:
    return Apply(tirx.Add, (a, b))


def _less(a: Node, b: Node) -> Node:
    return Apply(tirx.Sub, (a, b))
