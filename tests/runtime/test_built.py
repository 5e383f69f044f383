"""The runtime with real artifacts, of all five operators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normgraph as ng
from normgraph.errors import ArgumentError

SPECS: dict[str, tuple[ng.NormSpec, tuple[int | str, ...]]] = {
    "batch_norm": (ng.NormSpec("batch_norm", momentum=None), ("N", 6, "L")),
    "instance_norm": (
        ng.NormSpec("instance_norm", track_running_stats=True, momentum=None),
        ("N", 6, "L"),
    ),
    "group_norm": (ng.NormSpec("group_norm", groups=3), ("N", 6, "L")),
    "layer_norm": (ng.NormSpec("layer_norm"), ("N", "L", 6)),
    "rms_norm": (ng.NormSpec("rms_norm"), ("N", "L", 6)),
}


@pytest.fixture(params=SPECS)
def built(request: pytest.FixtureRequest, build_operator: Callable[..., Any]) -> Any:
    spec, shape = SPECS[request.param]
    return build_operator(spec, shape)


def _inputs(op: Any, kind: str, n: int = 3, length: int = 7) -> dict[str, Any]:
    """Consistent inputs: the statistics a backward takes are those of its x."""
    rng = np.random.default_rng(11)
    sizes = {"N": n, "L": length}

    def draw(name: str, shape: tuple[int | str, ...]) -> Any:
        size = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
        if name == "momentum":
            return np.array(0.3, np.float32)
        positive = name in ("gamma", "running_var")
        values = rng.uniform(0.5, 2, size) if positive else rng.standard_normal(size)
        return values.astype(np.float32)

    forward = {s.name: draw(s.name, s.shape) for s in op.signature("forward").inputs}
    made = ng.graphs.reference.run(op.spec, "forward", forward)
    known = {**forward, **{name: np.float32(value) for name, value in made.items()}}
    return {
        s.name: known[s.name] if s.name in known else draw(s.name, s.shape)
        for s in op.signature(kind).inputs
    }


def _named(op: Any, kind: str, result: Any) -> dict[str, Any]:
    values = result if isinstance(result, tuple) else (result,)
    return dict(zip(op.signature(kind).output_names, values, strict=True))


def _close(got: dict[str, Any], answers: dict[str, Any]) -> None:
    assert list(got) == list(answers)
    for name, answer in answers.items():
        assert got[name].shape == answer.shape, name
        scale = max(1.0, float(np.max(np.abs(answer), initial=0)))
        np.testing.assert_allclose(got[name], answer, atol=2e-5 * scale, err_msg=name)


def test_every_kind(built: Any) -> None:
    assert built.kinds == ng.graphs.kinds(built.spec)
    for kind in built.kinds:
        inputs = _inputs(built, kind)
        _close(
            _named(built, kind, built.call(kind, *inputs.values())),
            ng.graphs.reference.run(built.spec, kind, inputs),
        )
    assert all(item.error <= item.tolerance for item in built.self_test())


@pytest.mark.parametrize(("n", "length"), [(0, 7), (3, 0), (0, 0)])
def test_without_elements(built: Any, n: int, length: int) -> None:
    for kind in built.kinds:
        inputs = _inputs(built, kind, n, length)
        _close(
            _named(built, kind, built.call(kind, *inputs.values())),
            ng.graphs.reference.run(built.spec, kind, inputs),
        )


def test_write_add_and_null(built: Any) -> None:
    """The outputs that are asked for are right, and nothing else is touched."""
    for kind in ("forward", "backward", "backward_from_output"):
        inputs = _inputs(built, kind)
        answers = ng.graphs.reference.run(built.spec, kind, inputs)
        for name, answer in answers.items():
            alone = built.call(kind, *inputs.values(), want=name)
            _close({name: alone}, {name: answer})
            total = np.full(answer.shape, 2, np.float32)
            added = built.call(kind, *inputs.values(), want=name, out={name: total}, grad_req="add")
            assert added is total
            _close({name: total}, {name: answer + 2})
            rest = [other for other in answers if other != name]
            if rest:
                others = built.call(kind, *inputs.values(), grad_req={name: "null"})
                others = others if isinstance(others, tuple) else (others,)
                _close(dict(zip(rest, others, strict=True)), {key: answers[key] for key in rest})


def test_memory_at_any_address(built: Any) -> None:
    for kind in built.kinds:
        inputs = _inputs(built, kind)
        answers = ng.graphs.reference.run(built.spec, kind, inputs)
        for offset in (4, 20, 36):
            moved = []
            for array in inputs.values():
                memory = np.zeros(array.nbytes + 64 + offset, np.uint8)
                view = memory[offset : offset + array.nbytes].view(np.float32)
                view = view.reshape(array.shape)
                view[...] = array
                moved.append(view)
            _close(_named(built, kind, built.call(kind, *moved, copy=False)), answers)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_in_place(name: str, build_operator: Callable[..., Any]) -> None:
    op = build_operator(*SPECS[name])
    inputs = _inputs(op, "forward")
    answers = ng.graphs.reference.run(op.spec, "forward", inputs)
    mean, var = inputs["running_mean"], inputs["running_var"]
    result = op.forward(*inputs.values(), out={"new_running_mean": mean, "new_running_var": var})
    assert result.new_running_mean is mean
    _close(result._asdict(), answers)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_momentum_is_an_input(name: str, build_operator: Callable[..., Any]) -> None:
    op = build_operator(*SPECS[name])
    inputs = _inputs(op, "forward")
    for momentum in (0.0, 0.25, 1.0):
        inputs["momentum"] = np.array(momentum, np.float32)
        answers = ng.graphs.reference.run(op.spec, "forward", inputs)
        *arrays, _ = inputs.values()
        _close(op.forward(*arrays, momentum)._asdict(), answers)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_one_value_per_statistic(name: str, build_operator: Callable[..., Any]) -> None:
    """Refused in the forward where torch refuses it; the backward is 0."""
    op = build_operator(*SPECS[name])
    if name == "group_norm":
        spec = ng.NormSpec("group_norm", groups=6)
        op = build_operator(spec, ("N", 6, "L"), kinds=("forward", "backward"))
    inputs = _inputs(op, "forward", 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1"):
        op.forward(*inputs.values())
    backward = _inputs(op, "backward", 1, 1)
    _close(
        op.backward(*backward.values())._asdict(),
        ng.graphs.reference.run(op.spec, "backward", backward),
    )


@pytest.mark.parametrize("convention", ["onnx", "mxnet"])
def test_one_value_under_the_other_conventions(
    convention: str, build_operator: Callable[..., Any]
) -> None:
    spec = ng.NormSpec("batch_norm", convention=convention)
    op = build_operator(spec, ("N", 6, "L"), kinds=("forward",))
    inputs = _inputs(op, "forward", 1, 1)
    answers = ng.graphs.reference.run(op.spec, "forward", inputs)
    _close(op.forward(*inputs.values())._asdict(), answers)


def test_a_zero_in_gamma(built: Any) -> None:
    inputs = _inputs(built, "backward_from_output")
    inputs["gamma"][4] = 0
    with pytest.raises(ArgumentError, match=r"gamma\[4\] is 0"):
        built.backward_from_output(*inputs.values())


_BARE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tvm", "onnx", "onnxruntime", "torch", "ml_dtypes"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
import threading
import numpy as np
import normgraph as ng

op = ng.load(sys.argv[1])
op.self_test()

def work(length):
    rng = np.random.default_rng(length)
    sizes = {"N": 5, "L": length}
    for _ in range(20):
        for kind in op.kinds:
            arrays = [
                rng.random(
                    [sizes[d] if isinstance(d, str) else d for d in spec.shape], np.float32
                ) + np.float32(0.5)
                for spec in op.signature(kind).inputs
            ]
            once = op.call(kind, *arrays)
            again = op.call(kind, *arrays)
            for one, other in zip(once, again):
                assert np.array_equal(one, other)

threads = [threading.Thread(target=work, args=(3 + 200 * i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("fine")
"""


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_a_bare_install(name: str, build_artifact: Callable[..., Path], tmp_path: Path) -> None:
    """With no TVM in the process the libraries bring what they need; four threads, no crash."""
    done = subprocess.run(
        [sys.executable, "-c", _BARE, str(build_artifact(*SPECS[name]))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (ng.NormSpec("batch_norm"), (1, 3, 1)),
        (ng.NormSpec("instance_norm"), (1, 3, 1, 1)),
        (ng.NormSpec("group_norm", groups=4), (1, 4, 1)),
    ],
)
def test_one_value_a_statistic_is_refused_in_a_call_and_not_in_the_self_test(
    build_operator: Callable[..., Any], spec: ng.NormSpec, shape: tuple[int, ...]
) -> None:
    op = build_operator(spec, shape)
    assert op.self_test()
    inputs = [np.ones(s.shape, np.float32) for s in op.signature("forward").inputs]
    with pytest.raises(ArgumentError, match="Expected more than 1"):
        op.forward(*inputs)
