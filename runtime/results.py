"""Named tuples for calls with several outputs, one class a kind and choice of names."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from functools import cache
from typing import Any


def _rebuild(kind: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return tuple.__new__(result_type(kind, names), values)


@cache
def result_type(kind: str, names: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """The named tuple class for these outputs; its instances can be pickled."""
    make: Any = collections.namedtuple  # the names are not literals, so no static type fits
    base = make("".join(part.title() for part in kind.split("_")), names)

    def reduce(self: Iterable[Any]) -> tuple[Any, ...]:
        return _rebuild, (kind, names, tuple(self))

    # The class is no attribute of any module, so pickle cannot find it by name.
    base.__reduce__ = reduce
    base.__module__ = __name__
    made: type[tuple[Any, ...]] = base
    return made
