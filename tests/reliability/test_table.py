"""docs/reliability.md is what the tests of this folder and scripts/reliability.py have seen."""

from __future__ import annotations

from typing import Any


def test_the_page(page: Any, update_golden: bool) -> None:
    text = page.text(page.ours())
    if update_golden:
        page.file.write_text(text, encoding="utf-8")
    assert page.file.read_text(encoding="utf-8") == text


def test_every_case_has_a_row_and_every_row_an_outcome(page: Any, sections: Any) -> None:
    cases = [case for section in sections for case in section]
    ours = page.ours()
    assert [case.title for case in cases if not ours.get(case.title)] == []
    assert len({case.title for case in cases}) == len(cases)
    assert set(page.record["cases"]) <= {case.name for case in cases}
    assert all(set(said) == set(page.record["versions"]) for said in page.record["cases"].values())
