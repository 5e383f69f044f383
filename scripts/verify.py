"""Check an artifact: its kernels, its graphs and the equations themselves, against each other.

For every kind and every output, over shapes with odd and prime sizes and at mean 0 and mean 100:

1. kernel / float64        the compiled kernel, through `normgraph.load`, against float64 NumPy
2. onnxruntime / float64   the same .onnx file of the artifact in onnxruntime, against float64 NumPy
3. kernel / onnxruntime    one against the other
4. reference / differences the float64 gradients against central differences of the float64 forward
5. kernel / differences    the kernel's gradients against the same differences
6. dvar, dmean, dx         the steps of the backward, as outputs of a debug build: the same checks

Tolerances are those of `normgraph.scripts.verify_tolerance`. What cannot be run here is in the
report as "not run", with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import normgraph
import normgraph.graphs.reference as reference
from normgraph.errors import ArgumentError, CompileError, ToolMissing
from normgraph.runtime.rules import check_enough_values
from normgraph.scripts import verify_debug
from normgraph.scripts.verify_differences import GRADIENTS, Difference, differences
from normgraph.scripts.verify_inputs import Case, Inputs, cases, check_shape, forward_names
from normgraph.scripts.verify_onnx import NotRun, Refused, run_onnx
from normgraph.scripts.verify_report import FAILED, NOT_RUN, Report, Row, compare
from normgraph.scripts.verify_tolerance import allowed, describe, scale_of

Array = NDArray[Any]
Results = dict[str, Array]

# Who is held to what: see `verify_tolerance` on sums added in order.
_IN_ORDER = {"kernel": False, "onnxruntime": True}
_BOTH = "what the kernel and onnxruntime are allowed, added"
# Each position costs four runs of the forward for each gradient: fewer where x is large.
_POSITIONS, _ELEMENTS = 6, 600_000


def verify(
    artifact_path: str | Path,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    *,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Verify every kind of the artifact at `shape`, or at several if it is not given.

    The inputs depend on `seed` and the shape alone. `progress` is told what is being checked.
    Raises the errors of `normgraph.load`, and ArgumentError for a shape the artifact does not take.
    """
    tell = progress or (lambda _: None)
    operator = normgraph.load(artifact_path)
    run = _Run(Path(artifact_path), operator, seed)
    rows: list[Row] = []
    chosen = cases(operator.shape, shape)
    for place, case in enumerate(chosen):
        tell(f"{run.spec.op} {run.dtype}: {case.label}")
        inputs = run.inputs(case)
        for kind in run.kinds:
            rows += run.kind(kind, inputs)
            if place == 0 and kind in run.gradient_kinds:
                rows += run.gradients(kind, inputs)
    debugged = [kind for kind in verify_debug.KINDS if kind in run.kinds]
    if debugged:
        tell(f"{run.spec.op} {run.dtype}: dvar and dmean in a debug build")
        rows += run.steps(
            debugged, [Inputs(run.spec, run.dtype, case, seed) for case in chosen[:2]]
        )
    return run.report(rows, shape)


def verify_data(
    artifact_path: str | Path, data: Mapping[str, Array], name: str, seed: int = 0
) -> Report:
    """Comparisons 1 to 3 of every kind on given data: x, and any of dy, gamma, beta and so on.

    What `data` does not hold is random, as in `verify`. `name` says in the report what it is.
    """
    operator = normgraph.load(artifact_path)
    run = _Run(Path(artifact_path), operator, seed)
    shape = tuple(data["x"].shape)
    check_shape(operator.shape, shape)
    inputs = Inputs(run.spec, run.dtype, Case(shape, 0.0, name), seed, data)
    rows = [row for kind in run.kinds for row in run.kind(kind, inputs)]
    return run.report(rows, shape)


def versions() -> dict[str, str]:
    """The installed versions of what takes part; a missing package is left out."""
    found = {}
    for package in ("normgraph", "numpy", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class _Run:
    """One artifact under verification."""

    def __init__(self, path: Path, operator: Any, seed: int) -> None:
        self._path, self._operator, self._seed = path, operator, seed
        self.spec: normgraph.NormSpec = operator.spec
        self.dtype: str = operator.dtype
        self._manifest: Mapping[str, Any] = operator.manifest
        self.target: str = operator.target
        held = self._manifest["kinds"]
        self.kinds = tuple(kind for kind in normgraph.graphs.kinds(self.spec) if kind in held)
        self.gradient_kinds = tuple(kind for kind in self.kinds if kind.startswith("backward"))

    def report(self, rows: Sequence[Row], shape: Sequence[int] | None) -> Report:
        """The report on these rows; `shape` is what was asked for."""
        return Report(
            artifact=str(self._path),
            operator=self.spec.op,
            dtype=self.dtype,
            shape=",".join(map(str, self._operator.shape)),
            target=self.target,
            seed=self._seed,
            requested_shape=None if shape is None else tuple(shape),
            versions=versions(),
            rows=tuple(rows),
        )

    def inputs(self, case: Case) -> Inputs:
        """The inputs of every kind for one case."""
        return Inputs(self.spec, self.dtype, case, self._seed)

    def kind(self, kind: str, inputs: Inputs) -> Iterator[Row]:
        """Comparisons 1 to 3 of one kind at one case."""
        given = inputs.take(self._names(kind, "inputs"))
        try:
            shapes = tuple(array.shape for array in given.values())
            check_enough_values(self.spec, self._operator.signature(kind), shapes)
        except ArgumentError as error:
            for output, _ in self._outputs(kind):
                place = (kind, output, "kernel", "float64", inputs.case.label)
                yield Row(*place, NOT_RUN, reason=f"the call is refused: {error}")
            return
        want = reference.run(self.spec, kind, given)
        kernel = self._kernel(kind, given)
        graph = self._path / self._manifest["kinds"][kind]["graph"]["file"]
        yield from _against_float64_and_onnx(
            kind, inputs, want, kernel, graph, given, self._outputs(kind)
        )

    def gradients(self, kind: str, inputs: Inputs) -> Iterator[Row]:
        """Comparisons 4 and 5: central differences at a few random elements of each gradient."""
        given = inputs.take(self._names(kind, "inputs"))
        forward = inputs.take(forward_names(self.spec))
        exact = self._exact(kind, {**forward, "dy": inputs.values["dy"]})
        kernel = self._kernel(kind, given)
        conditions = inputs.conditions(kind)
        random = np.random.default_rng([self._seed, len(kind)])
        for output, dtype in self._outputs(kind):
            if output not in GRADIENTS:
                continue
            found = differences(
                self.spec,
                kind,
                {**forward, "dy": inputs.values["dy"]},
                output,
                positions=max(1, min(_POSITIONS, _ELEMENTS // inputs.values["x"].size)),
                random=random,
            )
            places = [each.index for each in found]
            slopes = np.array([each.value for each in found])
            scale = scale_of(output, exact[output], conditions)
            doubt = np.array([each.uncertainty for each in found]) + 1e-9 * scale
            yield compare(
                (kind, output, "reference", "differences", inputs.case.label),
                _at(exact[output], found),
                slopes,
                doubt,
                "float64",
                "what the two step sizes differ by + 1e-9 of the largest value",
                places,
            )
            # From a rounded y the gradient is that of another x: nothing to hold it against here.
            if kind == "backward_from_output":
                continue
            bound = allowed(output, dtype, exact[output], conditions)
            yield compare(
                (kind, output, "kernel", "differences", inputs.case.label),
                _at(kernel[output], found),
                slopes,
                np.array([bound[each.index] for each in found]) + doubt,
                dtype,
                f"{describe(output, dtype, conditions)} + what the differences are uncertain by",
                places,
            )

    def steps(self, kinds: Sequence[str], each_inputs: Sequence[Inputs]) -> Iterator[Row]:
        """Comparison 6: dvar, dmean and dx of the debug graphs."""
        shape = self._operator.shape
        models = {
            kind: verify_debug.debug_graph(self.spec, kind, shape, self.dtype) for kind in kinds
        }
        with contextlib.ExitStack() as stack:
            kernels: verify_debug.DebugKernels | str
            try:
                kernels = stack.enter_context(verify_debug.DebugKernels(models, self.target))
            except (NotRun, ToolMissing) as error:
                kernels = str(error)
            except CompileError as error:
                kernels = "the debug build failed"
                label = each_inputs[0].case.label
                for kind in kinds:
                    place = (f"{kind} (debug)", "dx", "kernel", "float64", label)
                    yield Row(*place, FAILED, self.dtype, reason=str(error))
            for kind, model in models.items():
                wanted = (*verify_debug.steps_of(self.spec), "dx")
                outputs = [each for each in verify_debug.outputs_of(model) if each[0] in wanted]
                graph = model.SerializeToString()
                for inputs in each_inputs:
                    given = inputs.take([each.name for each in model.graph.input])
                    want = reference.run(self.spec, kind, given, debug=True)
                    kernel = kernels if isinstance(kernels, str) else kernels.run(kind, given)
                    yield from _against_float64_and_onnx(
                        f"{kind} (debug)", inputs, want, kernel, graph, given, outputs
                    )

    def _names(self, kind: str, side: str) -> list[str]:
        return [entry["name"] for entry in self._manifest["kinds"][kind][side]]

    def _outputs(self, kind: str) -> list[tuple[str, str]]:
        return [
            (entry["name"], entry["dtype"]) for entry in self._manifest["kinds"][kind]["outputs"]
        ]

    def _kernel(self, kind: str, given: Mapping[str, Array]) -> Results:
        names = self._names(kind, "outputs")
        found = self._operator.call(kind, *given.values())
        values = found if isinstance(found, tuple) else (found,)
        return dict(zip(names, map(np.asarray, values), strict=True))

    def _exact(self, kind: str, inputs: Mapping[str, Array]) -> Results:
        """The reference's gradients with nothing rounded on the way."""
        wide = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
        forward = {name: array for name, array in wide.items() if name != "dy"}
        saved = reference.run(self.spec, "forward", forward)
        given = {**wide, **saved}
        return reference.run(
            self.spec, kind, {name: given[name] for name in self._names(kind, "inputs")}
        )


def _at(values: Array, found: Sequence[Difference]) -> Array:
    return np.array([float(values[each.index]) for each in found])


def _against_float64_and_onnx(
    kind: str,
    inputs: Inputs,
    want: Results,
    kernel: Results | str,
    graph: Path | bytes,
    given: Mapping[str, Array],
    outputs: Sequence[tuple[str, str]],
) -> Iterator[Row]:
    """Rows for kernel / float64, onnxruntime / float64 and kernel / onnxruntime.

    `kernel` is a reason where no kernel could be made.
    """
    label, status = inputs.case.label, NOT_RUN
    conditions = inputs.conditions(kind.removesuffix(" (debug)"))
    try:
        onnx_results: Results | str = run_onnx(graph, given, outputs)
    except (NotRun, Refused) as error:
        onnx_results = str(error)
        status = FAILED if isinstance(error, Refused) else NOT_RUN
    for output, dtype in outputs:
        exact = want[output]
        bounds = {
            subject: allowed(output, dtype, exact, conditions, in_order=in_order)
            for subject, in_order in _IN_ORDER.items()
        }
        sources = {
            subject: describe(output, dtype, conditions, in_order=in_order)
            for subject, in_order in _IN_ORDER.items()
        }
        for subject, results in (("kernel", kernel), ("onnxruntime", onnx_results)):
            place = (kind, output, subject, "float64", label)
            if isinstance(results, str):
                yield Row(*place, status if subject == "onnxruntime" else NOT_RUN, reason=results)
            else:
                bound, source = bounds[subject], sources[subject]
                yield compare(place, results[output], exact, bound, dtype, source)
        if isinstance(kernel, str) or isinstance(onnx_results, str):
            continue
        place = (kind, output, "kernel", "onnxruntime", label)
        other = onnx_results[output].astype(np.float64)
        both = bounds["kernel"] + bounds["onnxruntime"]
        yield compare(place, kernel[output], other, both, dtype, _BOTH)
