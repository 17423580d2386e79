"""What is on disk when something fails once the training is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmd_bench.config import Suite
from lmd_bench.harness.evaluate import YardstickRunner
from lmd_bench.harness.execute import DataShelf, execute
from lmd_bench.harness.plan import Plan, make_plan
from lmd_bench.harness.weights import load_method_weights
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import YARDSTICK_BOUNDS, read_run
from tests.harness.test_cached_run import Silent

SIZES = {"patch_size": 8, "encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16,
         "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "title": "Tiny",
        "data": {"image_size": 32, "num_train": 8, "num_held_out": 4},
        "steps": 2,
        "untimed_steps": 0,
        "recipes": {"one": {"batch_size": 4, "lr": {"base": 1e-3}}},
        "methods": {"mae": {"label": "MAE", "method": "mae", "recipe": "one", "options": SIZES}},
        "evaluation": {"num_checks": 1, "num_images": 4, "unit_px": 16},
        "estimator": {"half_life_steps": 1, "num_resamples": 100},
    }
)


def planned(out: Path) -> Plan:
    store = WeightsStore(offline=True)
    return make_plan(SUITE, ["mae"], device="cpu", out=out, added={}, force=False, weights=store)


def test_a_summary_that_fails_is_a_reason_and_loses_neither_checks_nor_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(YardstickRunner, "summary", fails)
    plan = planned(tmp_path)
    cell = plan.cells[0]
    shelf = DataShelf(plan)
    record = execute(cell, shelf, command="c", environment={}, watcher=Silent())
    shelf.close()
    assert record.status == "finished"
    assert record.not_measured[YARDSTICK_BOUNDS] == "RuntimeError: no such kernel"
    assert record.timing is not None
    assert record.yardstick is not None
    assert [check.step for check in record.yardstick.checks] == [0, 2]
    assert record.yardstick.mean_colour_psnr_db is None
    assert load_method_weights(cell.folder)[1] == cell.config
    assert read_run(cell.folder / "record.json") == record


def test_an_end_during_the_summary_leaves_the_training_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(YardstickRunner, "summary", stopped)
    plan = planned(tmp_path)
    cell = plan.cells[0]
    with pytest.raises(KeyboardInterrupt):
        execute(cell, DataShelf(plan), command="c", environment={}, watcher=Silent())
    record = read_run(cell.folder / "record.json")
    assert record.status == "finished"
    assert record.not_measured[YARDSTICK_BOUNDS] == "stopped before its end; --force runs the cell again"
    assert record.weights is not None
    assert record.yardstick is not None
    assert len(record.yardstick.checks) == 2
    assert load_method_weights(cell.folder)[1] == cell.config
    assert [cell.config.row for cell in planned(tmp_path).finished] == ["mae"]
