"""The family as one table: which axes the statistics reduce and which the parameters vary along.

Axes are letters. n batch, c channels, s spatial; g groups and k channels of a group (c = g * k);
b leading and d normalized axes. `s*` and `b*` stand for any number of axes, `d+` for at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

from normgraph.spec import NormSpec

MAX_RANK = 5


@dataclass(frozen=True)
class Row:
    """One operator: the letters of x's axes, and the sets of letters that matter."""

    name: str
    layout: str
    inside: str  # x's axes inside the graph: only group_norm splits one
    stats: str
    params: str
    centred: bool
    min_rank: int = 2


ROWS = {
    row.name: row
    for row in (
        Row("batch_norm", "n c s*", "n c s*", stats="ns", params="c", centred=True),
        Row("instance_norm", "n c s*", "n c s*", stats="s", params="c", centred=True, min_rank=3),
        Row("group_norm", "n c s*", "n g k s*", stats="ks", params="gk", centred=True),
        Row("layer_norm", "b* d+", "b* d+", stats="d", params="d", centred=True),
        Row("rms_norm", "b* d+", "b* d+", stats="d", params="d", centred=False),
    )
}


def axis_letters(spec: NormSpec, rank: int, *, inside: bool = True) -> str:
    """One letter an axis for an x of `rank`: of x inside the graph, or of x itself."""
    row = ROWS[spec.op]
    layout = row.inside if inside else row.layout
    if spec.normalized_ndim is not None:
        return "b" * (rank - spec.normalized_ndim) + "d" * spec.normalized_ndim
    return layout.replace(" ", "").replace("s*", "s" * (rank - 2))


def axes_of(letters: str, wanted: str) -> tuple[int, ...]:
    """The positions in `letters` whose letter is in `wanted`."""
    return tuple(i for i, letter in enumerate(letters) if letter in wanted)
