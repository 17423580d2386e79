"""The table "one factor at a time": every row against its own base."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Ratio, over_seeds, ratio, ratio_of_rounds
from lmd_bench.records import RunRecord, cell_folder, write_json
from lmd_bench.report.build import build_report
from lmd_bench.report.cells import Cell, Table
from lmd_bench.report.step_cost import measured_rows
from tests.report.conftest import SUITE, MakeSuite, make_profile, write_run
from tests.report.test_build import assert_nothing_silent, build, row, table


def with_bases(make_suite: MakeSuite, **rows: dict[str, Any]) -> Suite:
    """The demo with options and bases added to its rows."""
    methods = copy.deepcopy(SUITE["methods"])
    methods["lmd-cs"]["options"] = {"mask_schedule": "cosine", "patch_size": 2}
    methods["lmd-us"] |= {"base": "lmd-cs", "options": {"mask_schedule": "uniform", "patch_size": 2}}
    methods["lmd-cs-adan"] |= {"base": "lmd-cs", "options": methods["lmd-cs"]["options"]}
    for name, changes in rows.items():
        methods[name.replace("_", "-")] |= changes
    return make_suite(methods=methods)


def factors(out: Path, suite: Suite) -> Table:
    return table(build(out, suite), "factors")


def with_psnr(out: Path, suite: Suite, record: RunRecord, gain_db: float) -> None:
    """The record again with every check that much better."""
    assert record.yardstick is not None
    checks = [c.model_copy(update={"psnr_db": c.psnr_db + gain_db}) for c in record.yardstick.checks]
    changed = record.model_copy(update={"yardstick": record.yardstick.model_copy(update={"checks": checks})})
    write_json(cell_folder(out, suite.name, record.row, record.seed) / "record.json", changed)


def test_only_suites_that_name_bases_have_the_table(demo: tuple[Suite, Path]) -> None:
    suite, folder = demo
    assert "factors" not in {one.stem for one in build_report(folder, suite, command="c").tables}


def test_each_row_with_a_base_stands_against_it_and_not_against_the_reference(
    tmp_path: Path, make_suite: MakeSuite
) -> None:
    suite = with_bases(make_suite)
    records = {name: write_run(tmp_path, suite, name) for name in suite.methods}
    found = factors(tmp_path, suite)
    assert [cells[0].lines[0] for cells in found.rows] == ["LMD-US", "LMD-CS (Adan)"]
    mine, base = (RunEfficiency.from_dict(records[name].efficiency or {}) for name in ("lmd-cs-adan", "lmd-cs"))
    cells = row(found, "LMD-CS (Adan)")
    for key, pick in (("mit", lambda e: e.mit_ms), ("mlt", lambda e: e.headline.mlt_ms)):
        expected = ratio(pick(mine), pick(base))
        assert isinstance(expected, Ratio)
        parts = cells[f"{key}_ratio"].parts
        assert (parts[f"{key}_ratio"], parts[f"{key}_ratio_low"]) == (expected.value, expected.low)
        assert parts[f"{key}_verdict"] == expected.verdict
    assert cells["base"].lines == ("LMD-CS", "lmd-cs")


def test_what_differs_is_read_off_the_settings(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    for name in suite.methods:
        write_run(tmp_path, suite, name)
    found = factors(tmp_path, suite)
    assert row(found, "LMD-US")["differs_in"].lines == ("mask_schedule: cosine, uniform",)
    assert row(found, "LMD-CS (Adan)")["differs_in"].lines == (
        "recipe.optimizer.betas: [0.9, 0.95], [0.98, 0.92, 0.9]",
        "recipe.optimizer.name: adamw, adan",
    )


def test_a_row_of_another_method_says_in_its_note_what_differs(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite, ddpm={"base": "mae", "note": "ddpm differs from mae in everything"})
    write_run(tmp_path, suite, "ddpm")
    assert row(factors(tmp_path, suite), "DDPM")["differs_in"].lines == ("ddpm differs from mae in everything",)


def test_psnr_over_three_seeds_has_an_interval_and_a_verdict(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    for seed in range(3):
        write_run(tmp_path, suite, "lmd-cs", seed)
        with_psnr(tmp_path, suite, write_run(tmp_path, suite, "lmd-us", seed), 3.0)
        with_psnr(tmp_path, suite, write_run(tmp_path, suite, "lmd-cs-adan", seed), 0.2 + 0.3 * (seed - 1))
    found = factors(tmp_path, suite)
    gain = 4.0 * (1 - math.exp(-3)) + 3.0 - 4.6 * (1 - math.exp(-3))  # SHAPES of the fixtures, and the 3 dB above
    parts = row(found, "LMD-US")["psnr_gain_db"].parts
    assert parts["psnr_gain_db"] == pytest.approx(gain, abs=1e-6)
    low, high = parts["psnr_gain_low_db"], parts["psnr_gain_high_db"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert low < gain < high
    # Welch's t by hand: the seeds of both rows lie 0.05 dB apart, 4 degrees of freedom, t = 2.776
    assert high - gain == pytest.approx(2.7764 * math.sqrt(2 * 0.05**2 / 3), rel=1e-3)
    assert parts["psnr_verdict"] == "better"
    assert row(found, "LMD-CS (Adan)")["psnr_gain_db"].parts["psnr_verdict"] == "not distinguishable"


def test_psnr_of_one_seed_has_no_interval(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    write_run(tmp_path, suite, "lmd-cs")
    with_psnr(tmp_path, suite, write_run(tmp_path, suite, "lmd-us"), 1.0)
    cell = row(factors(tmp_path, suite), "LMD-US")["psnr_gain_db"]
    assert cell.lines == (f"{1.0 - 0.6 * (1 - math.exp(-3)):+.2f}", "no interval: fewer than three seeds")


def test_speed_runs_give_paired_ratios_of_their_steps(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    record = make_profile(suite)
    write_json(tmp_path / "demo" / "profile-b16-fp32.json", record)
    write_json(tmp_path / "demo" / "profile-b64-fp32.json", make_profile(suite, rounds=2, batch_size=64))
    found = factors(tmp_path, suite)
    cells = row(found, "LMD-CS (Adan)")
    rounds = measured_rows(record)
    mine, base = (list(rounds[name].periods.values()) for name in ("lmd-cs-adan", "lmd-cs"))
    expected = ratio_of_rounds(mine, base)
    assert isinstance(expected, Ratio)
    assert cells["step_b16_fp32_ratio"].parts["step_b16_fp32_ratio"] == expected.value
    assert cells["step_b16_fp32_ratio"].lines[-1] == "slower"
    assert cells["step_b64_fp32_ratio"].lines[1] == "a ratio needs 3 rounds, there are 2"
    assert cells["mit_ratio"].lines == ("not run",)
    assert any(note.startswith("Step: paired rounds") for note in found.notes)


def test_what_is_missing_on_either_side_says_why(tmp_path: Path, make_suite: MakeSuite) -> None:
    suite = with_bases(make_suite)
    write_run(tmp_path, suite, "lmd-us")
    profile = make_profile(suite)
    rounds = [part for part in profile.rounds if part.row != "lmd-cs"]
    lost = {"rounds": rounds, "not_measured": {"lmd-cs": "out of memory"}}
    write_json(tmp_path / "demo" / "profile-b16-fp32.json", profile.model_copy(update=lost))
    report = build(tmp_path, suite)
    cells: dict[str, Cell] = row(table(report, "factors"), "LMD-US")
    assert cells["mit_ratio"].lines == ("no ratio: lmd-cs: not run",)
    assert cells["psnr_gain_db"].lines == ("no difference: lmd-cs: not run",)
    assert cells["step_ratio"].lines == ("not measured: lmd-cs: out of memory",)
    assert cells["differs_in"].lines == ("mask_schedule: cosine, uniform",)
    assert_nothing_silent(report)


def test_seeds_are_means_in_decibels() -> None:
    figure = over_seeds([10 ** (psnr / 10) for psnr in (10.0, 12.0, 17.0)])
    assert 10 * math.log10(figure.value) == pytest.approx(13.0)  # type: ignore[union-attr]
