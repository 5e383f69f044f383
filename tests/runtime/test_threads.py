"""One operator, many threads, many shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import normgraph as ng


def test_many_threads_get_their_own_answers(op: Any, toy: Any) -> None:
    failures: list[tuple[int, str]] = []
    start = threading.Barrier(8)

    def work(length: int) -> None:
        inputs = toy.inputs("backward", n=3, length=length)
        answers = toy.outputs("backward", inputs)
        acc = np.zeros(3, np.float32)
        start.wait()
        for turn in range(1, 200):
            result = op.backward(*inputs, out={"dbeta": acc}, grad_req={"dbeta": "add"})
            right = {**answers, "dbeta": answers["dbeta"] * turn}
            failures.extend(
                (length, name)
                for name, answer in right.items()
                if not np.array_equal(getattr(result, name), answer)
            )

    threads = [threading.Thread(target=work, args=(length,)) for length in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# One operator for each way in which a kernel's work is cut into tasks. Up to 32768 elements of x
# are one task; the sizes lie on both sides, so threads meet in the pool and outside of it.
SPECS: dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]] = {
    "batch_norm": (ng.NormSpec("batch_norm", momentum=None), ("N", 6, "L")),
    "instance_norm": (
        ng.NormSpec("instance_norm", track_running_stats=True, momentum=None),
        ("N", 6, "L"),
    ),
    "layer_norm": (ng.NormSpec("layer_norm"), ("N", "L", 6)),
}
SIZES = ((3, 37), (9, 601), (16, 1031), (31, 257))


def _drawn(op: Any, kind: str, n: int, length: int, seed: int) -> list[Any]:
    rng = np.random.default_rng([seed, n, length])
    sizes = {"N": n, "L": length}
    shapes = [
        [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        for spec in op.signature(kind).inputs
    ]
    return [np.asarray(rng.uniform(0.5, 1.0, shape), np.float32) for shape in shapes]


@pytest.mark.parametrize("name", SPECS)
def test_many_threads_in_compiled_kernels(name: str, build_operator: Callable[..., Any]) -> None:
    """Each thread gets, bit for bit, what it gets where no other thread runs."""
    op = build_operator(*SPECS[name])
    assert ng.get_num_threads() > 1
    count = 8
    start = threading.Barrier(count)
    failures: list[str] = []

    def calls(seed: int) -> Iterator[tuple[str, list[Any], Any]]:
        for n, length in SIZES:
            for kind in ("forward", "backward"):
                inputs = _drawn(op, kind, n, length, seed)
                yield f"{kind} {n}x{length}", inputs, op.call(kind, *inputs)

    def work(alone: list[tuple[str, list[Any], Any]], first: int) -> None:
        start.wait()
        for turn in range(first, first + 40):
            label, inputs, answers = alone[turn % len(alone)]
            found = op.call(label.split()[0], *inputs)
            failures.extend(
                f"{label} {output}"
                for output, got, answer in zip(answers._fields, found, answers, strict=True)
                if got.tobytes() != answer.tobytes()
            )

    threads = [
        threading.Thread(target=work, args=(list(calls(seed)), seed)) for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
