"""The paper's numbers as shipped: complete, sourced, and compared as ratios only."""

from __future__ import annotations

from importlib import resources

import pytest

from lmd_bench.errors import ConfigError
from lmd_bench.report.published import REFERENCES, load_published

NAMES = ("table1", "table2", "table3", "table4", "table5")


@pytest.mark.parametrize("name", NAMES)
def test_every_table_names_its_source_and_number(name: str) -> None:
    text = (resources.files("lmd_bench") / "published" / f"{name}.csv").read_text(encoding="utf-8")
    assert "arXiv:2312.07971" in text.splitlines()[0]
    assert text.splitlines()[1].startswith(f"# Table {name[-1]}: ")
    table = load_published(name)
    assert table.number == int(name[-1])
    assert all(set(cells) == set(table.columns) for cells in table.rows.values())


def test_ratios_are_to_the_reference_row_of_the_same_table() -> None:
    table1, table3, table5 = (load_published(name) for name in ("table1", "table3", "table5"))
    assert table1.ratio("LMD-CS", "mlt") == pytest.approx(6.92 / 17.11)
    assert table3.ratio("LMD", "mit") == pytest.approx(2.45 / 5.45)
    assert table5.ratio("w/o MAE", "mlt") == pytest.approx(16.52 / 6.92)
    for name, reference in REFERENCES.items():
        table = load_published(name)
        numeric = [c for c in table.columns if c.startswith(("mit", "ml", "mat"))]
        assert [table.ratio(reference, column) for column in numeric] == [1.0] * len(numeric)


@pytest.mark.parametrize("name", ["table1", "table3", "table5"])
def test_published_mlt_is_mit_times_mli_to_rounding(name: str) -> None:
    table = load_published(name)
    for row in table.rows:
        mit, mlt, mli = (table.value(row, column) for column in ("mit", "mlt", "mli"))
        assert mit is not None
        assert mlt is not None
        assert mli is not None
        assert abs(mit * mli - mlt) <= 0.005 * (mit + mli) + 0.02


def test_the_default_lmd_is_found_under_either_of_its_names() -> None:
    assert load_published("table3").find("LMD-CS") == "LMD"
    assert load_published("table5").find("LMD-CS") == "LMD"
    assert load_published("table1").find("LMD") == "LMD-CS"
    assert load_published("table3").find("MAE") is None
    assert load_published("table3").find(None) is None


def test_missing_published_cells_are_none_not_zero() -> None:
    table5 = load_published("table5")
    assert table5.value("LMD", "delta") is None
    assert table5.text("LMD", "delta") is None
    assert load_published("table4").ratio("LMD-CS", "fid") is None


def test_an_unknown_table_is_a_user_error() -> None:
    with pytest.raises(ConfigError, match="no published table 'table9'"):
        load_published("table9")
