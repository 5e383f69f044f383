"""Slices that a team of blocks holds on the chip: values, and what keeps the team together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec

IMAGE = ("N", 2, "H", "W")
# An operator's declared shape and sizes, for each dtype: whole vectors and odd lengths, one slice
# and several, a row and many; all longer than what one block holds in registers.
Sizes = dict[str, tuple[tuple[int | str, ...], tuple[tuple[int, ...], ...]]]
CASES: dict[str, tuple[NormSpec, Sizes]] = {
    "batch_norm": (
        NormSpec("batch_norm"),
        {
            "float32": (IMAGE, ((3, 2, 106, 106), (40, 2, 29, 29))),
            "float16": (("N", 2, 106, 104), ((3, 2, 106, 104),)),
            "bfloat16": ((1, 2, 181, 183), ((1, 2, 181, 183),)),
        },
    ),
    "instance_norm": (
        NormSpec("instance_norm", track_running_stats=True),
        {
            "float32": (("N", 2, 190, 176), ((4, 2, 190, 176),)),
            "float16": (("N", 2, 181, 183), ((1, 2, 181, 183),)),
            "bfloat16": (("N", 2, 190, 176), ((2, 2, 190, 176),)),
        },
    ),
    "group_norm": (
        NormSpec("group_norm", groups=2),
        {
            "float32": (("N", 6, 106, 106), ((2, 6, 106, 106),)),
            "float16": (("N", 6, 105, 107), ((1, 6, 105, 107),)),
            "bfloat16": (("N", 6, "H", "W"), ((2, 6, 106, 104),)),
        },
    ),
    "layer_norm": (
        NormSpec("layer_norm"),
        {
            "float32": (("N", 36000), ((3, 36000),)),
            "float16": (("N", 36000), ((5, 36000),)),
            "bfloat16": (("N", 33001), ((2, 33001),)),
        },
    ),
    "rms_norm": (
        NormSpec("rms_norm"),
        {
            "float32": (("N", 33001), ((3, 33001),)),
            "float16": (("N", 40000), ((1, 40000),)),
            "bfloat16": (("N", 40000), ((5, 40000),)),
        },
    ),
}
KINDS = ("forward", "backward", "backward_from_output")
SEEDS = range(8)
WRITE, ADD = 1, 2
KILO = 1024
Device = Callable[..., None]


@pytest.fixture
def built(build_emulated: Any) -> Callable[..., Any]:
    """built(op, dtype): the artifact of a case."""

    def build(op: str, dtype: str) -> Any:
        spec, sizes = CASES[op]
        kinds = KINDS[: 3 if dtype == "float32" else 2]
        return build_emulated(spec, sizes[dtype][0], dtype, kinds)

    return build


def teams_of(run: Any) -> list[Any]:
    return [launch for launch in run.launches if launch.cooperative]


@pytest.mark.parametrize(
    ("op", "kind", "dtype"),
    [
        (op, kind, dtype)
        for op in CASES
        for dtype in CASES[op][1]
        for kind in KINDS[: 3 if dtype == "float32" else 2]
    ],
)
def test_a_kind(
    op: str, kind: str, dtype: str, device: Device, built: Any, check_kind: Any
) -> None:
    device(3)
    artifact = built(op, dtype)
    for seed, size in enumerate(CASES[op][1][dtype][1]):
        run = check_kind(artifact, kind, size, mean=100.0 * (seed % 2), seed=seed)
        assert len(teams_of(run)) == 1, f"{op} {kind} {dtype} {size}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_slices_that_are_split(dtype: str, device: Device, built: Any, check_kind: Any) -> None:
    """A device that launches no grid as a whole: partial sums, and a kernel a traversal."""
    device(0)
    (size,) = CASES["instance_norm"][1][dtype][1]
    assert teams_of(check_kind(built("instance_norm", dtype), "forward", size)) == []


def test_data_far_from_zero(device: Device, built: Any, check_kind: Any) -> None:
    device(3)
    run = check_kind(built("instance_norm", "float32"), "forward", (1, 2, 190, 176), mean=1e6)
    assert len(teams_of(run)) == 1


@pytest.mark.parametrize("multiprocessors", [3, 0], ids=["teams", "split"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_half_types_are_centred_exactly(
    op: str, multiprocessors: int, device: Device, built: Any, inputs_of: Any
) -> None:
    """x - shift has no rounding error, where a mean of 2^-24 is to be told of elements near 1."""
    device(multiprocessors)
    dtype, axes = {"batch_norm": ("float16", (0, 2, 3)), "instance_norm": ("bfloat16", (2, 3))}[op]
    (size,) = CASES[op][1][dtype][1]
    artifact = built(op, dtype)
    given = inputs_of(artifact, "forward", size)
    pattern = [2.0**-15, 0.0, *[1.0625, -1.0625] * 255]
    x = np.resize(pattern, size).astype(given["x"].dtype)
    came = artifact.call("forward", {**given, "x": x})
    assert not came.findings
    assert bool(teams_of(came)) == bool(multiprocessors)
    mean = x.astype(np.float64).mean(axes)
    np.testing.assert_allclose(came.arrays["mean"].ravel(), mean.ravel(), rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_means_of_half_types_near_zero(
    seed: int, device: Device, built: Any, check_kind: Any
) -> None:
    """Those of chunks are then far smaller than the elements."""
    device(3)
    run = check_kind(built("batch_norm", "float16"), "forward", (12, 2, 106, 104), seed=seed)
    assert len(teams_of(run)) == 1


# What the host asks for. 36000 float32 are 141 KB: two blocks of 109 KB hold them, 12 of 15 KB; on
# eight multiprocessors five teams of three are done at once, and one of sixteen is faster than one
# of twelve.


@pytest.mark.parametrize(
    ("multiprocessors", "shared", "blocks"),
    [(1, 228, 2), (2, 228, 4), (8, 228, 15), (8, 40, 16), (4, 40, None), (0, 228, None)],
)
def test_blocks_are_what_the_device_has_room_for(
    multiprocessors: int,
    shared: int,
    blocks: int | None,
    device: Device,
    built: Any,
    inputs_of: Any,
) -> None:
    device(multiprocessors, shared * KILO)
    artifact = built("layer_norm", "float32")
    run = artifact.call("forward", inputs_of(artifact, "forward", (5, 36000)))
    assert not run.findings
    teams = teams_of(run)
    assert [launch.grid[0] for launch in teams] == ([] if blocks is None else [blocks])
    assert all(2 * (launch.shared + 4096 + KILO) <= shared * KILO for launch in teams)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_what_is_not_asked_for_is_left_and_the_rest_added(
    kind: str, device: Device, built: Any, inputs_of: Any
) -> None:
    device(3)
    artifact = built("layer_norm", "float32")
    inputs = inputs_of(artifact, kind, (3, 36000))
    whole = artifact.call(kind, inputs)
    names = [port["name"] for port in artifact.ports[kind]["outputs"]]
    for name in names:
        alone = artifact.call(kind, inputs, {name: WRITE}, seed=1)
        assert not alone.findings
        np.testing.assert_array_equal(alone.arrays[name], whole.arrays[name])
    before = {name: np.full_like(whole.arrays[name], 0.25) for name in names}
    added = artifact.call(kind, inputs, dict.fromkeys(names, ADD), before, seed=2)
    assert not added.findings
    for name in names:
        np.testing.assert_allclose(added.arrays[name], whole.arrays[name] + 0.25, 1e-6, 1e-6)


class Rerun:
    """A call on one multiprocessor, a team of two and five rounds, whose text may be changed."""

    def __init__(self, device: Device, built: Any, inputs_of: Any, emulator: Any) -> None:
        device(1)
        self.emulator = emulator
        artifact = built("layer_norm", "float32")
        self.inputs = inputs_of(artifact, "forward", (5, 36000))
        self.first = artifact.call("forward", self.inputs)
        clear, self.team = self.first.launches
        self.launches = [clear, self.team]
        used = (clear.kernel, self.team.kernel)
        parts = artifact.program.source.split('extern "C" __global__')
        kept = [part for part in parts[1:] if re.search(rf"\b({'|'.join(used)})\(", part)]
        self.text = 'extern "C" __global__'.join([parts[0], *kept])

    def run(self, text: str, seed: int = 0, launches: Any = None) -> Any:
        outputs = {"y": ((5, 36000), "float32"), "mean": ((5, 1), "float32")}
        outputs["inv_std"] = outputs["mean"]
        return self.emulator.compile(text).run(
            launches or self.launches,
            inputs=self.inputs,
            outputs=outputs,
            scratch=self.first.scratch,
            timeout=20.0,
            seed=seed,
        )

    def changed(self, pattern: str, new: str) -> list[str]:
        """The text with one place changed, for each place there is."""
        found = list(re.finditer(pattern, self.text))
        assert found
        return [self.text[: m.start()] + m.expand(new) + self.text[m.end() :] for m in found]


@pytest.fixture
def rerun(device: Device, built: Any, inputs_of: Any, emulator: Any) -> Rerun:
    return Rerun(device, built, inputs_of, emulator)


def test_the_order_of_blocks_changes_no_bit(rerun: Rerun) -> None:
    assert rerun.team.grid[0] == 2
    for seed in (1, 2):
        again = rerun.run(rerun.text, seed).clean
        for name in ("y", "mean", "inv_std"):
            np.testing.assert_array_equal(again[name], rerun.first.arrays[name])


def test_words_that_are_not_waited_for(rerun: Rerun) -> None:
    (text,) = rerun.changed(
        r"while \(\(unsigned\)\(word >> 32\) != \(unsigned\)turn\)", "while (0)"
    )
    mean = rerun.run(text).arrays["mean"]
    assert not np.allclose(mean, rerun.first.arrays["mean"], atol=1e-4)
    plain = text.replace("(const volatile unsigned long long*)", "(const unsigned long long*)")
    assert "race" in rerun.run(plain).kinds


def test_a_word_that_is_written_in_two(rerun: Rerun) -> None:
    """The turn may be seen before the value, unless a fence stands between them."""
    (text,) = rerun.changed(
        r"\*\(volatile unsigned long long\*\)\(words \+ at\) =\s[^;]*;",
        "volatile unsigned* half = (volatile unsigned*)(words + at);"
        " half[0] = __float_as_uint(value); FENCE half[1] = (unsigned)turn;",
    )
    loose, fenced = (text.replace("FENCE", each) for each in ("", "__threadfence();"))
    means = [rerun.run(loose, seed).arrays["mean"] for seed in range(4)]
    right = rerun.first.arrays["mean"]
    assert not all(np.array_equal(mean, right) for mean in means)
    for seed in range(2):
        np.testing.assert_array_equal(rerun.run(fenced, seed).clean["mean"], right)


def test_words_that_are_not_cleared(rerun: Rerun) -> None:
    assert "uninitialised-read" in rerun.run(rerun.text, launches=[rerun.team]).kinds


def test_words_of_one_round_only(rerun: Rerun) -> None:
    """A block that is ahead writes over what the other has not read: it waits for ever."""
    (text,) = rerun.changed(r"\(round & 1\)", "(round & 0)")
    kinds = [rerun.run(text, seed).kinds for seed in range(6)]
    assert {"deadlock"} in kinds


def test_blocks_that_are_not_resident_together(rerun: Rerun) -> None:
    alone = dataclasses.replace(rerun.team, cooperative=False)
    found = rerun.run(rerun.text, launches=[rerun.launches[0], alone])
    assert found.kinds == {"deadlock"}
    assert "no resident thread will write" in found.findings[0].text


def test_no_barrier_of_a_block_can_be_left_out(rerun: Rerun) -> None:
    texts = rerun.changed(r"__syncthreads\(\);", "")
    rerun.emulator.compile_all(texts)
    for text in texts:
        assert rerun.run(text).kinds & {"race", "uninitialised-read"}


def test_a_chunk_that_is_too_long(rerun: Rerun) -> None:
    texts = rerun.changed(r"count_ptr\[0\] = min", "count_ptr[0] = 1 + min")
    found = [rerun.run(text).kinds for text in texts]
    assert any("out-of-bounds" in kinds for kinds in found), found
