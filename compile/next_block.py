"""Whether the block behind the one at hand is asked for while this one's outputs are streamed.

Sums read and outputs write, so a block takes turns at the memory, and the first reads of each turn
wait. What is asked for while lines are stored is there by then.

Measured on arrays in memory. Forward, Zen 5: 4 to 48 % less time at rows of 128 to 16384 elements,
most on one thread; Zen 4: up to a quarter less at 262144 elements, but on one thread 12 to 22 %
more at 4096 to 16384. Backward by channels: up to a third less. Backward of contiguous blocks: on
Zen 5 16 % less up to 2048 elements and 10 % more at 6400; on Granite Rapids 5 % less at 6400 and 15
at 25600. What L2 does not keep is read from further away twice: Granite Rapids, of 2 MB, took 14 %
more at blocks of 1 MB, a third more at 1.5, half as much again at 2.
"""

from __future__ import annotations

from tvm import tirx

from normgraph.compile.kernel_frame import item_size
from normgraph.compile.knobs import knobs
from normgraph.compile.slice_plan import SlicePlan, Step
from normgraph.compile.streaming import Streaming
from normgraph.compile.tensor_program import Tensor, loads
from normgraph.compile.tir import Expr, Stmt, bind, i64, product, times


def next_block(
    plan: SlicePlan, streaming: Streaming, end: Expr, distance: Expr, before: list[Stmt]
) -> Expr:
    """`distance`, the elements to the next block, where that is asked for, else 0.

    This one ends in front of slice `end`. There must be such a slice, and no more of the block than
    L2 keeps until it is read. Blocks of two inputs that follow one another in memory are seen
    coming by the CPU itself, but for short ones, and for longer ones of which it sees too little.
    """
    whole = plan.whole_inputs
    slices = product([plan.program.extents[a] for a in plan.slice_axes])
    elements = times(distance, plan.rows)
    size = times(elements, i64(sum(item_size(t.dtype) for t in whole)))
    follow = not plan.lead_axes and len(whole) > 1
    most = knobs().ahead_bytes_of_two if follow else knobs().ahead_bytes
    wanted = tirx.And(tirx.LT(end, slices), tirx.LE(size, i64(most)))
    if follow:
        short = tirx.LE(elements, i64(knobs().ahead_short))
        wanted = tirx.And(wanted, tirx.Or(short, tirx.GE(elements, i64(knobs().ahead_long))))
    ahead = tirx.Select(wanted, distance, i64(0))
    return bind("ahead", streaming.opaque(ahead), before)


def whole_inputs(plan: SlicePlan, step: Step) -> list[Tensor]:
    """The inputs that a step reads an element of for each of its own."""
    read = set(loads(step.value))
    return [t for t in plan.whole_inputs if t in read]
