"""The report: the worst element, failures that must not pass, text and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from normgraph.scripts.verify_report import FAILED, NOT_RUN, PASSED, Report, Row, compare

PLACE = ("backward", "dx", "kernel", "float64", "2x3 N(0,1)")


def _report(*rows: object) -> Report:
    return Report("a b", "instance_norm", "float32", "N,3", "cpu", 0, None, {}, rows)  # type: ignore[arg-type]


def test_the_worst_element_is_the_one_nearest_its_bound() -> None:
    want = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    allowed = np.full((2, 3), 0.1)
    allowed[1, 2] = 10.0
    got = want.copy()
    got[0, 1] += 0.05
    got[1, 2] += 1.0
    row = compare(PLACE, got, want, allowed, "float32", "why")
    assert row.status == PASSED
    assert row.index == (0, 1)
    assert (row.got, row.want, row.tolerance) == (2.05, 2.0, 0.1)
    assert row.max_abs == 1.0
    assert row.max_rel == 1.0 / 32.0
    assert row.ulp == pytest.approx(0.05 * 2**22)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails(bad: float) -> None:
    want = np.ones(4)
    got = want.copy()
    got[2] = bad
    row = compare(PLACE, got, want, np.full(4, 1e3), "float32", "")
    assert row.status == FAILED
    assert row.index == (2,)
    json.loads(_report(row).to_json())


def test_nan_where_nan_is_expected_passes_and_elsewhere_fails() -> None:
    one, nan = np.ones(2), np.array([1.0, np.nan])
    allowed = np.full(2, 1.0)
    assert compare(PLACE, nan, nan, allowed, "float32", "").status == PASSED
    assert compare(PLACE, one, nan, allowed, "float32", "").status == FAILED


def test_another_shape_fails() -> None:
    row = compare(PLACE, np.ones((2, 1)), np.ones(2), np.ones(2), "float32", "")
    assert row.status == FAILED
    assert "shape" in row.reason


def test_something_must_pass_and_nothing_fail() -> None:
    good = compare(PLACE, np.ones(2), np.ones(2), np.ones(2), "float32", "")
    bad = compare(PLACE, np.zeros(2), np.ones(2), np.full(2, 0.5), "float32", "")
    skipped = Row(*PLACE, NOT_RUN, reason="no kernel for it")
    assert _report(good, skipped).ok
    assert not _report(good, bad).ok
    assert not _report(skipped).ok
    assert not _report().ok


def test_text_and_json_say_the_same() -> None:
    bad = compare(PLACE, np.zeros(2), np.ones(2), np.full(2, 0.5), "float32", "the reason")
    report = _report(
        bad, Row(*PLACE[:2], "onnxruntime", *PLACE[3:], NOT_RUN, reason="no kernel for it")
    )
    text = report.to_text()
    assert "FAILED backward dx, kernel against float64" in text
    assert "got 0.0, expected 1.0, 5.0e-01 allowed" in text
    assert "no kernel for it" in text
    assert "Repeat with: normgraph verify 'a b'" in text
    assert "0 passed, 1 failed, 1 not run" in text
    read = json.loads(report.to_json())
    assert read["ok"] is False
    assert [row["status"] for row in read["rows"]] == [FAILED, NOT_RUN]
    assert read["rows"][0]["index"] == [0]
    assert read["rows"][0]["source"] == "the reason"


def test_a_line_stands_for_the_worst_of_its_cases() -> None:
    near = compare(PLACE, np.full(2, 1.4), np.ones(2), np.full(2, 0.5), "float32", "")
    far = compare((*PLACE[:4], "other"), np.ones(2), np.ones(2), np.full(2, 0.5), "float32", "")
    lines = _report(far, near).to_text().splitlines()
    table = [line for line in lines if line.startswith("backward ")]
    assert len(table) == 1
    assert "2x3 N(0,1)" in table[0]
