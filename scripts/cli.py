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

from normgraph.scripts.cli_parser import make_parser
from normgraph.scripts.console import log
from normgraph.scripts.explain import explain

INTERRUPTED, PIPE_CLOSED = 130, 141


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
