"""Kernels on the GPU: held to float64, and timed beside PyTorch and copies."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import normgraph as ng
from normgraph.cuda import State
from normgraph.errors import NormGraphError
from normgraph.scripts import gpu_timing, gpu_torch
from normgraph.scripts.gpu_cases import Case, Shape, size_of

Tensors = dict[str, Any]


class Bench:
    """The artifacts of a folder, on the first CUDA device or for a rehearsal on the CPU."""

    def __init__(self, torch: Any, folder: Path, copy_bytes: int, device: str = "cuda") -> None:
        self.torch = torch
        self._folder = folder
        self._copy_bytes = copy_bytes
        self._loaded: dict[str, Any] = {}
        self.device = device

    def about(self, found: State) -> dict[str, Any]:
        """The device and the versions, as the report has them."""
        first = found.devices[0]
        properties = self.torch.cuda.get_device_properties(0)
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
                "torch": str(self.torch.__version__),
                "apache-tvm-ffi": version("apache-tvm-ffi"),
                "python": platform.python_version(),
            },
        }

    def limits(self) -> dict[str, Any]:
        """What the device can do: bytes a second that the fastest copy moves, and a launch."""
        torch = self.torch
        made = gpu_timing.copies(torch, self._copy_bytes, self._cache, self.device, eager=True)
        taken = gpu_timing.contest(torch, made)
        speeds = {name: 2 * self._copy_bytes / timing.median for name, timing in taken.items()}
        launch = gpu_timing.launch_seconds(torch, self.device)
        return {
            "copy_bandwidth": max(speeds.values()),
            "launch_us": launch * 1e6,
            "copies": speeds,
        }

    @property
    def _cache(self) -> int:
        """Bytes of the L2 cache."""
        return int(self.torch.cuda.get_device_properties(0).L2_cache_size)

    def operator(self, case: Case) -> Any:
        """The loaded artifact, which has passed its self-test."""
        if case.name not in self._loaded:
            self._loaded[case.name] = ng.load(self._folder / case.name)
        return self._loaded[case.name]

    def is_broken(self) -> bool:
        """Whether the device refuses everything since an error, as it does after some."""
        try:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()
        except RuntimeError:
            return True
        return False

    # Accuracy.

    def numeric(self, case: Case, shape: Shape, kind: str) -> dict[str, Any] | None:
        """One kind at one shape against float64; None where the operator is not defined."""
        what = f"{case.spec.op} {size_of(shape)} {case.dtype} {kind}"
        try:
            detail = self._errors(case, shape, kind)
            passed = all(share <= 1.0 for share in detail.values())
            text = ", ".join(f"{name} {share:.2g}" for name, share in detail.items())
        except (NormGraphError, RuntimeError) as error:
            if "Expected more than 1" in str(error):
                return None  # one value has no variance: PyTorch has no answer
            passed, text = False, f"{type(error).__name__}: {error}"
        return {"what": what, "passed": passed, "detail": text}

    def _errors(self, case: Case, shape: Shape, kind: str) -> dict[str, float]:
        """By output the largest error as a share of what is allowed."""
        torch = self.torch
        inputs = gpu_torch.draw(torch, case.spec, shape, case.dtype, 7, self.device)
        ours, given = self.call(case, kind, inputs)
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

    def call(self, case: Case, kind: str, inputs: Tensors) -> tuple[Callable[..., Any], Tensors]:
        """Our kernel, and the inputs it takes; the statistics are those of our forward."""
        operator = self.operator(case)
        names = operator.signature(kind).input_names
        given = {name: inputs[name] for name in names if name in inputs}
        if kind == "backward":
            taken = operator.signature("forward").input_names
            forward = operator.forward(**{name: inputs[name] for name in taken})
            given |= {n: getattr(forward, n) for n in ("mean", "inv_std") if n in names}
        return getattr(operator, kind), {name: given[name] for name in names}

    # Times.

    def time(self, case: Case, kind: str, peer: str) -> dict[str, Any]:
        """Ours, a peer ("eager" or "compiled") and copies of as many bytes, in turns.

        us: the median microseconds of those that could be measured; failures: why the others could
        not, and whose time counts for no goal. captured: who ran in a CUDA graph; starved: for
        whose launches the device waited.
        """
        torch = self.torch
        moved = case.moved(kind)
        sets = [
            gpu_torch.draw(torch, case.spec, case.shape, case.dtype, seed, self.device)
            for seed in range(gpu_timing.sets_for(moved, self._cache))
        ]
        makers: dict[str, Callable[[], list[Callable[[], object]]]] = {
            "ours": lambda: [self._into_outputs(case, kind, inputs) for inputs in sets],
            peer: lambda: self._peers(case, kind, sets, peer),
        }
        made: dict[str, gpu_timing.Prepared] = {}
        failures = []
        for name, make in makers.items():
            what = f"{name} {case.title} {kind}"
            try:
                made[name] = gpu_timing.prepare(torch, make(), moved)
                if not made[name].captured:
                    failures.append(f"{what}: it cannot be captured in a graph; does not count")
            except Exception as error:  # a peer may fail in any way, and the others still count
                failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if "ours" not in made:
            return {"us": {}, "failures": failures}
        captured = [name for name, each in made.items() if each.captured]
        made |= gpu_timing.copies(torch, moved // 2, self._cache, self.device)
        taken = gpu_timing.contest(torch, made)
        starved = [name for name in makers if name in taken and taken[name].starved]
        failures += [
            f"{name} {case.title} {kind}: the device waited for its launches; does not count"
            for name in starved
        ]
        us = {name: round(timing.median * 1e6, 3) for name, timing in taken.items()}
        us["copy"] = min(us["copy"], us.pop("copy by a kernel"))
        ours = taken["ours"]
        spread = [round(ours.low * 1e6, 3), round(ours.high * 1e6, 3)]
        return {
            "us": us,
            "spread_us": spread,
            "captured": captured,
            "starved": starved,
            "failures": failures,
        }

    def _into_outputs(self, case: Case, kind: str, inputs: Tensors) -> Callable[[], object]:
        run, given = self.call(case, kind, inputs)
        names = self.operator(case).signature(kind).output_names
        out = _named(names, run(**given))
        arguments = tuple(given.values())
        return lambda: run(*arguments, out=out)

    def _peers(
        self, case: Case, kind: str, sets: Sequence[Tensors], peer: str
    ) -> list[Callable[[], object]]:
        training = kind != "inference" or "running_mean" not in sets[0]
        forward = gpu_torch.forward_of(self.torch, case.spec, training=training)
        if peer == "compiled":
            forward = gpu_torch.compiled(self.torch, forward)
        return [gpu_torch.peer(self.torch, kind, inputs, forward) for inputs in sets]


def _named(names: tuple[str, ...], made: Any) -> Tensors:
    values = made if isinstance(made, tuple) else (made,)
    return dict(zip(itertools.chain(names), values, strict=True))
