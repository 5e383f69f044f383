"""The peers of the bench: that each computes what it is held against, or says why it does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import normgraph as ng
from normgraph import NormSpec
from normgraph.errors import AccuracyError
from normgraph.scripts import (
    bench_dnnl,
    bench_floor,
    bench_onednn,
    bench_ort,
    bench_peers,
    bench_torch,
)
from normgraph.scripts.bench_check import check, worst_outside
from normgraph.scripts.bench_peers import Peer, PeerMissing
from normgraph.scripts.bench_roster import Scene, scene_of
from normgraph.scripts.bench_threads import allowed, bound
from normgraph.scripts.verify_inputs import Case, Inputs

Array = NDArray[Any]

SPECS = (
    NormSpec("batch_norm"),
    NormSpec("instance_norm"),
    NormSpec("group_norm", groups=3),
    NormSpec("layer_norm"),
    NormSpec("rms_norm"),
)


@pytest.fixture
def scene(build_artifact: Callable[..., Path]) -> Callable[..., Scene]:
    """One kind of one operator at (3, 6, 5, 7), float32."""

    def make(spec: NormSpec, kind: str) -> Scene:
        declared = ("N", 6, "H", 7)
        path = build_artifact(spec, declared, "float32", ("forward", "inference", "backward"))
        operator = ng.load(path)
        inputs = Inputs(operator.spec, "float32", Case((3, 6, 5, 7), 0.0), seed=1)
        return scene_of(path, operator, kind, inputs, threads=2, own_threads=2)

    return make


def right(peer: Peer, scene: Scene) -> bool:
    """Whether the peer's results are float64's; raises where they are not."""
    want = ng.graphs.reference.run(scene.operator.spec, scene.kind, scene.given)
    check(peer, scene.kind, want, "float32", scene.inputs.conditions(scene.kind))
    return True


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
@pytest.mark.parametrize("kind", ["forward", "inference"])
def test_onnxruntime_has_an_operator_for_each(
    spec: NormSpec, kind: str, scene: Callable[..., Scene]
) -> None:
    at = scene(spec, kind)
    assert right(bench_ort.own_operator(at.operator.spec, kind, at.full, 2), at)


def test_onnxruntime_has_no_operator_for_a_backward(scene: Callable[..., Scene]) -> None:
    at = scene(NormSpec("layer_norm"), "backward")
    with pytest.raises(PeerMissing, match="no operator"):
        bench_ort.own_operator(at.operator.spec, "backward", at.full, 2)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_instance_norm_is_a_group_norm_in_torch(kind: str, scene: Callable[..., Scene]) -> None:
    pytest.importorskip("torch")
    at = scene(NormSpec("instance_norm"), kind)
    assert right(bench_torch.torch_as_group_norm(at.operator.spec, kind, at.full, 2), at)
    other = scene(NormSpec("batch_norm"), kind)
    with pytest.raises(PeerMissing, match="only an instance_norm"):
        bench_torch.torch_as_group_norm(other.operator.spec, kind, other.full, 2)


def test_torch_compile(scene: Callable[..., Scene]) -> None:
    pytest.importorskip("torch")
    at = scene(NormSpec("layer_norm"), "backward")
    peer = bench_torch.torch_compiled(at.operator.spec, "backward", at.full, 2)
    assert right(peer, at)
    assert right(peer, at), "a backward that was called once can be called again"
    assert peer.setup is not None
    assert peer.setup > 0.0


@pytest.mark.parametrize("kind", ["forward", "inference", "backward"])
def test_onednn_in_torch(kind: str, scene: Callable[..., Scene]) -> None:
    torch = pytest.importorskip("torch")
    at = scene(NormSpec("batch_norm"), kind)
    if not torch.backends.mkldnn.is_available():
        with pytest.raises(PeerMissing):
            bench_onednn.torch_blocked(at.operator.spec, kind, at.full, 2)
        return
    peer = bench_onednn.torch_blocked(at.operator.spec, kind, at.full, 2)
    assert right(peer, at)
    assert peer.blocked


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("kind", ["forward", "inference", "backward"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_onednn_is_right_or_says_why_not(
    spec: NormSpec, kind: str, blocked: bool, scene: Callable[..., Scene]
) -> None:
    at = scene(spec, kind)
    arrays = {**at.full, **at.given}
    missing = ""
    try:
        peer = bench_onednn.onednn(at.operator.spec, kind, arrays, 2, blocked=blocked)
    except PeerMissing as error:
        missing = str(error)
    if missing:
        assert "oneDNN" in missing or "blocked layout" in missing
        return
    assert right(peer, at)
    assert peer.detail.endswith("aBcd16b" if blocked else "abcd")


def test_an_onednn_library_that_is_none(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libdnnl.so"
    broken.write_text("no library")
    monkeypatch.setenv(bench_dnnl.LIBRARY, str(broken))
    monkeypatch.setattr(bench_dnnl, "library", bench_dnnl.library.__wrapped__)
    at = scene(NormSpec("layer_norm"), "forward")
    with pytest.raises(PeerMissing, match="does not load"):
        bench_onednn.onednn(at.operator.spec, "forward", at.full, 2, blocked=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("count", [1, 31, 5000])
def test_the_limits_in_c_copy_and_add(dtype: str, streamed: bool, start: int, count: int) -> None:
    """At any alignment and length, to the bit."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    random = np.random.default_rng(count)
    x, dy = (random.standard_normal(start + count).astype(kind)[start:] for _ in range(2))
    for name, inputs, want in (
        ("forward", {"x": x}, x),
        ("backward", {"x": x, "dy": dy}, x + dy),
    ):
        missing = ""
        try:
            peer = bench_floor.stream_limit(name, inputs, 2, streamed=streamed)
        except PeerMissing as error:
            missing = str(error)
        if missing:
            assert any(word in missing for word in ("x86-64", "no instructions"))
            continue
        out = peer.call()[""]
        np.testing.assert_array_equal(out.view(np.uint8), want.view(np.uint8))
        assert peer.limit


def test_a_limit_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        """Says it copied."""

        def floor_streams(self) -> int:
            return 1

        def floor_copy(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(bench_floor, "compiled", Lazy)
    with pytest.raises(AccuracyError, match="another result"):
        bench_floor.stream_limit("forward", {"x": np.full(99, 3.5)}, 2, streamed=True)


def test_without_torch_the_limit_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    peer = bench_floor.memory_limit("backward", {"x": np.ones(9), "dy": np.ones(9)}, 2)
    assert "NumPy" in peer.name
    assert peer.limit
    peer.call()


def test_a_peer_that_gives_nothing_is_wrong() -> None:
    spec, shape = NormSpec("layer_norm"), (4, 8)
    inputs = Inputs(spec, "float32", Case(shape, 0.0), seed=0)
    want = {"y": inputs.values["y"]}
    silent = Peer("silent", lambda: {"z": inputs.values["y"]}, 1, fresh=False)
    with pytest.raises(AccuracyError, match="silent, forward: gave none of y"):
        check(silent, "forward", want, "float32", inputs.conditions("forward"))


@pytest.mark.parametrize("place", [0, 70_000, 99_999])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5])
def test_one_wrong_value_is_found(place: int, bad: float) -> None:
    want = np.zeros(100_000)
    found = want.astype(np.float32)
    assert worst_outside(found, want, 1e-6, "float32") is None
    found[place] = bad
    error = worst_outside(found, want, 1e-6, "float32")
    assert error is not None
    assert np.isnan(bad) or error == bad
    assert worst_outside(found[1:], want, 1e-6, "float32") == np.inf


def test_threads_are_bound_one_a_core() -> None:
    torch = pytest.importorskip("torch")
    before = os.sched_getaffinity(0)
    threads = min(2, len(allowed()))
    with bound(threads) as done:
        if done:
            assert os.sched_getaffinity(threading.get_native_id()) == {allowed()[0]}
            torch.ones(1 << 20).add_(1)
            everyone = [os.sched_getaffinity(int(each)) for each in os.listdir("/proc/self/task")]
            assert {allowed()[1]} in everyone
    assert os.sched_getaffinity(0) == before
    with bound(1) as done:
        assert not done


@pytest.mark.parametrize("kind", ["forward", "inference", "backward"])
def test_ours_bound_writes_the_same_arrays(kind: str, scene: Callable[..., Scene]) -> None:
    place = scene(NormSpec("batch_norm"), kind)
    arguments = (place.operator, kind, place.given, 2)
    whole = bench_peers.ours(*arguments, fresh=False, out=place.outputs)
    bound_ = bench_peers.ours_bound(*arguments, place.outputs)
    assert (whole.bound, bound_.bound) == (False, True)
    want = {name: value.copy() for name, value in whole.call().items()}
    for array in place.outputs.values():
        array.fill(np.nan)
    assert right(bound_, place)
    for name, value in bound_.call().items():
        assert value is place.outputs[name]
        np.testing.assert_array_equal(value, want[name])


def test_dx_alone_is_written_where_the_whole_call_writes_it(
    scene: Callable[..., Scene],
) -> None:
    """Where dx lies beside its inputs has a price of its own."""
    place = scene(NormSpec("instance_norm"), "backward")
    arguments = (place.operator, "backward", place.given, 2)
    whole = bench_peers.ours(*arguments, fresh=False, out=place.outputs)
    alone = bench_peers.dx_alone(*arguments, place.outputs)
    assert np.isnan(place.outputs["dx"]).all()
    assert right(alone, place)
    assert np.shares_memory(alone.call()["dx"], place.outputs["dx"])
    assert np.shares_memory(whole.call()["dx"], place.outputs["dx"])
    assert right(whole, place)
