"""JSON from files that others may have written: bounded, with one meaning, fit for a message."""

from __future__ import annotations

import json
import math
from typing import Any

# An artifact's manifest nests seven deep; a target has some ninety features.
_DEEPEST = 32
_MOST_ENTRIES = 1024
_LONGEST_TEXT = 1024
_LARGEST_INTEGER = 2**63 - 1


def parse(content: bytes) -> Any:
    """The value in `content`, which is UTF-8.

    Raises ValueError also for what JSON or Python's reader of it allows and nothing needs: a key
    twice in an object, NaN and infinities, integers beyond 64 bits, characters that are not to be
    printed, and what is nested or long without end.
    """
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r:.60} twice in one object")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _check(value: Any) -> None:
    """Level by level, so that no depth of nesting is too deep for it."""
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, (dict, list)):
                if len(each) > _MOST_ENTRIES:
                    raise ValueError(
                        f"it has a list or object of {len(each)} entries, and {_MOST_ENTRIES} are"
                        f" the most"
                    )
                inner += each
                inner += each.values() if isinstance(each, dict) else ()
            elif isinstance(each, str):
                if len(each) > _LONGEST_TEXT:
                    raise ValueError(
                        f"it has a text of {len(each)} characters, and {_LONGEST_TEXT} are the most"
                    )
                if not each.isprintable():
                    raise ValueError(f"it has characters that cannot be printed: {each!a:.60}")
            elif isinstance(each, int) and abs(each) > _LARGEST_INTEGER:
                raise ValueError(f"it has an integer of {each.bit_length()} bits")
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("it has a number that is too large")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested too deeply, and {_DEEPEST} levels are the most")
