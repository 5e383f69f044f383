"""What a verification found: one row a comparison, as text and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normgraph.scripts.console import table
from normgraph.scripts.verify_tolerance import ulp

Array = NDArray[Any]
Float64 = NDArray[np.float64]

PASSED, FAILED, NOT_RUN = "PASSED", "FAILED", "not run"


@dataclass(frozen=True)
class Row:
    """One output of one kind, compared once.

    subject, against  who computed the value (kernel, onnxruntime, reference) and what it is held
                      against (float64, onnxruntime, differences)
    max_abs, max_rel  the largest error; the same over the largest expected value
    index             the worst element: the one whose error is largest beside its tolerance
    got, want, ulp    there: both values, and the error in units in the last place of `want`
    tolerance         what that element was allowed, absolute; `source` says where it comes from
    """

    kind: str
    output: str
    subject: str
    against: str
    case: str
    status: str
    dtype: str = ""
    max_abs: float | None = None
    max_rel: float | None = None
    index: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None
    ulp: float | None = None
    tolerance: float | None = None
    source: str = ""
    reason: str = ""

    @property
    def relative_tolerance(self) -> float | None:
        """The tolerance over the largest expected value, to be read beside `max_rel`."""
        if self.tolerance is None or not self.max_abs or not self.max_rel:
            return None
        return self.tolerance * self.max_rel / self.max_abs


def compare(
    place: tuple[str, str, str, str, str],
    got: Array,
    want: Array,
    allowed: Float64,
    dtype: str,
    source: str,
    index: Sequence[tuple[int, ...]] | None = None,
) -> Row:
    """The row for `got` against `want`; place is (kind, output, subject, against, case).

    `index` names the elements where only some were compared. A wrong shape and a NaN on one side
    alone are failures.
    """
    if got.shape != want.shape:
        reason = f"expected shape {want.shape}, got {got.shape}"
        return Row(*place, FAILED, dtype, source=source, reason=reason)
    found = got.astype(np.float64)
    wanted = want.astype(np.float64)
    if found.size == 0:
        return Row(*place, PASSED, dtype, 0.0, 0.0, source=source, reason="no elements")
    with np.errstate(invalid="ignore"):
        error = np.abs(found - wanted)
    error[np.isnan(found) & np.isnan(wanted)] = 0.0
    error[(found == wanted) & np.isinf(wanted)] = 0.0
    error[np.isnan(error)] = np.inf
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(error > 0.0, error / allowed, 0.0)
    flat = int(np.argmax(share))
    place_in = tuple(int(i) for i in np.unravel_index(flat, wanted.shape))
    largest = float(np.max(np.abs(wanted)))
    worst = float(error.max())
    return Row(
        *place,
        PASSED if bool(np.all(error <= allowed)) else FAILED,
        dtype,
        max_abs=worst,
        max_rel=worst / largest if largest > 0.0 else worst,
        index=place_in if index is None else index[flat],
        got=float(found[place_in]),
        want=float(wanted[place_in]),
        ulp=float(error[place_in] / ulp(wanted[place_in], dtype)),
        tolerance=float(allowed[place_in]),
        source=source,
    )


@dataclass(frozen=True)
class Report:
    """All rows of one artifact. `ok`: something was compared and nothing failed."""

    artifact: str
    operator: str
    dtype: str
    shape: str
    target: str
    seed: int
    requested_shape: tuple[int, ...] | None
    versions: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        statuses = [row.status for row in self.rows]
        return PASSED in statuses and FAILED not in statuses

    @property
    def command(self) -> str:
        """The command that repeats this verification."""
        words = ["normgraph", "verify", self.artifact]
        if self.requested_shape is not None:
            words += ["--shape", ",".join(map(str, self.requested_shape))]
        if self.seed:
            words += ["--seed", str(self.seed)]
        return shlex.join(words)

    def count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    def _worst_cases(self) -> list[Row]:
        """Of the rows that differ in their case alone, the one nearest to (or past) its bound."""
        groups: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.output, row.subject, row.against), []).append(row)
        return [max(group, key=_badness) for group in groups.values()]

    def _counts(self) -> str:
        return ", ".join(f"{self.count(each)} {each.lower()}" for each in (PASSED, FAILED, NOT_RUN))

    def worst(self, kind: str, output: str, subject: str = "kernel") -> Row | None:
        """The row of that output with the largest error beside its tolerance, against float64."""
        rows = [
            row
            for row in self.rows
            if (row.kind, row.output, row.subject) == (kind, output, subject)
            and row.against == "float64"
            and row.max_abs is not None
        ]
        return max(rows, key=_share, default=None)

    def to_json(self) -> str:
        head = {
            "ok": self.ok,
            "status": PASSED if self.ok else FAILED,
            "artifact": self.artifact,
            "operator": self.operator,
            "dtype": self.dtype,
            "shape": self.shape,
            "target": self.target,
            "seed": self.seed,
            "command": self.command,
            "versions": self.versions,
        }
        rows = [_jsonable(asdict(row)) for row in self.rows]
        return json.dumps({**head, "rows": rows}, indent=2)

    def to_text(self) -> str:
        shown = self._worst_cases()
        sources = list(dict.fromkeys(row.source for row in shown if row.source))
        cases = list(dict.fromkeys(row.case for row in self.rows))
        lines = [
            f"{self.artifact}: {self.operator} {self.dtype} ({self.shape}), target {self.target}",
            f"Each line is the worst of its cases: {', '.join(cases)}",
            "",
        ]
        lines.append(table([_HEADER, *(_cells(row, sources) for row in shown)]))
        lines += ["", "Tolerances:"]
        lines += [f"  [{place + 1}] {source}" for place, source in enumerate(sources)]
        skipped = dict.fromkeys(row.reason for row in self.rows if row.status == NOT_RUN)
        if skipped:
            lines += ["", "Not run:"]
            lines += [f"  {reason}" for reason in skipped]
        for row in self.rows:
            if row.status == FAILED:
                lines += ["", *_failure(row)]
        lines += [
            "",
            f"{PASSED if self.ok else FAILED}: {self._counts()}",
            f"Repeat with: {self.command}",
        ]
        return "\n".join(lines)


_HEADER = (
    "kind", "output", "compared", "case", "max abs", "max rel", "ulp", "worst at", "allowed", "",
)  # fmt: skip


def _badness(row: Row) -> tuple[int, float]:
    return (NOT_RUN, PASSED, FAILED).index(row.status), _share(row)


def _share(row: Row) -> float:
    """The error of the worst element over what it was allowed."""
    if row.got is None or row.want is None or not row.tolerance:
        return 0.0
    return abs(row.got - row.want) / row.tolerance


def _cells(row: Row, sources: Sequence[str]) -> tuple[str, ...]:
    index = "" if row.index is None else "[" + ",".join(map(str, row.index)) + "]"
    note = f" [{sources.index(row.source) + 1}]" if row.source else ""
    return (
        row.kind,
        row.output,
        f"{row.subject} / {row.against}",
        row.case,
        _number(row.max_abs),
        _number(row.max_rel),
        "" if row.ulp is None else f"{row.ulp:.3g}",
        index,
        _number(row.tolerance) + note,
        row.status,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _failure(row: Row) -> list[str]:
    lines = [f"FAILED {row.kind} {row.output}, {row.subject} against {row.against}, {row.case}"]
    if row.reason:
        lines.append(f"  {row.reason}")
    if row.index is not None:
        lines.append(
            f"  worst at {list(row.index)}: got {row.got!r}, expected {row.want!r}, "
            f"{_number(row.tolerance)} allowed"
        )
    return lines


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """The row with numbers JSON has no spelling for (inf, nan) as strings."""
    return {
        key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in row.items()
    }
