"""Kernels on the GPU: held to float64, called in the ways callers do, and timed."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import normgraph as ng
from normgraph.cuda import State
from normgraph.errors import NormGraphError
from normgraph.scripts import gpu_timing, gpu_torch
from normgraph.scripts.gpu_cases import KINDS, Case

Tensors = dict[str, Any]


class Bench:
    """The artifacts of a folder, on the first CUDA device or for a rehearsal on the CPU."""

    def __init__(self, torch: Any, folder: Path, copy_bytes: int, device: str = "cuda") -> None:
        self._torch = torch
        self._folder = folder
        self._copy_bytes = copy_bytes
        self._loaded: dict[str, Any] = {}
        self._device = device

    def about(self, found: State) -> dict[str, Any]:
        """The device and the versions, as the report has them."""
        first = found.devices[0]
        properties = self._torch.cuda.get_device_properties(0)
        return {
            "device": {
                "name": first.name,
                "arch": first.arch,
                "processors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                "driver": f"{found.version[0]}.{found.version[1]}",
            },
            "versions": {
                "normgraph": ng.__version__,
                "torch": str(self._torch.__version__),
                "apache-tvm-ffi": version("apache-tvm-ffi"),
                "python": platform.python_version(),
            },
            "copy_bandwidth": 0.0,
            "launch_us": 0.0,
        }

    def limits(self) -> dict[str, float]:
        """What the device can do: bytes a second that a copy moves, and a launch."""
        seconds = gpu_timing.copy_seconds(self._torch, self._copy_bytes, self._cache)
        return {
            "copy_bandwidth": 2 * self._copy_bytes / seconds,
            "launch_us": gpu_timing.launch_seconds(self._torch) * 1e6,
        }

    @property
    def _cache(self) -> int:
        """Bytes of the L2 cache."""
        return int(self._torch.cuda.get_device_properties(0).L2_cache_size)

    def operator(self, case: Case) -> Any:
        """The loaded artifact, which has passed its self-test."""
        if case.name not in self._loaded:
            self._loaded[case.name] = ng.load(self._folder / case.name)
        return self._loaded[case.name]

    # Accuracy.

    def numeric(self, case: Case, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """Every kind at one shape against float64."""
        found = []
        for kind in KINDS:
            what = f"{case.spec.op} {'×'.join(map(str, shape))} {case.dtype} {kind}"
            try:
                detail = self._errors(case, shape, kind)
                passed = all(share <= 1.0 for share in detail.values())
                text = ", ".join(f"{name} {share:.2g}" for name, share in detail.items())
            except (NormGraphError, RuntimeError) as error:
                if "Expected more than 1" in str(error):
                    continue  # one value has no variance, and both refuse it
                passed, text = False, f"{type(error).__name__}: {error}"
            found.append({"what": what, "passed": passed, "detail": text})
        return found

    def _errors(self, case: Case, shape: tuple[int, ...], kind: str) -> dict[str, float]:
        """By output the largest error as a share of what is allowed."""
        torch = self._torch
        inputs = gpu_torch.draw(torch, case.spec, shape, case.dtype, 7, self._device)
        ours, given = self._call(case, kind, inputs)
        names = self.operator(case).signature(kind).output_names
        got = _named(names, ours(**given))
        again = _named(names, ours(**given))
        want = gpu_torch.answers(torch, case.spec, kind, inputs)
        shares = {}
        for name in names:
            dtype = str(got[name].dtype).removeprefix("torch.")
            shares[name] = gpu_torch.worst(name, dtype, got[name], want[name], inputs)
            if not torch.equal(got[name], again[name]):
                shares[f"{name} (not the same twice)"] = float("inf")
        return shares

    def _call(self, case: Case, kind: str, inputs: Tensors) -> tuple[Callable[..., Any], Tensors]:
        """Our kernel, and the inputs it takes; the statistics are those of our forward."""
        operator = self.operator(case)
        names = operator.signature(kind).input_names
        given = {name: inputs[name] for name in names if name in inputs}
        if kind == "backward":
            taken = operator.signature("forward").input_names
            forward = operator.forward(**{name: inputs[name] for name in taken})
            given |= {n: getattr(forward, n) for n in ("mean", "inv_std") if n in names}
        return getattr(operator, kind), {name: given[name] for name in names}

    def behaviour(self, case: Case) -> list[dict[str, Any]]:
        """Streams, CUDA graphs, requests and errors, on one operator."""
        checks = {
            "a stream of one's own": self._on_a_stream,
            "captured in a CUDA graph": self._captured,
            "bound, on a stream of one's own and captured": self._bound,
            "an array that was bound and resized is refused": self._resized,
            "an output that is added to": self._added,
            "an input that is not compact": self._strided,
            "an array on the CPU is refused": self._refused,
        }
        found = []
        for what, check in checks.items():
            try:
                passed, text = check(case), ""
            except (NormGraphError, RuntimeError, AssertionError) as error:
                passed, text = False, f"{type(error).__name__}: {error}"
            found.append({"what": f"{case.spec.op}: {what}", "passed": passed, "detail": text})
        return found

    def _backward(self, case: Case) -> tuple[Callable[..., Any], Tensors]:
        inputs = gpu_torch.draw(self._torch, case.spec, case.shape, case.dtype, 9, self._device)
        return self._call(case, "backward", inputs)

    def _on_a_stream(self, case: Case) -> bool:
        torch = self._torch
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
        torch = self._torch
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
        torch = self._torch
        run, given = self._backward(case)
        call = self.operator(case).bind("backward", **given)
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
        call = self.operator(case).bind("backward", **given)
        call()
        given["dy"].resize_(2 * given["dy"].numel())
        try:
            call()
        except ng.errors.ArgumentError:
            return True
        return False

    def _added(self, case: Case) -> bool:
        torch = self._torch
        run, given = self._backward(case)
        whole = run(**given)
        total = torch.ones_like(whole.dgamma)
        run(**given, want="dgamma", grad_req={"dgamma": "add"}, out={"dgamma": total})
        return bool(torch.allclose(total.float(), whole.dgamma.float() + 1, rtol=1e-2, atol=1e-2))

    def _strided(self, case: Case) -> bool:
        torch = self._torch
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

    # Times.

    def time(self, case: Case, kind: str, *, compiled: bool) -> tuple[dict[str, float], list[str]]:
        """Seconds of ours, eager, compiled and the copy, and what could not be measured and why."""
        torch = self._torch
        count = gpu_timing.sets_for(case.moved(kind), self._cache)
        sets = [
            gpu_torch.draw(torch, case.spec, case.shape, case.dtype, seed) for seed in range(count)
        ]
        makers: dict[str, Callable[[Mapping[str, Any]], Callable[[], object]]] = {
            "ours": lambda inputs: self._into_outputs(case, kind, dict(inputs)),
            "eager": lambda inputs: self._peer(case, kind, inputs, compiled=False),
        }
        if compiled:
            makers["compiled"] = lambda inputs: self._peer(case, kind, inputs, compiled=True)
        seconds: dict[str, float] = {}
        failures = []
        for name, make in makers.items():
            what = f"{name} {case.spec.op} {case.size} {case.dtype} {kind}"
            try:
                if name == "compiled":
                    torch.compiler.reset()
                timing = gpu_timing.time_calls(torch, [make(inputs) for inputs in sets])
                seconds[name] = timing.median
                if not timing.captured:
                    failures.append(f"{what} in a graph: it cannot be captured; timed without one")
            except Exception as error:  # a peer may fail in any way, and the others still count
                failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.empty_cache()
        copied = case.moved(kind) // 2
        seconds["copy"] = gpu_timing.copy_seconds(torch, copied, self._cache)
        return (seconds if "ours" in seconds else {}), failures

    def _into_outputs(self, case: Case, kind: str, inputs: Tensors) -> Callable[[], object]:
        run, given = self._call(case, kind, inputs)
        names = self.operator(case).signature(kind).output_names
        out = _named(names, run(**given))
        arguments = tuple(given.values())
        return lambda: run(*arguments, out=out)

    def _peer(
        self, case: Case, kind: str, inputs: Mapping[str, Any], *, compiled: bool
    ) -> Callable[[], object]:
        made: Callable[[], object] = gpu_torch.peer(
            self._torch, case.spec, kind, inputs, compiled=compiled
        )
        return made


def _named(names: tuple[str, ...], made: Any) -> Tensors:
    values = made if isinstance(made, tuple) else (made,)
    return dict(zip(itertools.chain(names), values, strict=True))
