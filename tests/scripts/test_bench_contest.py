"""Contests with made-up times: who is timed for how long, who is best, and what is kept."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from normgraph.errors import AccuracyError
from normgraph.scripts import bench_contest
from normgraph.scripts.bench_contest import LIMIT, Contest, contest
from normgraph.scripts.bench_peers import Peer
from normgraph.scripts.bench_roster import Maker, one_by_one
from normgraph.scripts.bench_timing import Timing

OURS = (
    Peer("normgraph", dict, 2, fresh=False),
    Peer("normgraph, bound", dict, 2, fresh=False, bound=True),
)
MILLISECONDS = {"normgraph": 1.0, "normgraph, bound": 0.2, "far": 2.1, "far, bound": 0.5}


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.9 * seconds, 1.1 * seconds, seconds, 2)


def made_up(milliseconds: Mapping[str, float]) -> Callable[..., dict[str, Timing]]:
    """What takes the place of `time_apart`; who is not named takes one."""
    return lambda calls, **_: {name: timing(1e-3 * milliseconds.get(name, 1.0)) for name in calls}


def test_a_row_that_looks_slower_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []

    def fake(calls: Any, *, rounds: int, seconds: float) -> Any:
        ours = 0.5 if len(asked) == 8 else 2.0
        asked.append((tuple(calls), rounds))
        milliseconds = {
            "normgraph": ours, "normgraph, bound": 0.2,
            "near": 1.0, "far": 99.0, "near, bound": 0.3, "far, bound": 0.5,
        }  # fmt: skip
        return made_up(milliseconds)(calls)

    monkeypatch.setattr(bench_contest, "time_apart", fake)
    rivals = [
        Peer("near", dict, 2, fresh=False),
        Peer("far", dict, 2, fresh=True),
        Peer("near, bound", dict, 2, fresh=False, bound=True),
        Peer("far, bound", dict, 2, fresh=False, bound=True),
        Peer("copy", dict, 2, fresh=False, limit=True),
    ]
    found = contest([*OURS, *rivals], rounds=2, seconds=0.01)
    near = ("normgraph", "normgraph, bound", "near", "near, bound", LIMIT)
    looks = ["normgraph", "normgraph, bound", *(peer.name for peer in rivals[:-1]), LIMIT]
    assert asked == [*(((name,), 1) for name in looks), (near, 2), (near, 6)]
    assert found.timings["normgraph"].median == 0.5e-3
    assert found.timings["far"].median == 99e-3
    assert not found.slower


def test_a_row_that_is_not_slower_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(calls: Any, *, rounds: int, seconds: float) -> Any:
        asked.append(rounds)
        return made_up({})(calls)

    monkeypatch.setattr(bench_contest, "time_apart", fake)
    contest([*OURS, Peer("even", dict, 2, fresh=False)], rounds=2, seconds=0.01)
    assert asked == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("milliseconds", "rounds"),
    [(100.0, [3, 9]), (300.0, [2, 6]), (400.0, [1, 3]), (4000.0, [1, 1])],
)
def test_calls_of_seconds_have_fewer_rounds(
    milliseconds: float, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fake(calls: Any, *, rounds: int, seconds: float) -> Any:
        asked.append(rounds)
        return made_up({"normgraph": milliseconds, "fast": 0.8 * milliseconds})(calls)

    monkeypatch.setattr(bench_contest, "time_apart", fake)
    found = contest([*OURS, Peer("fast", dict, 2, fresh=False)], rounds=3, seconds=0.01)
    assert asked == [1, 1, 1, *rounds]
    assert found.slower


@pytest.mark.parametrize(
    ("bound", "best", "ratio", "slower"),
    [
        (0.5, "torch", 1.0 / 1.2, False),
        (0.7, "onnxruntime", 0.7 / 0.8, False),
        (0.87, "onnxruntime", 0.87 / 0.8, False),  # within its spread
        (0.89, "onnxruntime", 0.89 / 0.8, True),
    ],
)
def test_the_best_peer_is_found_bound_against_bound(
    bound: float, best: str, ratio: float, slower: bool
) -> None:
    """onnxruntime is faster than our ordinary call, which is not what it is held against."""
    seconds = {
        "normgraph": 1.0, "normgraph, bound": bound, LIMIT: 0.1, "torch": 1.2, "onnxruntime": 0.8,
    }  # fmt: skip
    found = Contest(
        {name: timing(each) for name, each in seconds.items()},
        {"torch": "normgraph", "onnxruntime": "normgraph, bound"},
    )
    assert (found.best, found.slower) == (best, slower)
    assert found.ratio == pytest.approx(ratio)
    assert found.same_sort == found.ours[best]


@pytest.mark.parametrize(("cold", "calls"), [(0, 1), (3, 4), (99, 6)])
def test_fresh_outputs_are_called_until_they_take_no_new_pages(
    cold: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the look, and once more for the contest, as the heap was cold in between."""
    called: list[None] = []

    def call() -> dict[str, Any]:
        # A mapping of its own faults in every page that is written to.
        with mmap.mmap(-1, 100 * mmap.PAGESIZE) as fresh:
            for page in range(100 if len(called) % calls < cold else 0):
                fresh[page * mmap.PAGESIZE] = 1
        called.append(None)
        return {}

    monkeypatch.setattr(bench_contest, "time_apart", made_up({}))
    contest([*OURS, Peer("torch", call, 2, fresh=True)], rounds=1, seconds=0.01)
    assert len(called) == 2 * calls
    called.clear()
    contest([*OURS, Peer("oneDNN", call, 2, fresh=False)], rounds=1, seconds=0.01)
    assert called == []


def test_without_peers_nobody_is_best() -> None:
    found = Contest({"normgraph": timing(1.0)}, {})
    assert (found.best, found.same_sort, found.ratio, found.slower) == (
        None, "normgraph", 1.0, False,
    )  # fmt: skip


class Held:
    """A call that holds memory, as those of peers do."""

    def __call__(self) -> dict[str, Any]:
        return {}


def test_who_is_let_go_is_gone_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far behind, wrong or not to be made: nobody but those near ours is in memory then."""
    heap: list[bool] = []
    held: dict[str, weakref.ref[Held]] = {}
    alive: dict[str, set[str]] = {}

    def set_heap(*, warm: bool) -> bool:
        heap.append(warm)
        return True

    def maker(name: str) -> Maker:
        def make() -> Peer:
            alive[name] = {each for each, call in held.items() if call() is not None}
            assert heap[-1:] != [True], "what is freed into a warm heap stays there"
            call = Held()
            held[name] = weakref.ref(call)
            if name == "large":
                raise MemoryError("no room for 4 GB")
            return Peer(name, call, 2, fresh=False, bound="bound" in name)

        return name, make

    def right(peer: Peer) -> None:
        if peer.name == "wrong":
            raise AccuracyError("wrong: off by 1.0e+00")

    monkeypatch.setattr(bench_contest, "time_apart", made_up(MILLISECONDS))
    monkeypatch.setattr(bench_contest, "set_heap", set_heap)
    names = ["normgraph", "normgraph, bound", "far", "near", "large", "wrong", "far, bound", "last"]
    missing: dict[str, str] = {}
    found = contest(one_by_one([maker(name) for name in names], right, missing), 1, 0.01)
    ours = {"normgraph", "normgraph, bound"}
    assert alive == {
        "normgraph": set(), "normgraph, bound": {"normgraph"}, "far": ours, "near": ours,
        "large": {*ours, "near"}, "wrong": {*ours, "near"}, "far, bound": {*ours, "near"},
        "last": {*ours, "near"},
    }  # fmt: skip
    assert set(found.ours) == {"far", "near", "far, bound", "last"}
    assert found.timings["far"].median == 1e-3 * MILLISECONDS["far"]
    assert missing == {
        "large": "MemoryError: no room for 4 GB", "wrong": "wrong: off by 1.0e+00",
    }  # fmt: skip
    assert heap[-1] is False


def test_ours_must_be_right_to_be_held_against_anybody() -> None:
    def wrong(_: Peer) -> None:
        raise AccuracyError("off")

    named: list[Maker] = [("normgraph, bound", lambda: OURS[1])]
    with pytest.raises(AccuracyError, match="off"):
        list(one_by_one(named, wrong, {}))
