"""What the CPU rule leaves to measurement: the sizes at which it takes one way or another.

None of them changes what a kernel computes, but for the order of its sums. What each value was
measured beside stands in docs/benchmarks/knobs.md, from `python -m normgraph.scripts.bench_knobs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Knobs:
    """Bytes are of float32; other types have as many elements. "Far": see `slice_rule`.

    run_bytes, far_run_bytes    a block of slices covers so many bytes of consecutive memory; of far
                                arrays fewer, so that reading and writing alternate more
    long_row, far_long_row      a row of so many bytes is done alone, by wider vectors and with its
                                sums in registers; or of half as many, where its sums have more to
                                do (two inputs, several rows a slice)
    streamed_run,               run_bytes where a block's rows are made ready together to be stored
    streamed_run_of_two         past the caches (`staged_block`), of one input and of two; rounded
                                up to slices in vectors
    streamed_long_row           far_long_row there, of rows that end within a line and have
                                parameters along them
    slices, slices_of_two       the most slices of a block: contiguous ones of one input, and of two
    channels                    and those that lie apart
    short_row_vector            bytes of the vectors for rows of a block: they lie anywhere, so each
                                of 64 bytes would cross a cache line
    exact_row                   rows of a block that are shorter than this, of open extents, have
                                code for each of some ranges of lengths (`row_lengths`)
    short_row, short_row_share  a channel's rows of up to so many elements are read in columns,
                                where their square is at most so many times the number of rows
    short_streamed_share        the same share where outputs are stored past the caches
    columns, column_channels    of a block that is read in columns; one channel where its rows are
                                longer
    column_bytes                that the rows of such a block should have together, so that L2 holds
                                them
    whole_rows, whole_columns   rows from which on, and columns up to which, all columns are read in
                                order
    streamed_eighths            outputs are stored past the caches where all arrays together exceed
                                so many eighths of the last level
    streamed_row,               rows alone from so many elements on are stored past the caches: of
    streamed_ragged             shorter ones too much lies in lines that two of them share. Two of
                                them, as the code for the shorter ones costs known rows of whole
                                lines a tenth if they share it
    streamed_apart              as much where they share none
    streamed_columns            as much where channels are read in columns
    staged_columns              of rows that go side by side and end within a line, those of up to
                                so many elements are made ready together; longer ones go one by one
    turned                      slices of so many bytes of all inputs are taken from the end to the
                                front by their outputs (`turned_order`): more than L2 keeps
    ahead_bytes,                the next block is asked for while this one is stored past the caches
    ahead_bytes_of_two          where no more bytes of it than this are read: of one input or from
                                far apart, and of two inputs whose blocks follow one another
    ahead_short, ahead_long     of two inputs whose blocks follow one another it is asked for up to
                                so many elements, and from so many on, and not between
    serial                      up to so many elements the calling thread works alone: a launch of
                                the thread pool costs more than it gains
    """

    run_bytes: int = 12 * 1024
    far_run_bytes: int = 4 * 1024
    streamed_run: int = 8 * 1024
    streamed_run_of_two: int = 4 * 1024
    streamed_long_row: int = 2048
    long_row: int = 4096
    far_long_row: int = 1024
    slices: int = 32
    slices_of_two: int = 32
    channels: int = 64
    short_row_vector: int = 32
    exact_row: int = 128
    short_row: int = 2048
    short_row_share: int = 160
    short_streamed_share: int = 10240
    columns: int = 2048
    column_channels: int = 128
    column_bytes: int = 512 * 1024
    whole_rows: int = 1024
    whole_columns: int = 8192
    streamed_eighths: int = 7
    streamed_row: int = 512
    streamed_ragged: int = 256
    streamed_columns: int = 256
    staged_columns: int = 512
    streamed_apart: int = 64
    turned: int = 1536 * 1024
    ahead_bytes: int = 1024 * 1024
    ahead_bytes_of_two: int = 384 * 1024
    ahead_short: int = 2048
    ahead_long: int = 16384
    serial: int = 32768


_MEASURED = Knobs()
_CHOSEN = ContextVar("knobs", default=_MEASURED)


def knobs() -> Knobs:
    """The values to schedule by."""
    return _CHOSEN.get()


@contextmanager
def tried(**changes: int) -> Iterator[None]:
    """Schedule by other values meanwhile. Raises TypeError for a name that is no knob."""
    token = _CHOSEN.set(replace(_CHOSEN.get(), **changes))
    try:
        yield
    finally:
        _CHOSEN.reset(token)
