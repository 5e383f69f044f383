"""The console entry: `normgraph ...` and `python -m normgraph ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# 128 + SIGINT, as everywhere; before the imports are done there is no other place to take it from.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments (default: the process's) and give its exit code."""
    try:
        from normgraph.scripts.cli import run_command_line
    except KeyboardInterrupt:
        print("normgraph: interrupted", file=sys.stderr)
        return INTERRUPTED
    return run_command_line(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
