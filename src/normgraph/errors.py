"""The error classes. Each message says what was expected, what came, and what to do.

All derive from `NormGraphError`; each also derives from the built-in error a caller coming from
NumPy, PyTorch or ONNX would catch. `exit_code` is what the command line exits with.
"""


class NormGraphError(Exception):
    """Base class of every error normgraph raises on purpose."""

    exit_code = 2


class SpecError(NormGraphError, ValueError):
    """A `NormSpec` option, shape, dtype or kind that does not exist or does not fit the others."""


class ArgumentError(NormGraphError, ValueError):
    """A call argument with a wrong shape, layout, device, value or name."""


class ArgumentTypeError(NormGraphError, TypeError):
    """A call argument with a wrong dtype or of a wrong kind of array; a missing or surplus one."""


class TargetError(NormGraphError, ValueError):
    """A target, CPU name or CPU feature that is not known; the message lists the known ones."""


class AccuracyError(NormGraphError, ArithmeticError):
    """A kernel's result is further from float64 than its stated tolerance."""

    exit_code = 1


class ArtifactError(NormGraphError):
    """An artifact that cannot be opened."""

    exit_code = 3


class ArtifactNotFound(ArtifactError, FileNotFoundError):
    """No artifact (or no exported graphs) at the given path."""


class ArtifactCorrupt(ArtifactError):
    """An artifact whose manifest or files are not what was written."""


class ArtifactIncompatible(ArtifactError):
    """A sound artifact that this host, this version or this loader cannot run."""

    exit_code = 4


class HostError(NormGraphError, ImportError):
    """An operating system, machine or Python that normgraph does not run on."""

    exit_code = 4


class DeviceError(NormGraphError, RuntimeError):
    """A CUDA device or its driver that refuses a call, or cannot run the artifact's code."""

    exit_code = 4


class CompileError(NormGraphError, RuntimeError):
    """A graph that could not be compiled, or a kernel that failed its self-test."""

    exit_code = 5


class ToolMissing(NormGraphError, RuntimeError):
    """A program or optional package that a step needs is not installed; the message names it."""

    exit_code = 6
