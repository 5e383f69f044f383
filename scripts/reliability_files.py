"""The cases of reliability.py that are about files: a library of TVM's, a graph, a file of weights.

torch.load reads a file of 2000 weights; onnxruntime a graph that holds as many.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from normgraph.scripts.reliability_arrays import NOT_THERE, answer, judged, placed, plain

FLIPS = 200

Use = Callable[[Path], str]
Damage = Callable[[bytes], bytes]


def _written(name: str, peer: Any, folder: Path, value: float = 1.0) -> tuple[Path, Use]:
    """A file of the peer's, and a function that loads it and uses what it holds."""
    if name == "torch":
        file = folder / "state.pt"
        peer.torch.save({"gamma": peer.torch.full((2000,), value)}, file)

        def use_weights(path: Path) -> str:
            gamma = peer.torch.load(path)["gamma"]
            return "right" if bool((gamma == value).all()) else "wrong, without an error"

        return file, use_weights
    if name == "onnxruntime":
        file = folder / "forward.onnx"
        file.write_bytes(_scaling_graph(value))

        def use_graph(path: Path) -> str:
            session = peer.ort.InferenceSession(path)
            y = session.run(None, {session.get_inputs()[0].name: np.ones(2000, np.float32)})[0]
            return "right" if bool((y == value).all()) else "wrong, without an error"

        return file, use_graph
    file = folder / "forward.so"
    peer.compile().export_library(str(file))

    def use_library(path: Path) -> str:
        module = peer.tvm.runtime.load_module(str(path))
        x = placed(plain(), 0)
        return judged(peer.forward(x, None, module["forward"]), answer(x))

    return file, use_library


def _scaling_graph(value: float) -> bytes:
    """A graph of one multiplication by 2000 weights."""
    import onnx

    gamma = onnx.numpy_helper.from_array(np.full(2000, value, np.float32), "gamma")
    ports = [
        onnx.helper.make_tensor_value_info(port, onnx.TensorProto.FLOAT, [2000])
        for port in ("x", "y")
    ]
    node = onnx.helper.make_node("Mul", ["x", "gamma"], ["y"])
    graph = onnx.helper.make_graph([node], "scale", ports[:1], ports[1:], [gamma])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(model.SerializeToString())


def _ended(use: Use, path: Path) -> str:
    """What using the file in a child comes to."""
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        try:
            said = use(path)
        except Exception:
            os._exit(2)
        os._exit(0 if said == "right" else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends = {0: "right", 1: "wrong, without an error", 2: "refused", -signal.SIGALRM: "hangs"}
    return ends.get(status, "crashes")


def _damaged(damage: Damage) -> Callable[[str, Any], str]:
    def run(name: str, peer: Any) -> str:
        with TemporaryDirectory() as folder:
            file, use = _written(name, peer, Path(folder))
            file.write_bytes(damage(file.read_bytes()))
            said = use(file)
            return "not noticed" if said == "right" else said

    return run


def _flipped(name: str, peer: Any) -> str:
    """Single bits at random places."""
    random = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        file, use = _written(name, peer, Path(folder))
        content = file.read_bytes()
        for turn in range(FLIPS):
            changed = bytearray(content)
            changed[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
            path = Path(folder, f"{turn}{file.suffix}")
            path.write_bytes(changed)
            seen[_ended(use, path)] += 1
            path.unlink()
    words = {"right": "not noticed", "crashes": "crash", "hangs": "hang"}
    order = ("refused", "right", "wrong, without an error", "crashes", "hangs")
    said = ", ".join(f"{seen[each]} {words.get(each, each)}" for each in order if seen[each])
    return f"of {FLIPS}: {said}"


def _other_cpu(name: str, peer: Any) -> str:
    """A CPU with instructions that no CPU at hand had when this was written."""
    if name != "tvm":
        return NOT_THERE
    x = placed(plain(), 0)
    return judged(peer.forward(x, None, peer.compile("diamondrapids")["forward"]), answer(x))


def _other_machine(name: str, peer: Any) -> str:
    if name != "tvm":
        return NOT_THERE
    with TemporaryDirectory() as folder:
        made = peer.compile("generic", triple="aarch64-linux-gnu")
        made.export_library(f"{folder}/forward.so", cc="aarch64-linux-gnu-gcc")
        peer.tvm.runtime.load_module(f"{folder}/forward.so")
        return "loaded"


def _overwritten(name: str, peer: Any) -> str:
    """Another file is copied over the one that is in use."""
    if name != "tvm":
        return NOT_THERE
    with TemporaryDirectory() as folder:
        file = Path(folder, "forward.so")
        peer.compile().export_library(str(file))
        function = peer.tvm.runtime.load_module(str(file))["forward"]
        file.write_bytes(b"something else")
        x = placed(plain(), 0)
        return judged(peer.forward(x, None, function), answer(x))


def _replaced(name: str, peer: Any) -> str:
    """Another file takes the path of one in use, and is loaded from there."""
    if name != "tvm":
        with TemporaryDirectory() as folder:
            file, use = _written(name, peer, Path(folder))
            use(file)
            use = _written(name, peer, Path(folder), 2.0)[1]
            return use(file)
    with TemporaryDirectory() as folder:
        file = Path(folder, "forward.so")
        peer.compile().export_library(str(file))
        first = peer.tvm.runtime.load_module(str(file))["forward"]
        x = placed(plain(), 0)
        peer.forward(x, None, first)
        from tvm.script import tirx as T

        @T.prim_func  # type: ignore[untyped-decorator]
        def forward(out: T.handle) -> None:
            T.func_attr({"global_symbol": "forward"})
            y = T.match_buffer(out, (4,), "float32")
            for i in range(4):
                y[i] = T.float32(7)

        other = Path(folder, "other.so")
        peer.tvm.compile(forward, target="llvm").export_library(str(other))
        os.replace(other, file)
        y = placed(np.zeros(4, np.float32), 0)
        try:
            peer.tvm.runtime.load_module(str(file))["forward"](y)
        except TypeError:
            return "runs the old code"
        return "right" if bool((y == 7).all()) else "wrong, without an error"


def _relative_path(name: str, peer: Any) -> str:
    with TemporaryDirectory() as folder:
        file, use = _written(name, peer, Path(folder))
        os.chdir(folder)
        return use(Path(file.name))


def _no_compiler(name: str, peer: Any) -> str:
    if name != "tvm":
        return NOT_THERE
    with TemporaryDirectory() as folder:
        os.environ["PATH"] = folder
        os.environ.pop("CXX", None)
        peer.compile().export_library(f"{folder}/forward.so")
        return "right" if shutil.which("c++") is None else "a compiler was found"


def _full_disk(name: str, peer: Any) -> str:
    """No file may grow beyond 4 KB while one is written; what is left is loaded then."""
    if name == "onnxruntime":
        return NOT_THERE
    import resource

    with TemporaryDirectory() as folder:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        file = _written(name, peer, Path(folder))[0]
        file.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            file = _written(name, peer, Path(folder))[0]
            failed = "no error"
        except Exception as error:
            failed = f"`{type(error).__name__}`"
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left = "a damaged file is left" if file.exists() else "nothing is left"
        return f"{failed}; {left}"


CASES: dict[str, Callable[[str, Any], str]] = {
    "half_a_file": _damaged(lambda content: content[: len(content) // 2]),
    "nine_tenths_of_a_file": _damaged(lambda content: content[: len(content) * 9 // 10]),
    "flipped_bits": _flipped,
    "garbage_behind": _damaged(lambda content: content + bytes(range(256))),
    "other_cpu": _other_cpu,
    "other_machine": _other_machine,
    "overwritten_in_use": _overwritten,
    "replaced_in_use": _replaced,
    "relative_path": _relative_path,
    "full_disk": _full_disk,
    "no_compiler": _no_compiler,
}
