"""Numbers as text, and tables that never stay silent."""

from __future__ import annotations

import math

import pytest

from lmd_bench.report.cells import Cell, Column, Section, Table, missing, number, percent, span, to_csv, to_markdown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (412.3, "412"),
        (6.92, "6.92"),
        (0.40444, "0.404"),
        (12345.6, "12346"),
        (3.2e-5, "3.20e-05"),
        (29, "29"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_an_interval_shows_as_many_decimals_as_its_width_needs() -> None:
    assert span(412.0, 398.2, 431.4) == "[398, 431]"
    assert span(159.6, 159.14, 159.98) == "[159.1, 160.0]"
    assert span(62.5, 62.5, 62.5) == "[62.5, 62.5]"


def test_small_shares_are_not_shown_as_zero() -> None:
    assert percent(0.0) == "0 %"
    assert percent(0.00001) == "< 0.01 %"
    assert percent(0.254) == "25.4 %"
    assert percent(0.0009) == "0.09 %"


@pytest.mark.parametrize("lines", [(), ("",), ("1.0", " ")])
def test_a_cell_without_words_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a cell must say something"):
        Cell(lines)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cell_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="in a table"):
        Cell(("x",), "value", {"mit_ms": value})


def test_a_row_must_fill_every_column() -> None:
    columns = (Column("Method", ("row",)), Column("MIT", ("mit_ms",), "ms"))
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Table("t", "T", columns, (Section(None, ((missing("not run"),),)),))


def test_files_hold_reasons_heads_with_units_and_provenance() -> None:
    columns = (Column("Method", ("row",)), Column("measured", ("mit_ms", "mit_ms_low"), "ms", "MIT"))
    rows = (
        (Cell(("a|b",)), missing("not run # yet")),
        (Cell(("c",)), Cell(("1.50", "[1, 2]"), "value", {"mit_ms": 1.5})),
    )
    table = Table("t", "T", columns, (Section(None, rows),), ("A note.",))
    text = to_csv(table, ["Suite: demo"]).splitlines()
    assert text == [
        "# T", "# Suite: demo", "# A note.", "row,mit_ms,mit_ms_low",
        "a|b,not run no.  yet,not run no.  yet", 'c,1.5,"1.50 [1, 2]"',
    ]  # fmt: skip
    markdown = to_markdown(table, ["Suite: demo"])
    assert "| Method | MIT: measured, ms |" in markdown
    assert "| a\\|b | not run # yet |" in markdown
    assert "| c | 1.50<br>[1, 2] |" in markdown
    assert markdown.rstrip().endswith("Suite: demo")
