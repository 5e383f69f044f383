"""The generated source, broken on purpose: what each barrier and bound is for is seen to fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec

SYNC = r"__syncthreads\(\);"
BOUND = r"if \([^;{]* < [^;{]*\{"
# Operator, declared shape, size, kind: between them all that synchronises in the rule, slices held
# in a block, over several blocks, in columns, the values of slices and of columns, the finish.
CASES: dict[str, tuple[NormSpec, tuple[int | str, ...], tuple[int, ...], str]] = {
    "a slice a block": (
        NormSpec("instance_norm"), ("N", 6, "H", "W"), (2, 6, 37, 41), "backward",
    ),
    "a group's parameters": (
        NormSpec("group_norm", groups=2), ("N", 6, "H", "W"), (3, 6, 11, 13), "backward",
    ),
    "a channel over the batch": (
        NormSpec("batch_norm"), ("N", 6, "H", "W"), (5, 6, 7, 9), "backward",
    ),
    "rows and columns": (NormSpec("layer_norm"), ("N", "T", 37), (3, 7, 37), "backward"),
    "a row a block": (NormSpec("rms_norm"), ("N", 1111), (5, 1111), "forward"),
    # More rows than blocks stand on a device, which go from row to row.
    "rows of a block and columns": (NormSpec("layer_norm"), ("N", 257), (400, 257), "backward"),
    "several blocks a slice, forward": (
        NormSpec("instance_norm"), ("N", 2, "H", "W"), (1, 2, 91, 91), "forward",
    ),
    "several blocks a slice, backward": (
        NormSpec("instance_norm"), ("N", 2, "H", "W"), (1, 2, 91, 91), "backward",
    ),
    "several blocks a group": (
        NormSpec("group_norm", groups=1), ("N", 3, "H", "W"), (1, 3, 91, 91), "backward",
    ),
    "long rows and columns": (NormSpec("layer_norm"), ("N", 8209), (2, 8209), "backward"),
    "channels last, forward": (NormSpec("batch_norm"), ("N", 5), (1000, 5), "forward"),
    "channels last, backward": (NormSpec("batch_norm"), ("N", 5), (1000, 5), "backward"),
}  # fmt: skip


def definitions(text: str) -> Iterator[str]:
    """What comes before the first kernel, then each kernel's declarations and definition."""
    starts = [m.start() for m in re.finditer(r'extern "C" __global__', text)]
    yield text[: starts[0]]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text[start:end]


def kernels_alone(text: str, kernels: set[str]) -> str:
    """The source with these kernels and no others: they compile in a fraction of the time."""
    first, *rest = definitions(text)
    named = re.compile(rf"\b({'|'.join(sorted(kernels))})\(")
    return "".join([first, *(each for each in rest if named.search(each))])


def changed(text: str, pattern: str, new: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """The source with one place changed, for each place; and the kernel and line of it."""
    begin = 0
    for part in definitions(text):
        name = re.search(r"(\w+)\(", re.sub(r"__\w+__\s*\([^()]*\)", "", part))
        for match in re.finditer(pattern, part):
            at, to = begin + match.start(), begin + match.end()
            line = text[text.rfind("\n", 0, at) + 1 : text.find("\n", to)].strip()
            assert name
            yield f"{name[1]}: {line}", text[:at] + new(match[0]) + text[to:]
        begin += len(part)


class Rerun:
    """A call of an artifact, whose kernels are run again from other text."""

    def __init__(self, name: str, dtype: str, build_emulated: Any, inputs_of: Any) -> None:
        spec, shape, size, kind = CASES[name]
        self.artifact = build_emulated(spec, shape, dtype)
        self.ports = self.artifact.ports[kind]
        self.inputs = inputs_of(self.artifact, kind, size)
        self.first = self.artifact.call(kind, self.inputs)
        self.kernels = {launch.kernel for launch in self.first.launches}
        self.text = kernels_alone(self.artifact.program.source, self.kernels)

    def run(self, text: str, emulator: Any, seed: int = 0) -> Any:
        outputs: Mapping[str, Any] = {
            port["name"]: (self.first.arrays[port["name"]].shape, port["dtype"])
            for port in self.ports["outputs"]
        }
        return emulator.compile(text).run(
            self.first.launches,
            inputs=self.inputs,
            outputs=outputs,
            scratch=self.first.scratch,
            seed=seed,
        )


@pytest.fixture
def rerun(build_emulated: Any, inputs_of: Any) -> Any:
    """rerun(case, dtype="float32"): see `Rerun`."""
    return lambda name, dtype="float32": Rerun(name, dtype, build_emulated, inputs_of)


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_threads_changes_no_bit(name: str, rerun: Any, emulator: Any) -> None:
    made = rerun(name)
    for seed in range(1, 4):
        again = made.run(made.text, emulator, seed).clean
        for output in made.ports["outputs"]:
            wanted = made.first.arrays[output["name"]]
            np.testing.assert_array_equal(again[output["name"]], wanted)


@pytest.mark.parametrize("name", CASES)
def test_no_barrier_can_be_left_out(name: str, rerun: Any, emulator: Any) -> None:
    made = rerun(name)
    places = list(changed(made.text, SYNC, lambda barrier: ""))
    emulator.compile_all([text for _, text in places])
    silent = [
        (number, place)
        for number, (place, text) in enumerate(places)
        if not made.run(text, emulator).kinds & {"race", "uninitialised-read"}
    ]
    assert places
    assert silent == []


@pytest.mark.parametrize("name", CASES)
def test_a_bound_that_is_too_large(name: str, rerun: Any, emulator: Any) -> None:
    """Of a kernel's conditions, one at least keeps it within its arrays, or off its neighbour's."""
    made = rerun(name)
    places = list(changed(made.text, BOUND, lambda condition: condition.replace(" < ", " <= ")))
    emulator.compile_all([text for _, text in places])
    found = {place: made.run(text, emulator).kinds for place, text in places}
    for kernel in made.kernels:
        own = [kinds for place, kinds in found.items() if place.startswith(f"{kernel}: ")]
        assert not own or any(kinds & {"out-of-bounds", "race"} for kinds in own), found
