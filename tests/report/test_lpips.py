"""LPIPS on the yardstick's table: less is better, and without weights the reason stands in its place."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lmd_bench.config import Suite
from lmd_bench.records import Yardstick
from tests.report.conftest import MakeSuite, simulated_yardstick, write_run
from tests.report.test_build import assert_nothing_silent, build, row, table

WHY = "no AlexNet weights: put alexnet-owt-7be5be79.pth into --weights DIR (lmd-bench doctor lists all)"
KEY = "ttq_lpips_50_of_mae_s"


@pytest.fixture
def lpips_suite(make_suite: MakeSuite) -> Suite:
    targets = [{"fraction": 0.5, "of": "mae"}, {"fraction": 0.5, "of": "mae", "metric": "lpips"}]
    return make_suite(evaluation={"num_checks": 6, "unit_px": 16, "targets": targets})


def with_lpips(name: str, values: list[float], ceiling: float | None = None, seed: int = 0) -> Yardstick:
    """A run's yardstick, 0 to 30 s, with these distances at its seven checks."""
    yardstick = simulated_yardstick(name, 300, 30.0, seed)
    checks = [check.model_copy(update={"lpips": value}) for check, value in zip(yardstick.checks, values, strict=True)]
    return yardstick.model_copy(update={"checks": checks, "ceiling_lpips": ceiling})


FALLING = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.4]
"""The reference: half of its gain of 0.5 is reached at 0.55."""


def test_time_to_a_distance_is_reached_from_above_and_held(tmp_path: Path, lpips_suite: Suite) -> None:
    write_run(tmp_path, lpips_suite, "mae", yardstick=with_lpips("mae", FALLING))
    write_run(tmp_path, lpips_suite, "ddpm", yardstick=with_lpips("ddpm", [0.8, 0.5, 0.6, 0.7, 0.6, 0.55, 0.5]))
    write_run(tmp_path, lpips_suite, "lmd-us", yardstick=with_lpips("lmd-us", [0.9] * 7))
    write_run(tmp_path, lpips_suite, "lmd-cs", yardstick=with_lpips("lmd-cs", [0.9] * 7, ceiling=0.6))
    report = build(tmp_path, lpips_suite)
    found = table(report, "ttq")
    assert row(found, "MAE")[KEY].lines == ("15.0", "between 10.0 and 15.0")
    assert row(found, "DDPM")[KEY].lines == ("25.0", "between 20.0 and 25.0"), "a fall that is not held does not count"
    assert row(found, "LMD-US")[KEY].lines == ("not reached in 30 s",)
    assert row(found, "LMD-CS")[KEY].lines == ("below what its projector reaches",)
    assert row(found, "MAE")["lpips_last"].lines == ("0.400",)
    assert any("50 % of the gain in LPIPS of mae (LPIPS 0.550)" in column.title for column in found.columns)
    assert "LPIPS 0.5500, the first check of mae less that share of its gain" in " ".join(found.notes)
    assert_nothing_silent(report)


def test_it_stands_in_the_csv_under_names_without_decibels(tmp_path: Path, lpips_suite: Suite) -> None:
    write_run(tmp_path, lpips_suite, "mae", yardstick=with_lpips("mae", FALLING))
    frame = pd.read_csv(build(tmp_path, lpips_suite).folder / "ttq.csv", comment="#").set_index("row")
    assert float(frame.loc["mae", "ttq_lpips_50_of_mae_target"]) == pytest.approx(0.55)
    assert float(frame.loc["mae", "lpips_last"]) == pytest.approx(0.4)
    assert float(frame.loc["mae", "ttq_50_of_mae_target_db"]) > 11


def test_without_weights_its_cells_say_so_and_psnr_goes_on(tmp_path: Path, lpips_suite: Suite) -> None:
    for name in ("mae", "lmd-cs"):
        write_run(tmp_path, lpips_suite, name, not_measured={"lpips": WHY})
    report = build(tmp_path, lpips_suite)
    for name in ("MAE", "LMD-CS"):
        cells = row(table(report, "ttq"), name)
        assert cells["lpips_last"].lines == (f"not measured: {WHY}",)
        assert cells[KEY].lines == (f"not measured: {WHY}",)
        assert cells["ttq_50_of_mae_s"].kind == "value"
    assert f"no target: {WHY}" in " ".join(table(report, "ttq").notes)


def test_records_that_know_nothing_of_it_leave_its_columns_out(tmp_path: Path, lpips_suite: Suite) -> None:
    write_run(tmp_path, lpips_suite, "mae")
    write_run(tmp_path, lpips_suite, "lmd-cs")
    found = table(build(tmp_path, lpips_suite), "ttq")
    assert not {"lpips_last", KEY} & {column.csv[0] for column in found.columns}
    assert row(found, "MAE")["ttq_50_of_mae_s"].kind == "value"
    assert "LPIPS" not in " ".join(found.notes)
    write_run(tmp_path, lpips_suite, "ddpm", not_measured={"lpips": WHY})
    cells = row(table(build(tmp_path, lpips_suite), "ttq"), "MAE")
    assert cells["lpips_last"].lines == ("not measured: the record does not hold it",)


def test_a_reference_without_it_gives_no_target_to_rows_that_have_it(tmp_path: Path, lpips_suite: Suite) -> None:
    write_run(tmp_path, lpips_suite, "mae", not_measured={"lpips": WHY})
    write_run(tmp_path, lpips_suite, "lmd-cs", yardstick=with_lpips("lmd-cs", FALLING))
    cells = row(table(build(tmp_path, lpips_suite), "ttq"), "LMD-CS")
    assert cells[KEY].lines == (f"no target: {WHY}",)
    assert cells["lpips_last"].kind == "value"


def test_seeds_are_put_together(tmp_path: Path, lpips_suite: Suite) -> None:
    for seed in (0, 1):
        write_run(tmp_path, lpips_suite, "mae", seed, yardstick=with_lpips("mae", FALLING, seed=seed))
    cells = row(table(build(tmp_path, lpips_suite), "ttq"), "MAE")
    assert cells[KEY].lines[0].endswith("(2 of 2 reached)")
    assert cells["lpips_last"].lines == ("0.400", "0.400 to 0.400")
