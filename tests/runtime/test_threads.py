"""One operator, many threads, many shapes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


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
