"""`profile` end to end; `inference` and `profile-optimizers` are in tests/harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import lmd_bench, own_process
from huggingface_hub import constants

from lmd_bench.cli.planning import plan_without_data


def test_rows_without_their_weights_are_said_and_those_in_a_folder_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMD_BENCH_WEIGHTS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    plan, _ = plan_without_data("cc", None, None, None, "cpu", tmp_path, precision="fp32", weights=tmp_path)
    assert [cell.config.row for cell in plan.cells] == ["lmd-cs"]
    said = capsys.readouterr().out
    assert "  sd: not measured: no Stable Diffusion v1.4 weights: put the folder stable-diffusion-v1-4 into" in said
    assert "  muse: not measured: no aMUSEd-256 weights: put the folder amused-256 into" in said
    for command in ("profile", "inference"):
        done = lmd_bench(command, "--suite", "cc", "--weights", tmp_path / "nowhere", "--out", tmp_path)
        assert (done.code, done.err.strip()) == (2, f"error: --weights {tmp_path / 'nowhere'}: no such folder")


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
