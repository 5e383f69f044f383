"""The cases of reliability.py that are about threads and processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from normgraph.scripts.reliability_arrays import NOT_THERE, answer, judged, placed, plain

SECONDS = 10.0


def _in_threads(work: Callable[[int], None]) -> str:
    """What eight threads do at once; the first error, or right."""
    failures: list[str] = []

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except Exception as error:
            failures.append(f"`{type(error).__name__}`")

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures[0] if failures else "right"


def _eight_threads(name: str, peer: Any) -> str:
    """TVM: the virtual machine of Relax, which is what it compiles an ONNX graph to."""
    call = _relax(peer) if name == "tvm" else peer.forward
    call(plain())
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = placed(plain() + np.float32(seed), 0)
        expected = answer(x)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not wrong:
            if judged(call(x), expected) != "right":
                wrong.append(seed)

    said = _in_threads(work)
    return "wrong, without an error" if wrong else said


def _relax(peer: Any) -> Callable[[Any], Any]:
    import onnx
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    import normgraph as ng

    model = ng.graphs.build(ng.NormSpec("instance_norm"), "forward", ("N", 8, "L"))
    made = from_onnx(onnx.shape_inference.infer_shapes(model))
    machine = relax.VirtualMachine(relax.build(made, target="llvm"), peer.tvm.cpu())
    gamma, beta = placed(peer.gamma, 0), placed(peer.beta, 0)
    return lambda x: machine["main"](placed(x, 0), gamma, beta)[0].numpy()


def _fork_after_use(name: str, peer: Any) -> str:
    """The parent has computed on several threads; then a child does."""
    x = placed(plain(64, 4000), 0)
    expected = answer(x)
    options = {}
    if name == "tvm":
        os.environ["TVM_NUM_THREADS"] = "2"
        options["function"] = peer.compile(parallel=True)["forward"]
    peer.forward(x, **options)
    child = os.fork()
    if child == 0:
        os._exit(0 if judged(peer.forward(x, **options), expected) == "right" else 1)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: "right", 1: "wrong, without an error"}.get(
                os.waitstatus_to_exitcode(status), "the child crashes"
            )
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "the child hangs"


def _concurrent_load(name: str, peer: Any) -> str:
    with TemporaryDirectory() as folder:
        if name == "torch":
            torch = peer.torch
            torch.save({"gamma": torch.ones(8)}, f"{folder}/state.pt")
            return _in_threads(lambda seed: torch.load(f"{folder}/state.pt")["gamma"])
        if name == "onnxruntime":
            Path(folder, "forward.onnx").write_bytes(peer.content)
            return _in_threads(
                lambda seed: peer.ort.InferenceSession(f"{folder}/forward.onnx") and None
            )
        peer.compile().export_library(f"{folder}/forward.so")

        def load(seed: int) -> None:
            module = peer.tvm.runtime.load_module(f"{folder}/forward.so")
            assert judged(
                peer.forward(placed(plain(), 0), None, module["forward"]), answer(plain())
            )

        return _in_threads(load)


def _many_loads(name: str, peer: Any) -> str:
    """What stays in memory of loading and dropping a file 200 times."""
    with TemporaryDirectory() as folder:
        if name == "torch":
            return NOT_THERE
        if name == "onnxruntime":
            file = Path(folder, "forward.onnx")
            file.write_bytes(peer.content)

            def load() -> None:
                peer.ort.InferenceSession(file)
        else:
            file = Path(folder, "forward.so")
            peer.compile().export_library(str(file))

            def load() -> None:
                peer.tvm.runtime.load_module(str(file))["forward"]

        for _ in range(50):
            load()
        before = resident()
        for _ in range(200):
            load()
        return "no growth" if resident() - before < 2**20 else "memory grows"


def resident() -> int:
    """Bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


CASES: dict[str, Callable[[str, Any], str]] = {
    "eight_threads": _eight_threads,
    "fork_after_use": _fork_after_use,
    "concurrent_load": _concurrent_load,
    "many_loads": _many_loads,
}
