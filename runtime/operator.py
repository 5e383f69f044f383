"""`load` and the `Operator` it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from normgraph.errors import ArtifactCorrupt, SpecError
from normgraph.runtime import threads
from normgraph.runtime.artifact import Artifact, open_artifact
from normgraph.runtime.call import Call
from normgraph.runtime.cuda_call import CudaCall
from normgraph.runtime.loading import LoadedLibrary, load_library
from normgraph.runtime.output_pool import pool
from normgraph.runtime.selftest import SelfTestResult, run_self_test
from normgraph.runtime.signature import Signature
from normgraph.spec import NormSpec

KINDS = ("forward", "inference", "backward", "backward_frozen", "backward_from_output")


class _NoSuchKind(SpecError, AttributeError):
    """A kind the artifact lacks; also an AttributeError, so that hasattr and getattr work."""


class Operator:
    """A loaded artifact: one callable a kind, over the shapes and the dtype it was built for.

    `forward`, `inference`, `backward`, `backward_frozen` and `backward_from_output` are there where
    the artifact holds them (`kinds`); see `Call` and its `__call__` for how each is called and
    what it returns, and `bind` for loops on fixed arrays.

    It may be used from many threads at once, and in a child after a fork.
    """

    forward: Callable[..., Any]
    inference: Callable[..., Any]
    backward: Callable[..., Any]
    backward_frozen: Callable[..., Any]
    backward_from_output: Callable[..., Any]

    def __init__(
        self, artifact: Artifact, target: str, library: LoadedLibrary, calls: Mapping[str, Call]
    ) -> None:
        self._artifact = artifact
        self._target = target
        # Another operator of the same artifact shares it as long as this one is there.
        self._library = library
        # A manifest's objects are not in a meaningful order; the table of kinds is.
        known = [kind for kind in KINDS if kind in calls]
        self._calls = {kind: calls[kind] for kind in dict.fromkeys((*known, *calls))}
        self.__dict__.update((kind, calls[kind].function()) for kind in known)

    def __getattr__(self, name: str) -> Any:
        if name in KINDS:
            raise self._lacks(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its path: another process loads the artifact that is there then."""
        return load, (str(self._artifact.path),)

    def __repr__(self) -> str:
        shape = ", ".join(str(dim) for dim in self.shape)
        return (
            f"<normgraph.Operator {self.spec.op} {self.dtype}[{shape}] for {self._target}:"
            f" {', '.join(self.kinds)}>"
        )

    @property
    def spec(self) -> NormSpec:
        """The operator and its options, every field resolved."""
        return self._artifact.spec

    @property
    def shape(self) -> tuple[int | str, ...]:
        """The shape of x: ints are fixed, names stand for any extent."""
        return self._artifact.shape

    @property
    def dtype(self) -> str:
        """The dtype of x."""
        return self._artifact.dtype

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds the artifact holds."""
        return tuple(self._calls)

    @property
    def target(self) -> str:
        """The target of the library this host runs, of those the artifact holds."""
        return self._target

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The artifact's manifest as read when it was loaded."""
        return self._artifact.manifest

    def signature(self, kind: str) -> Signature:
        """Names, dtypes and shapes of what a kind takes and gives. SpecError if it is not there."""
        return self._call(kind).signature

    def call(self, kind: str, /, *args: Any, **options: Any) -> Any:
        """The same as the attribute of that name called with the rest of the arguments."""
        return self._call(kind)(*args, **options)

    def bind(self, kind: str, /, *args: Any, **options: Any) -> Callable[[], Any]:
        """The call of a kind with its arrays bound: checked here, and not again by each call.

            call = op.bind("forward", x, gamma, beta, out={"y": y})
            y, mean, inv_std = call()

        Takes the arrays and the options out, want and grad_req as the call itself does (`Call`),
        and raises here what that raises; nothing is computed. Returns a function without arguments
        that runs the kernel on the memory of these arrays, with the values they have then, and
        returns the same arrays each time: those of `out`, and for other outputs arrays that are
        allocated here, once. So a call overwrites the results of the one before; what is to be
        kept must be copied. With grad_req "add" each call adds.

        - Nothing is copied: an input whose memory the kernel cannot take as it is (strided, not
          aligned, lazily negated) is refused with ArgumentError. A plain number for momentum is
          bound as it is.
        - The memory is held until the function is gone, and NumPy refuses to resize it until then
          (`resize`, also with refcheck=False). It is the memory that is bound, not the object: what
          is done to an array later (another shape, set_ of a tensor, another value of its `data`,
          read-only) changes nothing here.
        - Checked by each call: in backward_from_output that gamma holds no zero (not on CUDA
          devices); and of torch tensors that resize_ has not moved their memory, that none has come
          to require grad, and that none is traced or has a tangent. ArgumentError where it is not
          so, and nothing is written.
        - CUDA kernels run on the stream that is current at each call, also while a graph is
          captured. Arrays there are torch tensors or tvm_ffi.Tensor.

        Different bound calls may run on different threads as long as no two write the same array,
        so one of them only on one thread at a time.

        SpecError if the artifact has no such kind.
        """
        return self._call(kind).bind(*args, **options)

    def self_test(self) -> tuple[SelfTestResult, ...]:
        """Run the kernels on the vectors in the artifact and compare with their float64 answers.

        Returns the largest error of every output; AccuracyError where one is above its tolerance,
        ArtifactNotFound where another build has replaced the artifact since it was loaded.
        """
        return run_self_test(self._artifact, self._calls)

    def _call(self, kind: str) -> Call:
        try:
            return self._calls[kind]
        except (KeyError, TypeError):
            raise self._lacks(kind) from None

    def _lacks(self, kind: object) -> _NoSuchKind:
        return _NoSuchKind(
            f"this {self.spec.op} artifact has no kind {kind!r}; it has {', '.join(self.kinds)}."
            f" Build it with that kind, where the operator has one."
        )


def load(path: str | os.PathLike[str]) -> Operator:
    """Open the artifact at `path` and load the library this host runs best.

    path: a directory that a build wrote, or a file that `normgraph pack` wrote.

    Everything is checked here, and before anything is loaded into the process: ArtifactNotFound
    where there is no artifact, ArtifactCorrupt where its manifest or one of its files is not what
    was written, ArtifactIncompatible where this host or this version cannot run it. A build that
    could not run its own self-test leaves it to be run here: AccuracyError where it fails.
    ArgumentError where the environment variable NORMGRAPH_NUM_THREADS is wrong.

    What runs is what was checked: the artifact may be changed, replaced or removed afterwards.
    """
    pool.limit  # noqa: B018  # a wrong value in the environment is told of here, not by some call
    threads.from_environment()
    artifact = open_artifact(path)
    chosen = artifact.library()
    library = load_library(chosen)
    threads.prepare()
    calls: dict[str, Call] = {}
    for kind, signature in artifact.signatures.items():
        name = artifact.functions[kind]
        function = library.function(name)
        if function is None:
            raise ArtifactCorrupt(
                f"{chosen.path}: expected a function {name!r} for {kind}, but there is none."
                f" Build the artifact again."
            )
        if chosen.device is None:
            calls[kind] = Call(signature, artifact.spec, function)
        else:
            calls[kind] = CudaCall(signature, artifact.spec, function, chosen.device)
    if chosen.self_test != "passed":
        run_self_test(artifact, calls)
    return Operator(artifact.without_content(), chosen.target, library, calls)
