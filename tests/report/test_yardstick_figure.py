"""The yardstick's numbers behind its figure: LPIPS has a column where any check has one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lmd_bench.config import Suite
from tests.report.conftest import simulated_yardstick, write_run
from tests.report.test_build import build


def test_lpips_stands_in_the_csv_where_it_was_measured(tmp_path: Path, suite: Suite) -> None:
    yardstick = simulated_yardstick("mae", 300, 20.0, 0)
    checks = [check.model_copy(update={"lpips": 0.25}) for check in yardstick.checks]
    write_run(tmp_path, suite, "mae", yardstick=yardstick.model_copy(update={"checks": checks}))
    write_run(tmp_path, suite, "lmd-cs")
    frame = pd.read_csv(build(tmp_path, suite).folder / "yardstick.csv", comment="#")
    assert set(frame[frame.row == "mae"].lpips.astype(float)) == {0.25}
    assert set(frame[frame.row == "lmd-cs"].lpips) == {"not measured"}


def test_without_lpips_there_is_no_such_column(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae")
    frame = pd.read_csv(build(tmp_path, suite).folder / "yardstick.csv", comment="#")
    assert list(frame.columns) == ["row", "seed", "step", "train_s", "psnr_db", "ssim", "num_images"]
