"""Image quality of cells: measured off the clock, the real side once, and never at the cost of a training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.captioned import csv_folder
from helpers.methods import Tiny
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lmd_bench.config import DataConfig, EvaluationConfig, ImageQualityConfig, Suite
from lmd_bench.errors import ConfigError, TrainingError, WeightsError
from lmd_bench.evaluation import runs
from lmd_bench.evaluation.runs import Outcome, RunsRequest, evaluate_runs
from lmd_bench.evaluators.resnet import NUM_FEATURES
from lmd_bench.harness import image_quality
from lmd_bench.harness.environment import environment
from lmd_bench.harness.execute import DataShelf, execute
from lmd_bench.harness.image_quality import ImageQualityRunner
from lmd_bench.harness.image_quality_plan import image_quality_bytes
from lmd_bench.harness.plan import Plan, make_plan
from lmd_bench.metrics.image_metrics import EvaluatorSet
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import (
    PICTURES,
    QUALITY_BOUNDS,
    STATISTICS,
    ImageQuality,
    RunRecord,
    cell_folder,
    read_bounds,
    read_run,
    write_json,
)
from lmd_bench.suite_files import parse_suite, save_suite
from tests.evaluation.fakes import CountingFeatures, use_counting_features
from tests.harness.test_cached_run import Silent

HERE = Path(__file__)
N = 6
REAL_OPEN = EvaluatorSet.open
ADDED = {name: f"{HERE}:{name.title()}" for name in ("noisy", "own", "broken", "normalised")}


class Noisy(Tiny):
    """Fills with noise around the mean, and generates."""

    def reconstruct_captioned(self, images: Tensor, mask: Tensor, captions: Sequence[str]) -> Tensor:
        assert len(captions) == len(images)
        return (self.reconstruct(images, mask) + 0.1 * torch.rand_like(images)).clamp(0, 1)

    def sample(self, num_images: int) -> Tensor:
        return torch.rand(num_images, 3, self.data.image_size, self.data.image_size)


class Own(Tiny):
    """Takes masks of its own: the left half is hidden."""

    mask_pattern = "the left half"

    def own_masks(self, masks: Tensor) -> Tensor:
        own = torch.zeros(len(masks), 2, 2, dtype=torch.bool)
        own[:, :, 0] = True
        return own


class Broken(Tiny):
    """Cannot fill."""

    def reconstruct_captioned(self, images: Tensor, mask: Tensor, captions: Sequence[str]) -> Tensor:
        raise RuntimeError("no\nsuch kernel")


class Normalised(Tiny):
    """Has nothing to do with pixels."""

    @classmethod
    def yardstick_obstacle(cls, config: Any) -> str | None:
        return "normalised targets"


def suite_values(rows: Sequence[str], **changes: Any) -> dict[str, Any]:
    return {
        "name": "quality",
        "title": "Image quality",
        "data": {"image_size": 32, "num_train": 8, "num_held_out": N},
        "steps": 2,
        "untimed_steps": 0,
        "seeds": [0, 1],
        "recipes": {"one": {"batch_size": 4, "lr": {"base": 1e-3, "per_images": None}, "ema_decay": 0.5}},
        "methods": {row: {"method": row, "label": row, "recipe": "one"} for row in rows},
        "evaluation": {"num_checks": 1, "num_images": 4, "unit_px": 16},
        "image_quality": {"num_images": N, "batch_size": 4, "num_pictures": 5, "num_samples": 3, "kid_subsets": 2},
        "estimator": {"half_life_steps": 1, "num_resamples": 100},
        **changes,
    }


def plan_of(values: dict[str, Any], out: Path, *, force: bool = True) -> Plan:
    suite = parse_suite(values, "test")
    weights = WeightsStore(offline=True)
    return make_plan(suite, list(suite.methods), device="cpu", out=out, added=ADDED, force=force, weights=weights)


def run(values: dict[str, Any], out: Path) -> dict[tuple[str, int], RunRecord]:
    plan = plan_of(values, out)
    shelf, machine, watcher = DataShelf(plan), environment("cpu"), Silent()
    save_suite(out / plan.suite.name, plan.suite)
    records = [execute(cell, shelf, command="c", environment=machine, watcher=watcher) for cell in plan.cells]
    shelf.close()
    assert all(record.status == "finished" for record in records), [record.error for record in records]
    return {(record.row, record.seed): record for record in records}


@dataclass
class Finished:
    """A suite that has run, and how many images the extractor saw meanwhile."""

    out: Path
    suite: Suite
    records: dict[tuple[str, int], RunRecord]
    num_seen: int

    def cell(self, row: str, seed: int = 0) -> Path:
        return cell_folder(self.out, "quality", row, seed)


@pytest.fixture(scope="module")
def features() -> Iterator[CountingFeatures]:
    with pytest.MonkeyPatch.context() as patched:
        yield use_counting_features(patched)


@pytest.fixture(scope="module")
def finished(features: CountingFeatures, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Nothing may change it: copy it."""
    out = tmp_path_factory.mktemp("out")
    values = suite_values(["noisy", "own", "broken", "normalised"])
    before = features.num_seen
    records = run(values, out)
    return Finished(out, parse_suite(values, "test"), records, features.num_seen - before)


def evaluated(path: Path, **request: Any) -> list[Outcome]:
    wanted = RunsRequest(path, added=ADDED, **request)
    return list(evaluate_runs(wanted, WeightsStore(offline=True), torch.device("cpu")))


# -- in a run -----------------------------------------------------------------------------------------------------


def test_every_cell_that_fills_has_its_figures_with_all_that_they_depend_on(finished: Finished) -> None:
    record = finished.records["noisy", 1]
    quality = record.image_quality
    assert quality is not None
    assert quality.num_images == N
    assert quality.what == "filled against real, 75 % hidden in units of 16 px, with captions"
    assert quality.values.keys() == {"fid", "kid", "precision", "recall", "psnr_db", "ssim"}
    assert quality.not_measured.keys() == {"kid_std", "clip_score", "lpips"}
    assert quality.evaluators["features"].name == "tiny features"
    assert quality.seed == 1
    assert quality.fill_s is not None
    assert quality.settings["num_images"] == N
    assert "image_quality" not in record.not_measured
    assert read_run(finished.cell("noisy", 1) / "record.json") == record


def test_the_real_side_is_measured_once_for_all_rows_and_seeds(finished: Finished) -> None:
    """Once as the ceiling, once as the floor, and the filled images of two rows with two seeds each."""
    assert finished.num_seen == N * (2 + 4)
    assert len(list((finished.out / "quality" / STATISTICS).iterdir())) == 1


def test_bounds_are_the_real_images_and_grey_over_the_same_images(finished: Finished) -> None:
    bounds = read_bounds(finished.out / "quality" / QUALITY_BOUNDS)
    quality = finished.records["noisy", 0].image_quality
    assert quality is not None
    assert abs(bounds.truth.values["fid"]) < 1e-6
    assert bounds.truth.values["psnr_db"] == 100.0
    assert bounds.grey.values["psnr_db"] < 25
    assert bounds.grey.values["fid"] > 0
    assert bounds.grey.what == "mid-grey against real, 75 % hidden in units of 16 px"
    assert bounds.truth.real_digest == bounds.grey.real_digest == quality.real_digest


def test_pictures_are_strips_of_tiles_and_samples_of_rows_that_generate(finished: Finished) -> None:
    for row in ("noisy", "own"):
        for name in ("original", "masked", "filled"):
            with Image.open(finished.cell(row) / PICTURES / f"{name}.png") as image:
                assert image.size == (5 * 32, 32)
    with Image.open(finished.cell("noisy") / PICTURES / "samples.png") as image:
        assert image.size == (3 * 32, 32)
    assert not (finished.cell("own") / PICTURES / "samples.png").exists()
    cells = [finished.cell(row, seed) for row in ("noisy", "own") for seed in (0, 1)]
    strips = [(cell / PICTURES / "original.png").read_bytes() for cell in cells]
    assert len(set(strips)) == 1


def test_own_masks_are_measured_as_such(finished: Finished) -> None:
    quality = finished.records["own", 0].image_quality
    assert quality is not None
    assert quality.what == "filled against real, 50 % hidden in units of 16 px, own masks: the left half"


def test_what_fails_is_a_reason_and_the_training_is_kept(finished: Finished) -> None:
    record = finished.records["broken", 0]
    assert record.status == "finished"
    assert record.timing is not None
    assert record.weights is not None
    assert record.image_quality is None
    assert record.not_measured["image_quality"] == "RuntimeError: no such kernel"
    noted = [note for note in record.notes if note.startswith("image quality")]
    assert noted == ["image quality: not measured: RuntimeError: no such kernel"]


def test_a_method_without_pixels_says_why(finished: Finished) -> None:
    record = finished.records["normalised", 0]
    assert record.image_quality is None
    assert record.not_measured["image_quality"] == "normalised targets"


def test_figures_do_not_depend_on_the_other_rows(finished: Finished, tmp_path: Path) -> None:
    alone = run(suite_values(["noisy"], seeds=[1]), tmp_path)
    assert without_time(alone["noisy", 1]) == without_time(finished.records["noisy", 1])


def test_a_row_of_another_size_has_a_real_side_of_its_own(features: CountingFeatures, tmp_path: Path) -> None:
    values = suite_values(["noisy", "own"], seeds=[0])
    values["methods"]["own"]["image_size"] = 64
    before = features.num_seen
    records = run(values, tmp_path)
    small, large = records["noisy", 0].image_quality, records["own", 0].image_quality
    assert small is not None
    assert large is not None
    assert (small.image_size, large.image_size) == (32, 64)
    assert small.real_digest != large.real_digest
    assert features.num_seen - before == N * (3 + 2)
    assert read_bounds(tmp_path / "quality" / QUALITY_BOUNDS).truth.image_size == 32


def test_a_run_again_replaces_pictures_and_uses_the_statistics_on_disk(
    finished: Finished, features: CountingFeatures, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    stale = cell_folder(out, "quality", "noisy", 0) / PICTURES / "samples.png"
    values = suite_values(["noisy"], seeds=[0])
    values["image_quality"]["num_samples"] = 0
    before = features.num_seen
    run(values, out)
    assert not stale.exists()
    assert features.num_seen - before == N  # another number of pictures leaves the bounds as they are


def folder_values(folder: Path) -> dict[str, Any]:
    data = {"name": "folder", "path": str(folder), "image_size": 32, "num_held_out": N}
    return suite_values(["noisy"], seeds=[0], data=data)


def recaption(folder: Path) -> None:
    captions = folder / "captions.csv"
    captions.write_text(captions.read_text().replace(" a ", " the ").replace(",a ", ",the "))


def test_other_captions_than_those_of_a_finished_run_are_noticed(features: CountingFeatures, tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "images")
    values, out = folder_values(folder), tmp_path / "out"
    first = run(values, out)["noisy", 0].image_quality
    assert first is not None
    assert first.captions_digest is not None
    cell = cell_folder(out, "quality", "noisy", 0)
    bounds = read_bounds(out / "quality" / QUALITY_BOUNDS)
    assert evaluated(cell)[0].reason == "measured before; --force measures it again"
    assert not plan_of(values, out, force=False).cells

    recaption(folder)
    with pytest.raises(ConfigError, match=rf"with other captions than {folder} has now: `lmd-bench evaluate {cell} "):
        plan_of(values, out, force=False)
    assert evaluated(cell)[0].reason != "measured before; --force measures it again"
    evaluated(cell, force=True)
    second = read_run(cell / "record.json").image_quality
    assert second is not None
    assert second.captions_digest not in (None, first.captions_digest)
    assert second.real_digest == first.real_digest
    assert not plan_of(values, out, force=False).cells
    now = read_bounds(out / "quality" / QUALITY_BOUNDS)
    assert now.truth.captions_digest == second.captions_digest != bounds.truth.captions_digest


def test_a_method_that_wants_captions_is_not_measured_without(
    features: CountingFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = csv_folder(tmp_path / "images")
    run(folder_values(folder), tmp_path / "out")
    (folder / "captions.csv").unlink()
    cell = cell_folder(tmp_path / "out", "quality", "noisy", 0)
    monkeypatch.setattr(Tiny, "wants_captions", True)
    refused = evaluated(cell, force=True)[0]
    assert refused.failed
    assert refused.reason == "it fills what captions say, and the held-out images have none"
    monkeypatch.setattr(Tiny, "wants_captions", False)
    found = evaluated(cell, force=True)[0].quality
    assert found is not None
    assert found.what.endswith(" px, without captions")


# -- in the plan --------------------------------------------------------------------------------------------------


def test_a_plan_says_what_cannot_be_measured_and_why(tmp_path: Path) -> None:
    notes = plan_of(suite_values(["noisy"]), tmp_path).notes
    start = "FID, KID, precision and recall: not measured: no Inception weights"
    assert any(note.startswith(start) for note in notes), notes
    assert any(note.startswith("LPIPS: not measured: no AlexNet weights") for note in notes), notes


def test_more_images_than_are_held_out_and_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = suite_values(["noisy"])
    values["image_quality"]["num_images"] = N + 1
    with pytest.raises(ConfigError, match=r"num_images: 7 images, but data\.num_held_out holds back only 6"):
        plan_of(values, tmp_path)
    values = suite_values(["noisy"])
    values["evaluation"] = {"num_checks": 0, "unit_px": 5}
    with pytest.raises(ConfigError, match="units of 5 px do not tile images of 32 px"):
        plan_of(values, tmp_path)


def test_statistics_on_disk_are_estimated_from_images_features_and_sizes(tmp_path: Path) -> None:
    def estimated(sizes: list[int], **values: Any) -> int:
        quality = ImageQualityConfig(num_pictures=0, num_samples=0, **values)
        return image_quality_bytes(quality, sizes)

    for number in (5, 700):
        statistics = FeatureStatistics()
        statistics.update(torch.rand(number, NUM_FEATURES))
        statistics.save(tmp_path / "file", {"extractor": "x" * 60, "images": "0" * 16})
        size = (tmp_path / "file").stat().st_size
        assert size <= estimated([64, 64], num_images=number, evaluators="scenes") <= size + 4096
    one = estimated([64], num_images=700)
    assert one == pytest.approx(700 * 2048 * 4 + 2048 * 2049 * 8, abs=4096)
    assert estimated([64, 128, 64], num_images=700) == 2 * one
    assert estimated([64], metrics=("psnr", "lpips")) == 0


# -- afterwards ---------------------------------------------------------------------------------------------------


def without_time(record: RunRecord) -> Any:
    assert record.image_quality is not None
    return record.image_quality.model_copy(update={"fill_s": None})


@pytest.fixture
def later(finished: Finished, tmp_path: Path) -> Path:
    """The finished suite as if image quality had never been measured."""
    shutil.copytree(finished.out / "quality", tmp_path / "quality")
    for path in (tmp_path / "quality").glob("*/*/record.json"):
        write_json(path, read_run(path).model_copy(update={"image_quality": None}))
    for name in (STATISTICS, PICTURES):
        for path in (tmp_path / "quality").rglob(name):
            shutil.rmtree(path)
    (tmp_path / "quality" / QUALITY_BOUNDS).unlink()
    return tmp_path / "quality"


def test_a_run_evaluated_later_has_the_figures_that_it_would_have_had(finished: Finished, later: Path) -> None:
    outcomes = {outcome.name: outcome for outcome in evaluated(later)}
    for row, seed in (("noisy", 0), ("noisy", 1), ("own", 0), ("own", 1)):
        assert outcomes[f"{row} seed {seed}"].quality is not None
        record = read_run(later / row / f"seed-{seed}" / "record.json")
        assert without_time(record) == without_time(finished.records[row, seed])
        for name in ("filled", "masked"):
            there = finished.cell(row, seed) / PICTURES / f"{name}.png"
            assert (later / row / f"seed-{seed}" / PICTURES / f"{name}.png").read_bytes() == there.read_bytes()
    assert (later / QUALITY_BOUNDS).read_bytes() == (finished.out / "quality" / QUALITY_BOUNDS).read_bytes()
    assert outcomes["broken seed 0"].failed
    assert outcomes["broken seed 0"].reason == "RuntimeError: no such kernel"
    assert outcomes["normalised seed 0"].reason == "normalised targets"


def test_cells_that_are_measured_are_left_alone_unless_forced(later: Path, features: CountingFeatures) -> None:
    cell = later / "noisy" / "seed-0"
    first = evaluated(cell)
    before = features.num_seen
    again = evaluated(cell)
    assert first[0].quality is not None
    assert again[0].quality is None
    assert again[0].reason == "measured before; --force measures it again"
    assert features.num_seen == before
    assert evaluated(cell, force=True)[0].quality is not None
    assert features.num_seen == before + N


def test_a_figure_that_can_be_measured_by_now_is_reason_enough(later: Path) -> None:
    """As when weights have come since: the record lacks more than would be lacking now."""
    cell = later / "noisy" / "seed-0"
    evaluated(cell)
    record = read_run(cell / "record.json")
    assert record.image_quality is not None
    lacking = {**record.image_quality.not_measured, "fid": "no Inception weights"}
    values = {name: value for name, value in record.image_quality.values.items() if name != "fid"}
    quality = record.image_quality.model_copy(update={"not_measured": lacking, "values": values})
    write_json(cell / "record.json", record.model_copy(update={"image_quality": quality}))
    found = evaluated(cell)[0].quality
    assert found is not None
    assert found.model_copy(update={"fill_s": None}) == without_time(record)


def quality_of(cell: Path) -> ImageQuality:
    found = read_run(cell / "record.json").image_quality
    assert found is not None
    return found


def test_metrics_are_added_one_after_the_other_and_none_is_lost(later: Path, finished: Finished) -> None:
    cell = later / "noisy" / "seed-0"
    for metrics in (["psnr"], ["fid", "ssim"]):
        assert evaluated(cell, changes={"metrics": metrics})[0].quality is not None
    assert quality_of(cell).values.keys() == {"psnr_db", "fid", "ssim"}
    assert quality_of(cell).settings["metrics"] == ["fid", "psnr", "ssim"]
    again = evaluated(cell, changes={"metrics": ["psnr"]})[0]
    assert again.reason == "measured before; --force measures it again"
    assert evaluated(cell)[0].quality is not None
    assert quality_of(cell).model_copy(update={"fill_s": None}) == without_time(finished.records["noisy", 0])
    for side in (finished.out / "quality", later):
        bounds = read_bounds(side / QUALITY_BOUNDS)
        assert bounds.grey.values.keys() == {"fid", "kid", "precision", "recall", "psnr_db", "ssim"}


def test_figures_of_other_images_stand_in_the_way_unless_forced(later: Path) -> None:
    cell = later / "noisy" / "seed-0"
    evaluated(cell)
    before = quality_of(cell)
    fewer = {"num_images": 4, "metrics": ["psnr"]}
    refused = evaluated(cell, changes=fewer)[0]
    assert refused.failed
    assert refused.reason == "its figures are of other settings: 6 images, not 4; --force replaces them"
    assert quality_of(cell) == before
    forced = evaluated(cell, changes=fewer, force=True)[0]
    assert forced.note is not None
    assert "SSIM that stood there are gone: of other settings (6 images, not 4)" in forced.note
    assert quality_of(cell).values.keys() == {"psnr_db"}


def test_force_keeps_figures_that_are_not_asked_for_where_they_can_stand(later: Path) -> None:
    cell = later / "noisy" / "seed-0"
    evaluated(cell)
    before = quality_of(cell)
    outcome = evaluated(cell, changes={"metrics": ["psnr"]}, force=True)[0]
    assert outcome.note is None
    assert quality_of(cell).values == before.values


def test_bounds_of_the_suite_are_not_replaced_by_those_of_other_settings(later: Path) -> None:
    evaluated(later / "noisy" / "seed-0")
    bounds = (later / QUALITY_BOUNDS).read_bytes()
    for changes in ({"num_images": 4}, {"metrics": ["psnr"]}, {"batch_size": 3}):
        assert evaluated(later / "own" / "seed-0", changes=changes, force=True)[0].quality is not None
        assert (later / QUALITY_BOUNDS).read_bytes() == bounds


def test_networks_are_opened_once_for_all_sizes_and_closed_at_the_end(
    later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ImageQualityRunner] = []
    close = ImageQualityRunner.close_evaluators
    monkeypatch.setattr(ImageQualityRunner, "close_evaluators", lambda self: (closed.append(self), close(self))[1])
    evaluated(later)
    assert all(side.evaluators is None for runner in closed for side in runner._sides.values())
    assert len(closed) == 1


def test_the_set_of_another_size_gets_the_networks_of_the_first(tmp_path: Path) -> None:
    data = DataConfig(num_train=8, num_held_out=N, image_size=32)
    settings = ImageQualityConfig(num_images=N, evaluators="scenes")
    weights = WeightsStore(offline=True)
    runner = ImageQualityRunner(tmp_path, settings, EvaluationConfig(unit_px=16), data, weights, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EvaluatorSet, "open", REAL_OPEN)
        small, large = runner._open(32)[1], runner._open(64)[1]
    assert small.extractor is large.extractor is not None
    assert small.clip is large.clip is not None


# -- what fails ---------------------------------------------------------------------------------------------------


def test_samples_that_cannot_be_made_cost_no_figure(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def undefined(*_: object) -> Tensor:
        raise TrainingError("generated images are misshapen or not finite")

    monkeypatch.setattr(image_quality, "sample_tiles", undefined)
    cell = later / "noisy" / "seed-0"
    found = evaluated(cell)[0].quality
    assert found is not None
    assert "fid" in found.values
    assert found.not_measured["samples"] == "generated images are misshapen or not finite"
    assert {path.stem for path in (cell / PICTURES).iterdir()} == {"original", "masked", "filled"}


def test_pictures_that_cannot_be_saved_cost_no_figure(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_quality, "save_pictures", full)
    found = evaluated(later / "noisy" / "seed-0")[0].quality
    assert found is not None
    assert "fid" in found.values
    for name in ("pictures", "samples"):
        assert found.not_measured[name] == "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_statistics_that_cannot_be_saved_are_a_note(
    later: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(FeatureStatistics, "save", full)
    cell = later / "noisy" / "seed-0"
    found = evaluated(cell)[0].quality
    assert found is not None
    assert "fid" in found.values
    (note,) = found.notes
    assert ".safetensors: not saved: " in note
    assert f"image quality: {note}" in read_run(cell / "record.json").notes


def test_one_cell_that_runs_out_of_memory_leaves_the_others_alone(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = runs.load_method_weights

    def short(folder: Path, added: Any) -> Any:
        if folder.parent.name == "noisy":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return opened(folder, added)

    monkeypatch.setattr(runs, "load_method_weights", short)
    outcomes = {outcome.name: outcome for outcome in evaluated(later)}
    assert outcomes["noisy seed 0"].failed
    assert outcomes["noisy seed 0"].reason == "OutOfMemoryError: CUDA out of memory"
    assert outcomes["own seed 0"].quality is not None


def test_a_record_that_cannot_be_written_is_told(later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    outcome = evaluated(later / "noisy" / "seed-0")[0]
    assert outcome.failed
    assert outcome.reason is not None
    assert outcome.reason.endswith("record.json cannot be written: no space left on device")


# -- through the evaluators that ship -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "has_std", "has_recall"), [(6, False, True), (3, False, False)])
def test_reasons_of_few_images_reach_the_record(later: Path, number: int, has_std: bool, has_recall: bool) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EvaluatorSet, "open", REAL_OPEN)
        cell = later / "noisy" / "seed-0"
        found = evaluated(cell, changes={"evaluators": "scenes", "num_images": number})[0].quality
    assert found is not None
    assert quality_of(cell) == found
    assert {"fid_scenes", "kid_scenes", "clip_score_scenes", "psnr_db", "ssim"} <= found.values.keys()
    assert found.not_measured["kid_std_scenes"].startswith(f"KID: each subset holds all {number} images")
    assert ("recall_scenes" in found.values) is has_recall
    if not has_recall:
        assert "at least 4 images a side are needed" in found.not_measured["recall_scenes"]
    assert found.notes == []


def test_subsets_that_differ_have_a_deviation(later: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EvaluatorSet, "open", REAL_OPEN)
        changes = {"evaluators": "scenes", "metrics": ["kid"], "kid_subset_size": 4, "kid_subsets": 10}
        found = evaluated(later / "noisy" / "seed-0", changes=changes)[0].quality
    assert found is not None
    assert found.values.keys() == {"kid_scenes", "kid_std_scenes"}
    assert found.values["kid_std_scenes"] > 0


def test_the_other_evaluators_stand_in_the_way_of_figures_that_are_there(later: Path) -> None:
    cell = later / "noisy" / "seed-0"
    evaluated(cell)
    before = quality_of(cell)
    refused = evaluated(cell, changes={"evaluators": "scenes"})[0]
    assert refused.failed
    assert refused.reason is not None
    assert "evaluators real, not scenes; --force replaces them" in refused.reason
    assert quality_of(cell) == before


def test_other_settings_can_be_given(later: Path) -> None:
    found = evaluated(later / "own" / "seed-0", changes={"metrics": ["psnr"], "num_images": 4})[0].quality
    assert found is not None
    assert found.values.keys() == {"psnr_db"}
    assert found.num_images == 4


def test_failed_cells_and_cells_without_weights_say_so_and_are_left_alone(later: Path) -> None:
    failed, bare = later / "noisy" / "seed-0" / "record.json", later / "own" / "seed-0" / "record.json"
    write_json(failed, read_run(failed).model_copy(update={"status": "failed", "error": "loss is nan"}))
    write_json(bare, read_run(bare).model_copy(update={"weights": None}))
    reasons = {outcome.name: outcome.reason for outcome in evaluated(later)}
    assert reasons["noisy seed 0"] == "failed when it ran: loss is nan"
    assert reasons["own seed 0"] == "its weights were not kept (--no-save-weights): run the cell again"


def test_a_path_without_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        evaluated(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no records"):
        evaluated(tmp_path)


def test_weights_that_are_there_and_wrong_are_refused_before_any_cell_is_measured(later: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet-owt-7be5be79.pth").write_bytes(b"others")
    store = WeightsStore(tmp_path / "weights", True, hash_cache=tmp_path / "hashes.json")
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79\.pth: "):
        evaluate_runs(RunsRequest(later, added=ADDED), store, torch.device("cpu"))
    narrow = RunsRequest(later, {"metrics": ["ssim"]}, added=ADDED)
    assert evaluate_runs(narrow, store, torch.device("cpu")) is not None
