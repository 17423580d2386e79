"""Rows that are measured under masks of their own: shown, marked, and never ranked with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmd_bench.config import Suite
from lmd_bench.report import Report, terminal_tables
from tests.report.conftest import MakeSuite, simulated_yardstick, write_run
from tests.report.test_build import assert_nothing_silent, build, row, table
from tests.report.test_factors import with_bases

OWN = "one of every 2 x 2 tokens of 8 px"


def write_own(out: Path, suite: Suite, name: str, seed: int = 0) -> None:
    """A run whose yardstick had masks of its own."""
    yardstick = simulated_yardstick(name, 300, 20.0, seed).model_copy(update={"own_mask": OWN, "unit_px": 8})
    write_run(out, suite, name, seed, yardstick=yardstick)


@pytest.fixture
def report(tmp_path: Path, suite: Suite) -> Report:
    """A report in which DDPM had its own masks."""
    for name in ("lmd-cs", "mae"):
        write_run(tmp_path, suite, name)
    write_own(tmp_path, suite, "ddpm")
    return build(tmp_path, suite)


def test_their_time_to_quality_is_not_ranked(report: Report) -> None:
    own, common = (row(table(report, "ttq"), name) for name in ("DDPM", "MAE"))
    for key in ("ttq_50_of_mae_s", "ttq_90_of_mae_s"):
        assert own[key].lines == ("not ranked: own mask",)
        assert own[key].kind == "missing"
        assert common[key].kind == "value"
    assert own["psnr_best_db"].kind == "value"
    assert own["own_mask"].lines[:2] == (f"own mask: {OWN}", "not ranked")
    assert_nothing_silent(report)


def test_notes_captions_and_the_terminal_say_so(report: Report) -> None:
    note = table(report, "ttq").notes[0]
    assert note.startswith("All rows but DDPM (own mask, not ranked) fill the same hidden parts of the same 32")
    page = report.page.read_text(encoding="utf-8")
    assert "All methods but those with masks of their own (own mask), which cannot be ranked with others, fill" in page
    psnr = {line[0]: line[6] for line in terminal_tables(report)[0].rows}
    assert psnr["DDPM"].endswith(" (own mask)")
    assert "own" not in psnr["MAE"]


def test_without_them_nothing_is_said_of_own_masks(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae")
    report = build(tmp_path, suite)
    assert table(report, "ttq").notes[0].startswith("All rows fill the same hidden parts")
    assert "own mask" not in report.page.read_text(encoding="utf-8")


def test_a_target_is_never_taken_of_them(tmp_path: Path, suite: Suite) -> None:
    write_own(tmp_path, suite, "mae")
    write_run(tmp_path, suite, "lmd-cs")
    report = build(tmp_path, suite)
    cells = row(table(report, "ttq"), "LMD-CS")
    assert cells["ttq_50_of_mae_s"].lines == ("no target: the reference mae was measured under its own mask",)
    assert_nothing_silent(report)


def test_one_factor_at_a_time_gives_them_no_difference(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    for seed in range(3):
        write_run(tmp_path, suite, "lmd-cs", seed)
        write_own(tmp_path, suite, "lmd-us", seed)
    cell = row(table(build(tmp_path, suite), "factors"), "LMD-US")["psnr_gain_db"]
    assert (cell.kind, cell.lines) == ("missing", ("not ranked: own mask",))
    for seed in range(3):
        write_own(tmp_path, suite, "lmd-cs", seed)
        write_run(tmp_path, suite, "lmd-us", seed)
    cell = row(table(build(tmp_path, suite), "factors"), "LMD-US")["psnr_gain_db"]
    assert cell.lines == ("no difference: lmd-cs: not ranked: own mask",)
