"""Running an artifact's kernels on its stored vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import tvm_ffi

from normgraph.errors import (
    AccuracyError,
    ArtifactCorrupt,
    ArtifactError,
    ArtifactNotFound,
    DeviceError,
)
from normgraph.runtime import archive, cuda_arrays, dlpack
from normgraph.runtime.artifact import Artifact
from normgraph.runtime.call import Call
from normgraph.runtime.cuda_call import CudaCall
from normgraph.runtime.dlpack import AnyArray
from normgraph.runtime.manifest import SelfTestCase
from normgraph.runtime.vectors import Vectors

# What a file that is no .npz, or has other arrays in it than the manifest says, leads to.
_UNREADABLE = (*archive.DAMAGE, KeyError, IndexError, OSError, TypeError, AttributeError)


@dataclass(frozen=True)
class SelfTestResult:
    """The largest absolute error of one output over one stored case."""

    kind: str
    case: str
    output: str
    error: float
    tolerance: float


def run_self_test(artifact: Artifact, calls: Mapping[str, Call]) -> tuple[SelfTestResult, ...]:
    """Run every stored case. Raises AccuracyError for the first output that is wrong.

    Raises DeviceError where a CUDA device or its driver refuses.
    """
    results: list[SelfTestResult] = []
    content = _vectors(artifact)
    try:
        vectors = Vectors(content)
        for case in artifact.self_test_cases:
            results += _run(artifact, calls[case.kind], case, vectors)
    except DeviceError:
        raise
    except _UNREADABLE as error:
        raise ArtifactCorrupt(
            f"{artifact.self_test.path}: the self-test cannot be read or run:"
            f" {str(error).rstrip('.'):.300}. Build the artifact again."
        ) from None
    except MemoryError:
        raise ArtifactError(
            f"{artifact.self_test.path}: there is not enough memory for the self-test. Give the"
            f" process more."
        ) from None
    return tuple(results)


def _vectors(artifact: Artifact) -> bytes:
    if artifact.vectors is not None:
        return artifact.vectors
    try:
        return artifact.self_test.read()
    except ArtifactNotFound:
        raise ArtifactNotFound(
            f"{artifact.self_test.path}: the vectors of the self-test are gone: the artifact was"
            f" replaced or removed after it was loaded. Load it again to test what is there now."
        ) from None


def _run(
    artifact: Artifact,
    call: Call,
    case: SelfTestCase,
    vectors: Vectors,
) -> list[SelfTestResult]:
    with _stream_of(call):
        return _run_on(artifact, call, case, vectors)


def _stream_of(call: Call) -> contextlib.AbstractContextManager[object]:
    """On a device the default stream: the caller's may be captured, and is not to wait."""
    if not isinstance(call, CudaCall):
        return contextlib.nullcontext()
    device = tvm_ffi.device("cuda", call.test_device)
    default: contextlib.AbstractContextManager[object] = tvm_ffi.use_raw_stream(device, 0)
    return default


def _run_on(
    artifact: Artifact,
    call: Call,
    case: SelfTestCase,
    vectors: Vectors,
) -> list[SelfTestResult]:
    make, read = dlpack.tensor_of, dlpack.memory_view
    if isinstance(call, CudaCall):
        make = partial(cuda_arrays.tensor_of, device=call.test_device)
        read = cuda_arrays.memory_view
    signature, prefix, tolerance = call.signature, case.prefix, case.tolerance
    inputs = []
    for spec in signature.inputs:
        stored = vectors[f"{prefix}.in.{spec.name}"]
        whole = np.resize(stored, case.shapes.get(spec.name, stored.shape))
        inputs.append(make(whole, spec.dtype))
    outputs = call.kernel(inputs)
    results = []
    for spec, output in zip(signature.outputs, outputs, strict=True):
        want = vectors[f"{prefix}.out.{spec.name}"]
        got = _float64(read(output, spec.dtype), spec.dtype)
        # Of a large output, samples at these flat indices are stored.
        if f"{prefix}.at.{spec.name}" in vectors:
            got = got.ravel()[vectors[f"{prefix}.at.{spec.name}"]]
        if got.shape != want.shape:
            raise ValueError(f"{prefix}.out.{spec.name} has shape {want.shape}, not {got.shape}")
        with np.errstate(invalid="ignore"):
            off = np.abs(got - want)
        off[(got == want) | (np.isnan(got) & np.isnan(want))] = 0.0
        # Any other NaN must count as an error, and compares false with everything.
        error = float(np.max(off, initial=0.0))
        if not error <= tolerance[spec.name]:
            raise AccuracyError(
                f"{artifact.path}: {signature.kind} gives a wrong {spec.name} on this host: it"
                f" is off by {error:.3g}, and {tolerance[spec.name]:.3g} is allowed (case"
                f" {prefix}). Do not use this artifact; compile it again."
            )
        results.append(
            SelfTestResult(signature.kind, prefix, spec.name, error, tolerance[spec.name])
        )
    return results


def _float64(array: AnyArray, dtype: str) -> AnyArray:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)
