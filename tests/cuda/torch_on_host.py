"""PyTorch whose CUDA device is the host: streams do nothing, graphs call again what was called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from normgraph.scripts.gpu_cases import Case
from normgraph.scripts.gpu_run import Bench


class Event:
    """A moment of the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self, stream: Any) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs later."""

    def query(self) -> bool:
        """As if the device still waited in front of the round."""
        return False

    def elapsed_time(self, end: Event) -> float:
        return (end._at - self._at) * 1e3 + 1e-6


class Graph:
    """What was called while it was captured, and the arrays the answers go to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]] = []

    def replay(self) -> None:
        for call, targets in self.calls:
            for target, value in zip(targets, call(), strict=True):
                target.copy_(value)


class Device:
    """torch.cuda, as far as the GPU check uses it. capturing: the graph that is captured."""

    Event, CUDAGraph = Event, Graph

    def __init__(self) -> None:
        self.capturing: Graph | None = None

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    current_stream = Stream

    @contextlib.contextmanager
    def graph(self, graph: Graph, stream: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def synchronize(self) -> None:
        """Nothing is under way."""

    empty_cache = synchronize

    def _sleep(self, cycles: int) -> None:
        """The host does not wait for itself."""

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(multi_processor_count=1, L2_cache_size=0)


class TorchOnHost:
    """torch with another `cuda`, and a compiler that gives back what it is given."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cuda = Device()
        self.compiler = SimpleNamespace(reset=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def compile(self, function: Any, dynamic: bool) -> Any:
        assert not dynamic
        return function


class HostBench(Bench):
    """A bench on kernels for the CPU, whose calls can be captured."""

    def __init__(self, torch: Any, folder: Any, copy_bytes: int) -> None:
        super().__init__(torch, folder, copy_bytes, "cpu")

    def call(self, case: Case, kind: str, inputs: Any) -> tuple[Callable[..., Any], Any]:
        run, given = super().call(case, kind, inputs)

        def noted(*args: Any, **named: Any) -> Any:
            made = run(*args, **named)
            if self.torch.cuda.capturing is not None:
                self.torch.cuda.capturing.calls.append((lambda: run(*args, **named), made))
            return made

        return noted, given
