"""`normgraph cache`: what the compile cache holds."""

from __future__ import annotations

import argparse
import json

from normgraph.scripts.console import table


def cache(options: argparse.Namespace) -> int:
    """Print where the compile cache is and what it holds; with --clear, empty it first."""
    from normgraph.compile.cache import FOLDER, LIMIT, SWITCH, from_environment

    kept = from_environment()
    removed = kept.clear() if kept is not None and options.clear else None
    usage = None if kept is None else kept.usage()
    if options.json:
        shown = {
            "on": kept is not None,
            "folder": None if kept is None else str(kept.folder),
            "entries": 0 if usage is None else usage.entries,
            "bytes": 0 if usage is None else usage.size,
            "limit": 0 if kept is None else kept.limit,
            "removed": 0 if removed is None else removed.entries,
        }
        print(json.dumps(shown, indent=2))
        return 0
    if kept is None or usage is None:
        print(f"the compile cache is off ({SWITCH}=off, {LIMIT}=0, or no home folder)")
        return 0
    if removed is not None:
        print(f"removed {removed.entries} entries, {removed.size} bytes")
    rows = [
        ("folder:", kept.folder, f"set by {FOLDER}"),
        ("entries:", str(usage.entries), ""),
        ("bytes:", str(usage.size), f"of {kept.limit}, set by {LIMIT}"),
    ]
    print(table(rows))
    return 0
