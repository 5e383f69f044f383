"""The command line: parse, call one command, turn what it raises into a message and an exit code.

Results go to stdout, progress and errors to stderr. Exit codes: 0 ok, 1 accuracy failed, 2 usage,
3 artifact missing or damaged, 4 this host cannot run it, 5 compile failed, 6 a tool or an optional
package is missing, 70 a bug in normgraph, 130 interrupted, 141 stdout is closed or its
reader went away.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from normgraph.errors import NormGraphError, ToolMissing
from normgraph.scripts.cli_parser import make_parser
from normgraph.scripts.console import log

USAGE, BUG, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141

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


def run_command_line(arguments: Sequence[str]) -> int:
    """Run `normgraph <arguments>` and return its exit code; raises nothing but SystemExit."""
    debug = False
    try:
        try:
            options = make_parser().parse_args(arguments)
            debug = options.debug
            code: int = options.command(options)
        finally:
            # Also after --help, which leaves by SystemExit. None is a stdout that was closed.
            if sys.stdout is not None:
                sys.stdout.flush()
        return PIPE_CLOSED if sys.stdout is None else code
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        log("normgraph: interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        log(f"normgraph: {message}")
        return code


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
