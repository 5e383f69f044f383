"""What docs/c-hosts.md says of calls in C, called through ctypes with hand-made DLTensors."""

from __future__ import annotations

import ctypes
import itertools
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi.libinfo
from numpy.typing import NDArray

from normgraph import NormSpec

Array = NDArray[Any]
NONE, WRITE, ADD = 0, 1, 2
TENSOR, INT, FLOAT, NOTHING = 7, 1, 3, 0  # TVMFFITypeIndex
HEADER = 24  # sizeof(TVMFFIObject)
F = np.float32


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Any(ctypes.Structure):
    _fields_ = (
        ("type_index", ctypes.c_int32),
        ("zero", ctypes.c_uint32),
        ("value", ctypes.c_int64),
    )


class Tensor:
    """An array as a DLTensor, some of whose fields may be set otherwise."""

    def __init__(self, array: Array, **fields: Any) -> None:
        self.array = array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.head = _DLTensor(array.ctypes.data, 1, 0, array.ndim, 2, array.itemsize * 8, 1)
        self.head.shape = ctypes.addressof(self.shape)
        if strides := fields.pop("strides", None):
            self.strides = (ctypes.c_int64 * array.ndim)(*strides)
            self.head.strides = ctypes.addressof(self.strides)
        for name, value in fields.items():
            setattr(self.head, name, value)


class Library:
    """A library opened by the system's loader alone."""

    def __init__(self, path: Path) -> None:
        self.ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
        self.path = path
        self.kernels = ctypes.CDLL(str(path))

    def call(self, kind: str, arguments: Sequence[Any]) -> str:
        """The error, its kind first, or nothing. Ints are passed as ints, None as none."""
        packed = (_Any * len(arguments))()
        tensors = [Tensor(each) if isinstance(each, np.ndarray) else each for each in arguments]
        for slot, argument in zip(packed, tensors, strict=True):
            if isinstance(argument, Tensor):
                slot.type_index, slot.value = TENSOR, ctypes.addressof(argument.head)
            elif isinstance(argument, int):
                slot.type_index, slot.value = INT, argument
            else:
                slot.type_index = FLOAT if isinstance(argument, float) else NOTHING
        result = _Any()
        function = getattr(self.kernels, f"__tvm_ffi_{kind}")
        status = function(None, packed, ctypes.c_int32(len(packed)), ctypes.byref(result))
        assert (result.type_index, result.value) == (NOTHING, 0)
        return "" if status == 0 else self._error(status)

    def _error(self, status: int) -> str:
        assert status == -1
        error = ctypes.c_void_p()
        self.ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
        assert error.value is not None
        words = (ctypes.c_size_t * 4).from_address(error.value + HEADER)
        text = f"{ctypes.string_at(words[0], words[1]).decode()}: "
        text += ctypes.string_at(words[2], words[3]).decode()
        self.ffi.TVMFFIObjectDecRef(error)
        return text


@pytest.fixture(scope="module")
def library(build_artifact: Callable[..., Path]) -> Library:
    spec = NormSpec("instance_norm", track_running_stats=True, momentum=None)
    (path,) = build_artifact(spec, ("N", 3, "L"), kinds=("forward", "backward")).glob("*.so")
    return Library(path)


class Forward:
    """The arguments of one forward call by name, and its answers in float64."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((2, 3, 7)).astype(F)
        self.gamma, self.beta = np.array([1, 2, 3], F), np.array([0, 1, -1], F)
        self.running_mean, self.running_var = np.zeros(3, F), np.ones(3, F)
        self.momentum = np.array(0.25, F)
        self.y = np.full((2, 3, 7), np.nan, F)
        self.mean, self.inv_std = np.full((2, 2, 3, 1), np.nan, F)
        self.new_running_mean, self.new_running_var = np.full((2, 3), np.nan, F)
        wide = self.x.astype(np.float64)
        mean = wide.mean(2, keepdims=True)
        inv_std = 1 / np.sqrt(wide.var(2, keepdims=True) + 1e-5)
        self.answers = {
            "y": (wide - mean) * inv_std * self.gamma[:, None] + self.beta[:, None],
            "mean": mean,
            "inv_std": inv_std,
            "new_running_mean": 0.25 * mean.mean((0, 2)),
            "new_running_var": 0.75 + 0.25 * wide.var(2, ddof=1).mean(0),
        }

    def arguments(self, request: Any = 0b0101010101, **changed: Any) -> list[Any]:
        inputs = ("x", "gamma", "beta", "running_mean", "running_var", "momentum")
        return [changed.get(n, getattr(self, n)) for n in (*inputs, *self.answers)] + [request]

    def check(self, *names: str) -> None:
        """These are right, and every other output is as it was."""
        for name, answer in self.answers.items():
            if name in names:
                np.testing.assert_allclose(getattr(self, name), answer, atol=1e-5)
            else:
                assert np.isnan(getattr(self, name)).all(), name


@pytest.fixture
def call() -> Forward:
    return Forward()


def test_every_output_written(library: Library, call: Forward) -> None:
    assert library.call("forward", call.arguments()) == ""
    call.check(*call.answers)


@pytest.mark.parametrize("wanted", list(itertools.combinations(range(5), 2)))
def test_two_bits_an_output(library: Library, call: Forward, wanted: tuple[int, ...]) -> None:
    request = sum(WRITE << 2 * k for k in wanted)
    assert library.call("forward", call.arguments(request)) == ""
    call.check(*(list(call.answers)[k] for k in wanted))


def test_add(library: Library, call: Forward) -> None:
    call.mean[:] = call.y[:] = 5
    assert library.call("forward", call.arguments(ADD | ADD << 2)) == ""
    np.testing.assert_allclose(call.y, call.answers["y"] + 5, atol=1e-5)
    np.testing.assert_allclose(call.mean, call.answers["mean"] + 5, atol=1e-5)
    assert np.isnan(call.inv_std).all()


def test_an_output_not_asked_for(library: Library, call: Forward) -> None:
    """Any extents; without memory where one is 0; but there, of its rank and dtype."""
    one = np.full((1, 1, 1), np.nan, F)
    none = Tensor(np.empty((0, 0, 0), F), data=None)
    for y in (one, none):
        assert library.call("forward", call.arguments(WRITE << 2, y=y)) == ""
    call.check("mean")
    assert np.isnan(one).all()
    for wrong, kind in (
        (None, "TypeError"),
        (Tensor(one, data=None), "ValueError"),
        (one[0], "ValueError"),
        (one.astype(np.float64), "TypeError"),
    ):
        assert library.call("forward", call.arguments(WRITE << 2, y=wrong)).startswith(kind)


def test_running_statistics_in_place(library: Library, call: Forward) -> None:
    call.new_running_mean, call.new_running_var = call.running_mean, call.running_var
    assert library.call("forward", call.arguments()) == ""
    call.check(*call.answers)


@pytest.mark.parametrize(
    ("field", "error", "said"),
    [
        ({"data": None}, "ValueError", "x data pointer is NULL"),
        ({"device_type": 2}, "ValueError", "x.device_type"),
        ({"device_id": 1}, "ValueError", "device_id"),
        ({"ndim": 2}, "ValueError", "x.ndim"),
        ({"code": 4}, "TypeError", "x.dtype"),
        ({"bits": 64}, "TypeError", "x.dtype"),
        ({"lanes": 2}, "TypeError", "x.dtype"),
        ({"strides": (21, 1, 3)}, "ValueError", "x.strides"),
        ({"strides": (21, 7, -1)}, "ValueError", "x.strides"),
        ({"byte_offset": 4}, "ValueError", "x.byte_offset"),
    ],
)
def test_a_wrong_field(
    library: Library, call: Forward, field: dict[str, Any], error: str, said: str
) -> None:
    message = library.call("forward", call.arguments(x=Tensor(call.x, **field)))
    assert message.startswith(f"{error}: ")
    assert said in message
    call.check()


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"x": np.ones((2, 4, 7), F)}, "ValueError", "x.shape[1]"),
        ({"gamma": np.ones(4, F)}, "ValueError", "gamma.shape[0]"),
        ({"y": np.ones((2, 3, 8), F)}, "ValueError", "y does not have the shape"),
        ({"mean": np.ones((3, 3, 1), F)}, "ValueError", "mean does not have the shape"),
        ({"x": None}, "TypeError", "Tensor"),
        ({"momentum": np.ones(1, F)}, "ValueError", "momentum.ndim"),
        ({"request": 1.5}, "TypeError", "int"),
        ({"request": None}, "TypeError", "int"),
    ],
)
def test_a_wrong_argument(
    library: Library, call: Forward, changed: dict[str, Any], error: str, said: str
) -> None:
    message = library.call("forward", call.arguments(**changed))
    assert message.startswith(f"{error}: ")
    assert said in message
    call.check()


def test_a_wrong_count(library: Library, call: Forward) -> None:
    for wrong in (call.arguments()[:-1], [*call.arguments(), 1], []):
        assert library.call("forward", wrong).startswith("TypeError: Expected 12 arguments")
    call.check()


def test_strides_that_are_compact(library: Library, call: Forward) -> None:
    assert library.call("forward", call.arguments(x=Tensor(call.x, strides=(21, 7, 1)))) == ""
    call.check(*call.answers)
    one = Tensor(call.x[:1], strides=(-99, 7, 1))
    y, mean = np.empty((1, 3, 7), F), np.empty((1, 3, 1), F)
    assert library.call("forward", call.arguments(WRITE, x=one, y=y, mean=mean)) == ""
    np.testing.assert_allclose(y, call.answers["y"][:1], atol=1e-5)


def test_any_multiple_of_the_element_s_size(library: Library, call: Forward) -> None:
    memory = np.zeros(2 * 3 * 7 + 32, F)
    start = -memory.ctypes.data % 64 // 4
    for offset in range(1, 16):
        x = memory[start + offset :][:42].reshape(2, 3, 7)
        x[...] = call.x
        assert library.call("forward", call.arguments(x=x)) == ""
        call.check(*call.answers)


def test_no_elements(library: Library) -> None:
    """Parameter gradients are 0; dx has nothing to write."""
    dgamma, dbeta = np.full((2, 3), np.nan, F)
    x, statistic = np.empty((0, 3, 7), F), np.empty((0, 3, 1), F)
    none, no_statistic = Tensor(x, data=None), Tensor(statistic, data=None)
    inputs = [none, none, np.ones(3, F), no_statistic, no_statistic]
    assert library.call("backward", [*inputs, none, dgamma, dbeta, 0b010101]) == ""
    assert not dgamma.any()
    assert not dbeta.any()


def test_threads_are_set_through_a_global_function(library: Library) -> None:
    name = b"normgraph.set_num_threads"
    asked = (ctypes.c_char_p * 1)(name)
    text = (ctypes.c_size_t * 2)(ctypes.c_void_p.from_buffer(asked).value or 0, len(name))
    function = ctypes.c_void_p()
    assert library.ffi.TVMFFIFunctionGetGlobal(text, ctypes.byref(function)) == 0
    assert function.value
    library.ffi.TVMFFIObjectDecRef(function)


def test_without_libtvm_ffi(
    library: Library, call: Forward, repository: Path, tmp_path: Path
) -> None:
    """tests/compile/host.c defines the one function a library cannot do without."""
    program = tmp_path / "host"
    headers = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    source = repository / "tests" / "compile" / "host.c"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Werror", "-rdynamic", *headers, "-o", program, source, "-ldl"],
        check=True,
    )
    *arrays, request = call.arguments()
    content = struct.pack("<i7sqii", 7, b"forward", request, len(arrays), 5)
    for array in arrays:
        head = struct.pack("<iiiq", 2, 32, array.ndim, array.nbytes)
        content += head + struct.pack(f"<{array.ndim}q", *array.shape) + array.tobytes()
    (tmp_path / "calls").write_bytes(content)
    used = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "tvm" not in used
    subprocess.run(
        [program, library.path, tmp_path / "calls", tmp_path / "results"], cwd=tmp_path, check=True
    )
    results = np.fromfile(tmp_path / "results", F)
    for name, answer in call.answers.items():
        got, results = results[: answer.size], results[answer.size :]
        getattr(call, name).ravel()[:] = got
    call.check(*call.answers)
