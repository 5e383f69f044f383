"""Artifacts loaded and called as a user does, with the emulator as the machine's device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph import NormSpec
from normgraph.graphs import reference
from normgraph.runtime import cuda_arrays

IMAGE = ("N", 6, "H", "W")
CASES = {
    "batch_norm": (NormSpec("batch_norm"), IMAGE, (3, 6, 5, 7)),
    "instance_norm": (NormSpec("instance_norm", track_running_stats=True), IMAGE, (3, 6, 5, 7)),
    "group_norm": (NormSpec("group_norm", groups=2), IMAGE, (3, 6, 5, 7)),
    "layer_norm": (NormSpec("layer_norm"), ("N", 37), (3, 37)),
    "rms_norm": (NormSpec("rms_norm"), ("N", 37), (3, 37)),
}


@pytest.fixture
def load(
    build_emulated: Any, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    """load(name): the operator of a case, after its self-test on the emulator."""
    monkeypatch.setenv("NORMGRAPH_LIBCUDA", str(emulator.driver))

    def loaded(name: str) -> Any:
        artifact = build_emulated(*CASES[name][:2])
        artifact.device.driver.simt_begin(0)
        return ng.load(artifact.path)

    yield loaded
    gc.collect()  # memory goes back before the emulator begins anew


def given_to(call: Any, spec: NormSpec, size: tuple[int, ...]) -> dict[str, Any]:
    """Random float32 inputs of a kind: those of `size`, of the statistics, of the channels."""
    random = np.random.default_rng(3)
    made = {}
    bound: dict[str, int] = {}
    for port in call.inputs:
        if port.name in ("x", "dy", "y"):
            bound.update(zip(map(str, port.shape), size, strict=True))
    for port in call.inputs:
        shape = tuple(bound[d] if isinstance(d, str) else d for d in port.shape)
        values = random.uniform(0.5, 1.5, shape)
        made[port.name] = values.astype(np.float32)
    return made


@pytest.mark.parametrize("name", CASES)
def test_every_kind_as_a_user_calls_it(name: str, load: Callable[[str], Any]) -> None:
    operator = load(name)
    spec, _, size = CASES[name]
    for kind in operator.kinds:
        signature = operator.signature(kind)
        given = given_to(signature, spec, size)
        tensors = {n: cuda_arrays.tensor_of(v, "float32") for n, v in given.items()}
        found = getattr(operator, kind)(**tensors)
        found = found if isinstance(found, tuple) else (found,)
        want = reference.run(spec, kind, given)
        for output, tensor in zip(signature.outputs, found, strict=True):
            got = cuda_arrays.memory_view(tensor, "float32")
            exact = want[output.name]
            error = np.max(np.abs(got - exact))
            assert error <= 2e-5 * max(1.0, np.max(np.abs(exact))), f"{kind} {output.name}"
        del found, tensors, tensor


@pytest.mark.parametrize("name", CASES)
def test_arrays_without_elements(name: str, load: Callable[[str], Any]) -> None:
    operator = load(name)
    spec, _, size = CASES[name]
    for kind in operator.kinds:
        signature = operator.signature(kind)
        given = given_to(signature, spec, (0, *size[1:]))
        tensors = {n: cuda_arrays.tensor_of(v, "float32") for n, v in given.items()}
        want = reference.run(spec, kind, given)
        found = getattr(operator, kind)(**tensors)
        found = found if isinstance(found, tuple) else (found,)
        for output, tensor in zip(signature.outputs, found, strict=True):
            got = cuda_arrays.memory_view(tensor, "float32")
            label = f"{kind} {output.name}"
            np.testing.assert_allclose(got, want[output.name], rtol=1e-6, err_msg=label)
        del found, tensors, tensor
