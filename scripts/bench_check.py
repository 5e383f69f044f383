"""Is a peer right: its results against float64, before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph.errors import AccuracyError
from normgraph.scripts.bench_peers import Peer, PeerMissing, first_line
from normgraph.scripts.verify_tolerance import ROUNDOFF, Conditions, relative, scale_of, ulp

Array = NDArray[Any]

_BLOCK = 1 << 16


def check(
    peer: Peer, kind: str, want: Mapping[str, Array], dtype: str, conditions: Conditions
) -> None:
    """Raise AccuracyError where a result of the peer is far from float64.

    Enough to catch a peer that computes another thing: see `slack_of`.
    """
    for name, value in results_of(peer, kind, want).items():
        share = slack_of(peer, dtype) * relative(name, dtype, conditions)
        bound = share * scale_of(name, want[name], conditions)
        error = worst_outside(as_numpy(value), want[name], bound, dtype)
        if error is not None:
            raise AccuracyError(
                f"{peer.name}, {kind}, {name}: expected float64's answer within {bound:.1e}, "
                f"got one off by {error:.1e}"
            )


def results_of(peer: Peer, kind: str, want: Mapping[str, Array]) -> dict[str, Any]:
    """What one call of the peer gives of what is wanted; AccuracyError where that is nothing."""
    given = {name: value for name, value in peer.call().items() if name in want}
    if not given and not peer.limit:
        raise AccuracyError(f"{peer.name}, {kind}: gave none of {', '.join(want)}")
    return given


def slack_of(peer: Peer, dtype: str) -> float:
    """How many times the tolerance of our own kernels a peer has: ten.

    One that keeps its steps in x's dtype has the same tolerance in units of that dtype.
    """
    slack = 0.5 * float(ulp(np.ones(()), dtype)) / ROUNDOFF[dtype] if peer.coarse else 1.0
    return max(10.0, slack)


def worst_outside(found: Array, want: Array, bound: float, dtype: str) -> float | None:
    """The largest error of those above `bound` and two units in the last place; None if none is.

    In blocks that fit the cache: arrays of this size are slow to allocate.
    """
    flat, right = found.reshape(-1), want.reshape(-1)
    if flat.size != right.size:
        return float("inf")
    worst: float | None = None
    for start in range(0, flat.size, _BLOCK):
        part = right[start : start + _BLOCK]
        error = np.abs(flat[start : start + _BLOCK].astype(np.float64) - part)
        largest = float(np.max(error))
        # Not the other way round: a NaN is not within the bound.
        if largest <= bound:
            continue
        if not bool(np.all(error <= bound + 2.0 * ulp(part, dtype))):
            worst = largest if worst is None or not largest <= worst else worst
    return worst


def reason(error: Exception) -> str:
    """Why a peer is not timed, in one line."""
    known = isinstance(error, (PeerMissing, AccuracyError))
    return str(error) if known else f"{type(error).__name__}: {first_line(error)}"


def as_numpy(value: Any) -> Array:
    """An array of NumPy, torch (half types widened) or TVM as NumPy's."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        if value.is_mkldnn:
            value = value.to_dense()
        value = value.detach().float() if value.dtype.itemsize < 4 else value.detach()
    found: Array = value.numpy()
    return found
