"""Every kernel, called as it lies in the library, against float64 NumPy at awkward sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normgraph import NormSpec
from normgraph.graphs import build, kinds

OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
DTYPES = ("float32", "float64", "float16", "bfloat16")
# N, H, W: one element a plane; one slice; primes; 7 x 7; longer than every vector with a tail;
# many slices; one image of one long row; enough of both for parallel loops; short rows, which batch
# norm reads in columns.
PLANES = ((3, 1, 1), (1, 5, 7), (3, 7, 7), (2, 31, 37), (53, 2, 3), (1, 1, 1021), (3, 61, 67),
          (70, 3, 3), (261, 2, 1))  # fmt: skip
# N, T: one row; primes; many rows (more than there are partial sums, and fewer).
LINES = ((1, 1), (3, 5), (1, 16), (61, 17))


def _sizes(op: str) -> list[dict[str, int]]:
    if op in ("layer_norm", "rms_norm"):
        return [dict(zip("NT", size, strict=True)) for size in LINES]
    return [dict(zip("NHW", size, strict=True)) for size in PLANES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_kind_at_every_size(op: str, dtype: str, row: Callable[..., Any]) -> None:
    kernels = row(op, dtype)
    assert kernels.kinds == tuple(sorted(kinds(kernels.spec)))
    for seed, sizes in enumerate(_sizes(op)):
        for kind in kernels.kinds:
            kernels.check(kind, kernels.inputs(kind, sizes, seed=seed))


@pytest.mark.parametrize("op", OPS)
def test_large_means_lose_no_more_than_the_input_did(op: str, row: Callable[..., Any]) -> None:
    """Within 2e-4 at mean 100 is asked; the kernels keep 2e-5, and keep it at 1e6 as well.

    The sum of x - mean, zero on paper, takes the rounding of the mean out again: a compiler that
    folds x - mean - delta into x - (mean + delta) fails here.
    """
    kernels = row(op)
    long, short = {"N": 3, "H": 61, "W": 67, "T": 5}, {"N": 100, "H": 7, "W": 7, "T": 50}
    for sizes, mean in itertools.product((long, short), (100.0, 1e6)):
        for kind in ("forward", "backward"):
            inputs = kernels.inputs(kind, sizes, mean=mean)
            got, want = kernels.call(kind, inputs), kernels.answers(kind, inputs)
            for name, answer in want.items():
                error = float(np.max(np.abs(got[name] - answer)))
                assert error <= 2e-5 * float(np.max(np.abs(answer))), (kind, name, mean, error)


def test_the_kept_zero_term_is_as_good_as_a_mean_in_float64(row: Callable[..., Any]) -> None:
    """y and dx at mean 1e6 against the errors that exact means give in float32."""
    kernels = row("instance_norm")
    sizes = {"N": 2, "H": 64, "W": 64}
    forward = kernels.inputs("forward", sizes, mean=1e6)
    y, want = kernels.call("forward", forward)["y"], kernels.answers("forward", forward)["y"]
    backward = kernels.inputs("backward", sizes, mean=1e6)
    dx, answer = kernels.call("backward", backward)["dx"], kernels.answers("backward", backward)
    assert np.max(np.abs(y - want)) < 2e-6
    assert np.max(np.abs(dx - answer["dx"])) < 2e-6


@pytest.fixture(scope="module")
def channel_kernels(compile_models: Callable[..., Any]) -> Any:
    """Batch norm with blocks of channels: none full, one full, one more; flat and in lines."""
    spec = NormSpec("batch_norm")
    wanted: list[tuple[int, tuple[str, ...], str]] = [
        (channels, (), "forward") for channels in (1, 15, 16, 17, 64, 65, 70)
    ]
    wanted += [(17, ("L",), "forward"), (70, (), "backward"), (17, ("L",), "backward")]
    models = {
        f"c{channels}_r{len(rest)}__{kind}": build(spec, kind, ("N", channels, *rest))
        for channels, rest, kind in wanted
    }
    return compile_models(spec, models)


def test_batch_norm_of_any_number_of_channels(channel_kernels: Any) -> None:
    for name in channel_kernels.kinds:
        for n, length in ((1, 1), (2, 3), (7, 1), (9, 129), (67, 2)):
            channel_kernels.check(name, channel_kernels.inputs(name, {"N": n, "L": length}))


def test_every_channel_is_written(channel_kernels: Any) -> None:
    """Outputs start as NaN, so a channel that no block takes would show."""
    for name in channel_kernels.kinds:
        inputs = channel_kernels.inputs(name, {"N": 3, "L": 257})
        got = channel_kernels.call(name, inputs)
        assert not any(np.isnan(value).any() for value in got.values()), name


def test_a_long_row_and_a_large_static_shape(compile_models: Callable[..., Any]) -> None:
    spec = NormSpec("instance_norm")
    models = {
        "long__forward": build(spec, "forward", ("N", 1, "L")),
        "long__backward": build(spec, "backward", ("N", 1, "L")),
        "static__backward": build(spec, "backward", (8, 64, 28, 28)),
    }
    kernels = compile_models(spec, models)
    for name in kernels.kinds:
        kernels.check(name, kernels.inputs(name, {"N": 1, "L": 1000003}, mean=3.0))


@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity_stay_in_their_slice(op: str, row: Callable[..., Any]) -> None:
    kernels = row(op)
    kind = "forward"
    for bad in (np.nan, np.inf, -np.inf):
        clean = kernels.inputs(kind, {"N": 3, "H": 7, "W": 5, "T": 5})
        x = clean["x"].copy()
        x[1, 2, 3, ...] = bad
        got = kernels.call(kind, {**clean, "x": x})
        before = kernels.call(kind, clean)
        inside = _slice_of(op)
        assert np.isnan(got["y"][inside]).any()
        mask = np.ones(x.shape, bool)
        mask[inside] = False
        np.testing.assert_array_equal(got["y"][mask], before["y"][mask])
        if "mean" in got:
            assert np.isfinite(got["mean"]).sum() == got["mean"].size - 1


@pytest.mark.parametrize("op", OPS)
def test_nan_in_dy_reaches_what_depends_on_it(op: str, row: Callable[..., Any]) -> None:
    kernels = row(op)
    clean = kernels.inputs("backward", {"N": 3, "H": 7, "W": 5, "T": 5})
    dy = clean["dy"].copy()
    dy[1, 2, 3, ...] = np.nan
    got = kernels.call("backward", {**clean, "dy": dy})
    before = kernels.call("backward", clean)
    mask = np.ones(dy.shape, bool)
    mask[_slice_of(op)] = False
    assert np.isnan(got["dx"][~mask]).all()
    np.testing.assert_array_equal(got["dx"][mask], before["dx"][mask])
    assert np.isnan(got["dgamma"]).sum() == 1  # of the channel, or of the element of the row


def _slice_of(op: str) -> tuple[slice | int, ...]:
    """The slice that element (1, 2, 3, ...) of x belongs to."""
    every = slice(None)
    slices: dict[str, tuple[slice | int, ...]] = {
        "batch_norm": (every, 2),
        "instance_norm": (1, 2),
        "group_norm": (1, slice(0, 3)),
        "layer_norm": (1, 2),
        "rms_norm": (1, 2),
    }
    return slices[op]
