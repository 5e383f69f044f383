"""Kernels on the GPU called in the ways callers do: streams, CUDA graphs, requests and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import normgraph as ng
from normgraph.errors import NormGraphError
from normgraph.scripts import gpu_torch
from normgraph.scripts.gpu_cases import Case
from normgraph.scripts.gpu_run import Bench, Tensors

_REPLAYS = 100
_TURNS = 20


class Behaviour:
    """The checks of CHECKS on the artifacts of a bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def check(self, what: str, case: Case) -> dict[str, Any]:
        """One check on one operator."""
        try:
            passed, text = CHECKS[what](self, case), ""
        except (NormGraphError, RuntimeError, AssertionError) as error:
            passed, text = False, f"{type(error).__name__}: {error}"
        return {"what": f"{case.title}: {what}", "passed": passed, "detail": text}

    def _backward(self, case: Case) -> tuple[Callable[..., Any], Tensors]:
        inputs = gpu_torch.draw(
            self._bench.torch, case.spec, case.shape, case.dtype, 9, self._bench.device
        )
        return self._bench.call(case, "backward", inputs)

    def _on_a_stream(self, case: Case) -> bool:
        torch = self._bench.torch
        run, given = self._backward(case)
        want = run(**given)[0]
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(20_000_000)  # whoever does not wait for this reads zeros
            late = torch.zeros_like(given["dy"]).copy_(given["dy"])
            got = run(**{**given, "dy": late})[0]
        other.synchronize()
        return bool(torch.equal(got, want))

    def _captured(self, case: Case) -> bool:
        torch = self._bench.torch
        run, given = self._backward(case)
        run(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            got = run(**given)
        given["dy"].mul_(2.0)
        graph.replay()
        torch.cuda.synchronize()
        return all(torch.equal(one, two) for one, two in zip(got, run(**given), strict=True))

    def _bound(self, case: Case) -> bool:
        torch = self._bench.torch
        run, given = self._backward(case)
        call = self._bench.operator(case).bind("backward", **given)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(20_000_000)  # whoever does not wait for this reads the old values
            given["dy"].mul_(3.0)
            got = call()
        other.synchronize()
        if not all(map(torch.equal, got, run(**given))):
            return False
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=other):
            call()
        given["dy"].mul_(2.0)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        return all(map(torch.equal, got, run(**given)))

    def _resized(self, case: Case) -> bool:
        _, given = self._backward(case)
        call = self._bench.operator(case).bind("backward", **given)
        call()
        given["dy"].resize_(2 * given["dy"].numel())
        try:
            call()
        except ng.errors.ArgumentError:
            return True
        return False

    def _added(self, case: Case) -> bool:
        torch = self._bench.torch
        run, given = self._backward(case)
        whole = run(**given)
        total = torch.ones_like(whole.dgamma)
        run(**given, want="dgamma", grad_req={"dgamma": "add"}, out={"dgamma": total})
        return bool(torch.allclose(total.float(), whole.dgamma.float() + 1, rtol=1e-2, atol=1e-2))

    def _strided(self, case: Case) -> bool:
        torch = self._bench.torch
        run, given = self._backward(case)
        dy = given["dy"]
        turned = dy.transpose(0, dy.ndim - 1).contiguous().transpose(0, dy.ndim - 1)
        return bool(torch.equal(run(**{**given, "dy": turned})[0], run(**given)[0]))

    def _refused(self, case: Case) -> bool:
        run, given = self._backward(case)
        try:
            run(**{**given, "gamma": given["gamma"].cpu()})
        except ng.errors.ArgumentError:
            return True
        return False

    def _replayed(self, case: Case) -> bool:
        """Forward and backward in one graph, again and again: a team must find its words clear."""
        torch = self._bench.torch
        inputs = gpu_torch.draw(torch, case.spec, case.shape, case.dtype, 9, self._bench.device)
        forward, taken = self._bench.call(case, "forward", inputs)
        run, given = self._bench.call(case, "backward", inputs)
        want = (*forward(**taken), *run(**given))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            got = (*forward(**taken), *run(**given))
        for each in got:
            each.zero_()
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        return all(map(torch.equal, got, want))

    def _on_two_streams(self, case: Case) -> bool:
        """Two that want the whole device each wait for one another and do not mix."""
        torch = self._bench.torch
        streams = [torch.cuda.Stream() for _ in range(2)]
        made, calls = [], []
        for seed in range(len(streams)):
            inputs = gpu_torch.draw(
                torch, case.spec, case.shape, case.dtype, seed, self._bench.device
            )
            run, given = self._bench.call(case, "backward", inputs)
            made.append((run, given, run(**given)))
            calls.append(self._bench.operator(case).bind("backward", **given))
        torch.cuda.synchronize()
        for _ in range(_TURNS):
            for stream, call in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    call()
        torch.cuda.synchronize()
        got = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                got.append(call())
        torch.cuda.synchronize()
        return all(
            torch.equal(one, two)
            for (_, _, want), answer in zip(made, got, strict=True)
            for one, two in zip(answer, want, strict=True)
        )


CHECKS: dict[str, Callable[[Behaviour, Case], bool]] = {
    "a stream of one's own": Behaviour._on_a_stream,
    "captured in a CUDA graph": Behaviour._captured,
    "held through 100 replays": Behaviour._replayed,
    "on two streams at a time": Behaviour._on_two_streams,
    "bound, on a stream of one's own and captured": Behaviour._bound,
    "an array that was bound and resized is refused": Behaviour._resized,
    "an output that is added to": Behaviour._added,
    "an input that is not compact": Behaviour._strided,
    "an array on the CPU is refused": Behaviour._refused,
}
