"""What to tell people of an exception, and the exit code it stands for: see `cli`."""

from __future__ import annotations

from normgraph.errors import NormGraphError, ToolMissing

USAGE, BUG = 2, 70

# The extra that brings each optional module.
_EXTRA_OF = {
    "onnx": "compile",
    "tvm": "compile",
    "ml_dtypes": "compile",
    "onnxruntime": "verify",
    "torch": "torch",
    "matplotlib": "plot",
    "PIL": "plot",
}


def explain(error: Exception) -> tuple[str, int]:
    """What to print for an exception, and the exit code."""
    if isinstance(error, NormGraphError):
        return f"error: {error}", error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        if module in _EXTRA_OF:
            return (
                f"error: this needs the package {module}, which is not installed. "
                f"Run: pip install 'normgraph[{_EXTRA_OF[module]}]'",
                ToolMissing.exit_code,
            )
    if isinstance(error, MemoryError):
        detail = f": {error}" if str(error) else ""
        return f"error: not enough memory{detail}. Take a smaller shape", USAGE
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"error: {place}{error.strerror}", USAGE
    return (
        f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)",
        BUG,
    )
