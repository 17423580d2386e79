"""`profile` end to end; `inference` and `profile-optimizers` are in tests/harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import own_process


@pytest.mark.slow
def test_profile_times_every_row_beside_the_calibrator(suite_file: Path, tmp_path: Path) -> None:
    done = own_process(
        "profile", "--suite", suite_file, "--methods", "lmd-cs,mae", "--rounds", 2, "--steps", 1, "--untimed", 0,
        "--out", tmp_path, "--device", "cpu", "--set", "log_every_steps=50", threads=torch.get_num_threads(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "calibrator" in done.stdout
    record = json.loads(next((tmp_path / "small").glob("profile-*.json")).read_text())
    assert [(r["round"], r["row"]) for r in record["rounds"]] == [
        (0, "calibrator"), (0, "lmd-cs"), (0, "mae"), (1, "calibrator"), (1, "mae"), (1, "lmd-cs"),
    ]  # fmt: skip
    assert record["instrument_us_per_step"] > 0
    table = (tmp_path / "small" / "report" / "step-cost.md").read_text()
    assert "MAE" in table
