"""Types of arguments: what each takes a text for, and what it says where the text is none."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

# Longer texts are no numbers that anything here can use; int() refuses those of thousands.
_DIGITS = 40
_MOST_SECONDS = 3600


def shape(text: str) -> tuple[int | str, ...]:
    """`N,64,H,W` as ints and names."""
    dims = [dim.strip() for dim in text.split(",")]
    for dim in dims:
        if not (dim.isidentifier() or dim.isdecimal()):
            raise argparse.ArgumentTypeError(
                f"expected numbers and names with commas between, such as N,64,H,W; got {text!r}"
            )
        # 2^63 has 19 digits; int() refuses texts of thousands.
        if dim.isdecimal() and (len(dim.lstrip("0")) > 19 or int(dim) >= 2**63):
            raise argparse.ArgumentTypeError(f"expected sizes below 2^63; got {dim[:24]}")
    return tuple(int(dim) if dim.isdecimal() else dim for dim in dims)


def numeric_shape(text: str) -> tuple[int, ...]:
    """`8,64,56,56` as ints."""
    dims = tuple(dim for dim in shape(text) if isinstance(dim, int))
    if len(dims) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, such as 8,64,56,56; got {text!r}"
        )
    return dims


def path(text: str) -> Path:
    """A path; an empty text, which would be the working folder, is none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path; got an empty text")
    return Path(text)


def picture(text: str) -> Path:
    """The path of a picture in a format that is drawn."""
    found = path(text)
    if found.suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a .svg, .png or .pdf file; got {text!r}")
    return found


def names(text: str) -> tuple[str, ...]:
    """`dx,dgamma` as names."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected names with commas between; got {text!r}")
    return parts


def number_or(word: str) -> Callable[[str], float | None]:
    """A parser for a number, or `word`, which stands for None."""

    def parse(text: str) -> float | None:
        if text.lower() == word:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number or {word!r}; got {text!r}")
        return value

    return parse


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser for a whole number from `least`, to `most` where that is given."""

    def parse(text: str) -> int:
        found = _whole(text, least, most)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"expected a whole number {_span(least, most)}; got {text[:_DIGITS]!r}"
            )
        return found

    return parse


def wholes(least: int, most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A parser for such numbers with commas between, each of them once."""

    def parse(text: str) -> tuple[int, ...]:
        found = [_whole(part.strip(), least, most) for part in text.split(",")]
        numbers = tuple(dict.fromkeys(each for each in found if each is not None))
        if None in found:
            raise argparse.ArgumentTypeError(
                f"expected whole numbers {_span(least, most)} with commas between; "
                f"got {text[:_DIGITS]!r}"
            )
        return numbers

    return parse


def _whole(text: str, least: int, most: int | None) -> int | None:
    if not (text.isdecimal() and len(text) <= _DIGITS):
        return None
    value = int(text)
    return value if least <= value and (most is None or value <= most) else None


def _span(least: int, most: int | None) -> str:
    return f"from {least}" if most is None else f"from {least} to {most}"


def names_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser for names out of `known` with commas between, each of them once."""

    def parse(text: str) -> tuple[str, ...]:
        found = names(text)
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"expected names out of {', '.join(known)}; got {name!r}"
                )
        return tuple(dict.fromkeys(found))

    return parse


def seconds(text: str) -> float:
    """Seconds to time for: above 0, an hour at most."""
    value = _seconds(text)
    if value is None or value == 0.0:
        raise argparse.ArgumentTypeError(
            f"expected seconds above 0, {_MOST_SECONDS} at most; got {text!r}"
        )
    return value


def seconds_or_zero(text: str) -> float:
    """Seconds to wait for: 0 is not to wait."""
    value = _seconds(text)
    if value is None:
        raise argparse.ArgumentTypeError(
            f"expected seconds from 0, {_MOST_SECONDS} at most; got {text!r}"
        )
    return value


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 <= value <= _MOST_SECONDS else None
