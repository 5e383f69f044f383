"""What PyTorch, onnxruntime and TVM as it is do in each case of docs/reliability.md.

usage: python -m normgraph.scripts.reliability RECORD [PEER] [CASE]

Each case runs in a child process of its own and is recorded in the JSON file RECORD, with the
versions; all of them take some minutes. All three compute instance norm over (N, 8, L) in float32:
PyTorch by F.instance_norm, onnxruntime the forward graph, TVM topi.nn.instance_norm compiled to one
function for this CPU.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph.scripts import reliability_arrays, reliability_files, reliability_processes
from normgraph.scripts.reliability_arrays import placed

Array = NDArray[Any]

PACKAGES = {"torch": "torch", "onnxruntime": "onnxruntime", "tvm": "apache-tvm"}
# Longer than any case takes that ends by itself.
PATIENCE = 1500.0
# Of a message.
LONGEST = 80


class Torch:
    """F.instance_norm."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.gamma, self.beta = torch.ones(8), torch.zeros(8)

    def tensor(self, x: Array) -> Any:
        return self.torch.from_numpy(x)

    def forward(self, x: Any) -> Any:
        x = self.tensor(x) if isinstance(x, np.ndarray) else x
        y = self.torch.nn.functional.instance_norm(x, weight=self.gamma, bias=self.beta)
        return y if y.requires_grad or y.is_meta else y.numpy()


class Onnxruntime:
    """The exported forward graph."""

    def __init__(self) -> None:
        import onnxruntime

        import normgraph as ng

        model = ng.graphs.build(ng.NormSpec("instance_norm"), "forward", ("N", 8, "L"))
        self.content = model.SerializeToString()
        self.ort = onnxruntime
        self.session: Any = None
        self.gamma, self.beta = np.ones(8, np.float32), np.zeros(8, np.float32)

    def forward(self, x: Any) -> Any:
        if self.session is None:  # in the child: its threads would not come along
            self.session = self.ort.InferenceSession(self.content)
        feeds = {"x": x, "gamma": self.gamma, "beta": self.beta}
        return self.session.run(["y"], feeds)[0]


class Tvm:
    """topi.nn.instance_norm, its loops as they come or the outer one parallel."""

    def __init__(self) -> None:
        import tvm

        self.tvm = tvm
        self.function = self.compile()["forward"]
        self.gamma, self.beta = np.ones(8, np.float32), np.zeros(8, np.float32)

    def compile(self, mcpu: str = "", parallel: bool = False, triple: str = "") -> Any:
        from tvm import te, topi

        if not mcpu:
            mcpu = self.tvm.target.codegen.llvm_get_system_cpu()
        n, length = te.var("n", "int64"), te.var("length", "int64")
        x = te.placeholder((n, 8, length), "float32", "x")
        gamma, beta = (te.placeholder((8,), "float32", name) for name in ("gamma", "beta"))
        y = topi.nn.instance_norm(x, gamma, beta, channel_axis=1, axis=[2], epsilon=1e-5)
        made = te.create_prim_func([x, gamma, beta, y]).with_attr("global_symbol", "forward")
        if parallel:
            from tvm.s_tir import Schedule

            schedule = Schedule(self.tvm.IRModule({"forward": made}))
            last = schedule.get_child_blocks(schedule.get_sblock("root", func_name="forward"))[-1]
            schedule.parallel(schedule.get_loops(last)[0])
            made = schedule.mod["forward"]
        target = {"kind": "llvm", "mcpu": mcpu, **({"mtriple": triple} if triple else {})}
        return self.tvm.compile(made, target=self.tvm.target.Target(target))

    def forward(self, x: Any, y: Any = None, function: Any = None) -> Any:
        if y is None:
            y = placed(np.full(x.shape, np.nan, np.float32), 0)
        given = (placed(array, 0) for array in (self.gamma, self.beta))
        (function or self.function)(x, *given, y)
        return y


MAKE: dict[str, Callable[[], Any]] = {"torch": Torch, "onnxruntime": Onnxruntime, "tvm": Tvm}
CASES: dict[str, Callable[[str, Any], str]] = {
    **reliability_arrays.CASES,
    **reliability_processes.CASES,
    **reliability_files.CASES,
}


def observe(case: Callable[[str, Any], str], name: str, peer: Any) -> str:
    """Run one case in a child; what it says, or how it ended."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            said = case(name, peer)
        except Exception as error:
            said = described(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    heard = b""
    end = time.monotonic() + PATIENCE
    while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
        more = os.read(read, 4096)
        if not more:
            break
        heard += more
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return f"`{signal.Signals(-status).name}`"
    return heard.decode() if status == 0 else "ends the process"


def described(error: Exception) -> str:
    """The class and the beginning of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    if lines and lines[0].endswith(" when calling:"):  # TVM shows the call in between
        lines[0] = f"{lines[0].removesuffix(' when calling:')}: {lines[-1]}"
    text = " ".join(lines[0].replace("|", "/").replace("`", "'").split()) if lines else ""
    text = re.sub(r"/tmp/\w+/", "", re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text))
    return f"`{type(error).__name__}`: {text[:LONGEST]}{'...' if len(text) > LONGEST else ''}"


def main(arguments: list[str]) -> None:
    """Record what was asked for, and everything else as it was recorded before."""
    file = Path(arguments[0])
    peers = arguments[1:2] or list(MAKE)
    cases = arguments[2:] or list(CASES)
    record = json.loads(file.read_text()) if file.exists() else {"versions": {}, "cases": {}}
    for name in peers:
        peer = MAKE[name]()
        record["versions"][name] = version(PACKAGES[name])
        for case in cases:
            said = observe(CASES[case], name, peer)
            record["cases"].setdefault(case, {})[name] = said
            print(f"{name:12} {case:28} {said}", flush=True)
    file.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
