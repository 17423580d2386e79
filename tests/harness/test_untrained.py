"""Rows of methods that come trained: evaluated once, never stepped, and told apart from those that are trained."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.mae import MAE
from baselines.stable_diffusion import StableDiffusion
from lmd_bench.errors import ConfigError
from lmd_bench.evaluation.runs import Outcome, RunsRequest, evaluate_runs
from lmd_bench.harness.estimate import estimate_row
from lmd_bench.harness.execute import NO_TRAINING, DataShelf, execute, recount
from lmd_bench.harness.inference import RECONSTRUCT, InferenceOptions
from lmd_bench.harness.inference import time_row as time_inference
from lmd_bench.harness.plan import Plan, add_rows, make_plan
from lmd_bench.harness.profile import SpeedOptions, profile
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import RunRecord, read_steps
from lmd_bench.suite_files import parse_suite
from tests.harness.test_cached_run import Silent
from tests.helpers.pipelines import save_stable_diffusion


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A suite of one row that is trained and one that comes trained."""
    folder = save_stable_diffusion(tmp_path_factory.mktemp("weights") / "tiny-sd")
    mae = {"patch_size": 8, "encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16,
           "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
    return {
        "name": "mixed",
        "title": "One trained here, one that comes trained",
        "data": {"image_size": 32, "num_train": 16, "num_held_out": 4},
        "steps": 4,
        "untimed_steps": 1,
        "recipes": {"equal": {"batch_size": 4, "lr": {"base": 1e-3, "per_images": None}}},
        "methods": {
            "sd": {
                "method": "stable-diffusion",
                "label": "SD",
                "options": {"path": str(folder), "num_inference_steps": 2},
            },
            "mae": {"method": "mae", "label": "MAE", "recipe": "equal", "options": mae},
        },
        "evaluation": {"num_checks": 2, "num_images": 4, "unit_px": 16},
        "estimator": {"half_life_steps": 2, "num_resamples": 100},
    }


def planned(values: dict[str, Any], out: Path, rows: list[str] | None = None, **changes: Any) -> Plan:
    suite = parse_suite({**values, **changes}, "test")
    return make_plan(suite, rows or list(suite.methods), device="cpu", out=out, added={}, force=False)


def with_row(values: dict[str, Any], row: str, **changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    changed["methods"][row].update(changes)
    return changed


@pytest.fixture(scope="module")
def ran(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, RunRecord]]:
    plan = planned(values, tmp_path_factory.mktemp("out"))
    shelf = DataShelf(plan)
    records = [execute(cell, shelf, command="c", environment={}, watcher=Silent()) for cell in plan.cells]
    shelf.close()
    return plan, {record.row: record for record in records}


def test_its_record_holds_what_was_evaluated_and_says_why_the_rest_is_missing(
    ran: tuple[Plan, dict[str, RunRecord]],
) -> None:
    plan, records = ran
    record = records["sd"]
    assert (record.status, record.error, record.num_steps) == ("finished", None, 0)
    assert record.timing is record.phases is record.efficiency is record.weights is None
    for figure in ("efficiency", "timing", "phases", "flops_per_step"):
        assert record.not_measured[figure] == NO_TRAINING
    assert record.cost is not None
    assert record.cost.parameters > 0 == record.cost.trainable_parameters
    assert record.yardstick is not None
    assert [(check.step, check.train_s) for check in record.yardstick.checks] == [(0, 0.0)]
    assert record.yardstick.ceiling_psnr_db is not None
    folder = plan.cells[0].folder
    assert not (folder / "weights.safetensors").exists()
    assert read_steps(folder / "steps.csv")["step"] == []


def test_the_row_beside_it_is_trained_as_ever(ran: tuple[Plan, dict[str, RunRecord]]) -> None:
    record = ran[1]["mae"]
    assert record.timing is not None
    assert record.weights is not None
    assert record.yardstick is not None
    assert [check.step for check in record.yardstick.checks] == [0, 2, 4]


def test_it_is_finished_when_asked_for_again_and_has_nothing_to_count_anew(
    ran: tuple[Plan, dict[str, RunRecord]], values: dict[str, Any]
) -> None:
    plan = planned(values, ran[0].out, estimator={"half_life_steps": 3, "num_resamples": 100})
    assert [cell.config.row for cell in plan.finished] == ["sd", "mae"]
    assert [recount(cell) for cell in plan.finished] == [False, True]


@pytest.mark.parametrize("rows", [["sd", "mae"], ["mae", "sd"]])
def test_it_looks_at_images_that_are_loaded_for_a_row_that_is_trained(
    values: dict[str, Any], tmp_path: Path, rows: list[str]
) -> None:
    recipes = {"equal": {**values["recipes"]["equal"], "augmentation": {"crop": "random_resized", "flip": True}}}
    plan = planned(values, tmp_path, rows, recipes=recipes)
    shelf = DataShelf(plan)
    first, second = (shelf.source(cell.config, command="c", on_progress=lambda *_: None) for cell in plan.cells)
    shelf.close()
    assert first is second
    assert first.num_train == 16


def test_alone_it_loads_no_training_images(values: dict[str, Any], tmp_path: Path) -> None:
    both, alone = (planned(values, tmp_path, rows) for rows in (["mae"], ["sd"]))
    sources = [
        DataShelf(plan).source(plan.cells[0].config, command="c", on_progress=lambda *_: None) for plan in (both, alone)
    ]
    assert sources[1].num_train == 1
    assert torch.equal(sources[0].held_out(4), sources[1].held_out(4))


def test_it_fills_in_the_suites_precision_and_a_row_that_is_trained_in_fp32(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"sd": set(), "mae": set()}
    for row, method in (("sd", StableDiffusion), ("mae", MAE)):
        own = method.reconstruct

        def spied(self: Any, images: Any, mask: Any, row: str = row, own: Any = own) -> Any:
            seen[row].add(torch.is_autocast_enabled("cpu"))
            return own(self, images, mask)

        monkeypatch.setattr(method, "reconstruct", spied)
    plan = planned(values, tmp_path, precision="bf16")
    shelf = DataShelf(plan)
    records = [execute(cell, shelf, command="c", environment={}, watcher=Silent()) for cell in plan.cells]
    assert [record.error for record in records] == [None, None]
    assert seen == {"sd": {True}, "mae": {False}}


def test_an_evaluation_afterwards_needs_the_weights_of_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(shutil.copytree(values["methods"]["sd"]["options"]["path"], tmp_path / "weights"))
    options = {**values["methods"]["sd"]["options"], "path": str(weights)}
    plan = planned(with_row(values, "sd", options=options), tmp_path / "out", ["sd"])
    shelf = DataShelf(plan)
    execute(plan.cells[0], shelf, command="c", environment={}, watcher=Silent())
    request = RunsRequest(plan.cells[0].folder, changes={"metrics": ["psnr"], "num_images": 4, "num_pictures": 0})

    def evaluated() -> Outcome:
        return next(evaluate_runs(request, WeightsStore(offline=True), torch.device("cpu")))

    scheduler = weights / "scheduler" / "scheduler_config.json"
    kept = scheduler.read_text()
    scheduler.write_text(kept.replace("0.012", "0.013"))
    changed = evaluated()
    assert changed.failed
    assert changed.reason == "its weights are others than when the cell ran; put them back, or run the cell again"
    scheduler.write_text(kept)
    done = evaluated()
    assert done.quality is not None
    assert done.quality.what == "filled against real, 75 % hidden in units of 16 px, with captions"
    shutil.rmtree(weights)
    gone = next(iter(evaluate_runs(replace(request, force=True), WeightsStore(offline=True), torch.device("cpu"))))
    assert gone.failed
    assert gone.reason is not None
    assert gone.reason.startswith(f"its weights cannot be used: path {weights}: no such folder")


def test_it_takes_no_recipe_and_a_method_that_is_trained_needs_one(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^methods.sd.recipe: stable-diffusion comes trained: leave out 'equal'$"):
        planned(with_row(values, "sd", recipe="equal"), tmp_path)
    with pytest.raises(ConfigError, match=r"^methods.mae.recipe: mae is trained: name a recipe \(equal\)$"):
        planned(with_row(values, "mae", recipe=None), tmp_path)


def test_compiling_a_suite_leaves_it_alone(values: dict[str, Any], tmp_path: Path) -> None:
    assert [cell.config.compile for cell in planned(values, tmp_path, compile=True).cells] == [False, True]


def test_a_method_of_the_users_own_gets_the_recipe_of_a_row_that_is_trained(
    values: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Own: ...\n")
    changed = copy.deepcopy(values)
    add_rows(changed, [f"{file}:Own"])
    assert changed["methods"]["own"]["recipe"] == "equal"


def test_a_speed_run_has_no_step_of_it_to_time(values: dict[str, Any], tmp_path: Path) -> None:
    plan = planned(values, tmp_path, ["sd"])
    options = SpeedOptions(1, 1, 0, None, False, None)
    with pytest.raises(ConfigError, match=r"^sd: comes trained: there is no training step to time; name another row$"):
        profile(plan, options, {}, command="c", environment={}, on_round=lambda _: None, save=lambda _: None)


def test_an_estimate_is_of_the_yardstick_alone(values: dict[str, Any], tmp_path: Path) -> None:
    estimate = estimate_row(planned(values, tmp_path, ["sd"]).cells[0], 1)
    assert estimate.step_s == 0
    assert estimate.total_s == estimate.check_s > 0
    assert estimate.text.startswith("comes trained, ")


def test_an_estimate_counts_what_image_quality_fills(values: dict[str, Any], tmp_path: Path) -> None:
    changed = {**values, "data": {**values["data"], "num_held_out": 8}}
    quality = {"num_images": 8, "evaluators": "scenes", "batch_size": 4}
    cell = planned(changed, tmp_path, ["sd"], image_quality=quality).cells[0]
    estimate = estimate_row(cell, 3)
    found = re.search(r", (\S+) s an image filled for image quality \(8; its networks not counted\): ", estimate.text)
    assert found is not None
    assert estimate.total_s == pytest.approx(3 * (estimate.check_s + 8 * float(found[1])), rel=0.1)


def test_what_a_picture_costs_is_timed_with_its_own_count_of_evaluations(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = planned(values, tmp_path, ["sd"]).cells[0].config
    turn = time_inference(config, 1, InferenceOptions((1,), 1, 1, 1), {}, 0, set())
    assert [(done.task, done.function_evaluations) for done in turn.rounds] == [(RECONSTRUCT, 3)]
    assert [miss.reason for miss in turn.not_measured] == ["StableDiffusion does not generate images"]
    assert turn.rounds[0].encode_ms is not None
