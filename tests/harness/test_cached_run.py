"""Rows that read cached latents: they learn what rows that encode learn, and their record says what was paid before."""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.cli import main
from lmd_bench.config import DataConfig, Suite
from lmd_bench.data.folders import scan_folder
from lmd_bench.errors import ConfigError
from lmd_bench.harness.environment import environment
from lmd_bench.harness.execute import DataShelf, execute
from lmd_bench.harness.plan import Plan, make_plan
from lmd_bench.harness.profile import SCHEDULE_STEPS, SpeedOptions, time_row
from lmd_bench.projector.cache import read_meta
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.training_split import SPLIT_FILE, split_of_folder
from lmd_bench.records import RunRecord, cell_folder, read_steps
from lmd_bench.report.build import build_report
from lmd_bench.report.cells import number
from lmd_bench.suite_files import parse_suite, save_suite
from tests.projector.test_projector import tiny_autoencoder

STEPS = 160
ENCODING = ("plain", "still")
CACHED = ("cached", "cached-twice", "still-cached")


def suite_values(weights: Path, steps: int = STEPS) -> dict[str, Any]:
    """Rows that encode in every step and rows that do not, with flips and (still) without; epochs of four steps."""
    projector = {"kind": "kl", "path": str(weights)}
    options = {
        "projector": projector,
        "patch_size": 2,
        "encoder_width": 32,
        "encoder_depth": 1,
        "encoder_heads": 2,
        "decoder_width": 32,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }
    auto = {**options, "projector": {**projector, "cache": "auto"}}
    recipe = {"batch_size": 8, "lr": {"base": 2e-3, "per_images": None}}

    def row(name: str, recipe: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"method": "lmd", "label": name, "recipe": recipe, "options": copy.deepcopy(options)}

    return {
        "name": "cached",
        "title": "Cached latents",
        "data": {"image_size": 32, "num_train": 32, "num_held_out": 4},
        "steps": steps,
        "untimed_steps": 1,
        "recipes": {"flips": recipe, "still": {**recipe, "augmentation": {"flip": False}}},
        "methods": {
            "plain": row("plain", "flips", options),
            "cached": row("cached", "flips", auto),
            "cached-twice": row("cached-twice", "flips", auto),
            "still": row("still", "still", options),
            "still-cached": row("still-cached", "still", auto),
        },
        "evaluation": {"num_checks": 1, "num_images": 4, "unit_px": 16},
        "estimator": {"half_life_steps": 4, "num_resamples": 100},
    }


@dataclass
class Silent:
    """A watcher that keeps what it is told of encoding."""

    encodings: list[tuple[int, int, float]] = field(default_factory=list)

    def began(self, config: Any) -> None: ...

    def encoded(self, num_images: int, total: int, images_per_s: float) -> None:
        self.encodings.append((num_images, total, images_per_s))

    def trained(self, step: int, loss: float, mask_ratio: float | None, steps_per_s: float) -> None: ...

    def checked(self, step: int, psnr_db: float) -> None: ...

    def filled(self, num_images: int, total: int) -> None: ...

    def ended(self, record: Any) -> None: ...


@dataclass
class Finished:
    """A suite that has run."""

    out: Path
    suite: Suite
    plan: Plan
    records: dict[str, RunRecord]
    watcher: Silent

    def losses(self, row: str) -> list[float]:
        steps = read_steps(cell_folder(self.out, "cached", row, 0) / "steps.csv")
        return [loss for loss, timed in zip(steps["loss"], steps["timed"], strict=True) if timed and loss is not None]


def planned(values: dict[str, Any], out: Path, **options: Any) -> Plan:
    suite = parse_suite(values, "test")
    return make_plan(suite, list(suite.methods), device="cpu", out=out, added={}, force=False, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny-f4"
    tiny_autoencoder().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def finished(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("out")
    plan = planned(suite_values(weights), out)
    watcher, shelf, machine = Silent(), DataShelf(plan), environment("cpu")
    records = {}
    for cell in plan.cells:
        records[cell.config.row] = execute(cell, shelf, command="the command", environment=machine, watcher=watcher)
    shelf.close()
    assert all(record.status == "finished" for record in records.values()), [r.error for r in records.values()]
    return Finished(out, plan.suite, plan, records, watcher)


# -- what a run learns ------------------------------------------------------------------------------------------------


def test_a_run_on_the_cache_trains_to_the_same_losses(finished: Finished) -> None:
    """With flips: 4 views stand for the 40 an encoding run sees. The last quarter's mean loss is equal within 3 %."""
    plain, cached = finished.losses("plain"), finished.losses("cached")
    means = [sum(losses[-40:]) / 40 for losses in (plain, cached)]
    assert means[1] == pytest.approx(means[0], rel=0.03)
    assert means[0] < 0.8 * plain[0]
    assert cached != plain


def test_while_views_last_and_without_augmentation_losses_are_equal(finished: Finished) -> None:
    """Four epochs of four steps see the four views in the order of an encoding run with the cache's view seed.

    Not bit for bit: the cache was encoded in batches of 32, the run encodes 8 at once.
    """
    assert finished.losses("cached")[:16] == pytest.approx(finished.losses("plain")[:16], rel=1e-5)
    assert finished.losses("still-cached")[:50] == pytest.approx(finished.losses("still")[:50], rel=1e-4)
    assert finished.losses("cached-twice") == finished.losses("cached")


def test_the_yardstick_still_looks_at_real_images(finished: Finished) -> None:
    first = {row: record.yardstick.checks[0].psnr_db for row, record in finished.records.items() if record.yardstick}
    assert len(first) == 5
    assert len(set(first.values())) == 1
    ceilings = {record.yardstick.ceiling_psnr_db for record in finished.records.values() if record.yardstick}
    assert len(ceilings) == 1
    assert None not in ceilings


# -- what its record says ---------------------------------------------------------------------------------------------


def test_the_record_says_what_encoding_took_and_rows_with_equal_needs_share_a_cache(finished: Finished) -> None:
    caches = {row: finished.records[row].data["latent_cache"] for row in CACHED}
    assert caches["cached"] == caches["cached-twice"]
    assert caches["cached"]["folder"] != caches["still-cached"]["folder"]
    assert (caches["cached"]["views"], caches["still-cached"]["views"]) == (4, 1)
    assert len(list((finished.out / "cached" / "latents").iterdir())) == 2
    for row in CACHED:
        facts = caches[row]
        meta = read_meta(Path(facts["folder"]))
        assert facts["seconds"] == meta.seconds > 0
        assert facts["num_bytes"] == facts["views"] * 32 * 5 * 8 * 8 * 4
        assert meta.command == "the command"
        assert any("encoding" in note and "off the clock" in note for note in finished.records[row].notes)
    assert all("latent_cache" not in finished.records[row].data for row in ENCODING)
    assert finished.watcher.encodings[-1][:2] == (32, 32)
    digests = {record.data["digest"] for record in finished.records.values()}
    assert len(digests) == 1


def test_steps_on_a_cache_neither_spend_nor_count_the_projector(finished: Finished, weights: Path) -> None:
    plain, cached = finished.records["plain"], finished.records["cached"]
    assert plain.cost is not None
    assert cached.cost is not None
    assert plain.phases is not None
    assert cached.phases is not None
    projector = open_projector(ProjectorConfig(kind="kl", path=str(weights)))
    with FlopCounterMode(display=False) as counter:
        projector.to("meta").encode(torch.rand(8, 3, 32, 32, device="meta"))
    assert plain.cost.flops_per_step is not None
    assert cached.cost.flops_per_step == plain.cost.flops_per_step - counter.get_total_flops()
    assert cached.phases.projector_ms < 0.05 * plain.phases.projector_ms
    assert cached.phases.data_ms > 0


def test_speed_runs_time_cached_rows_on_noise_and_need_no_cache(finished: Finished, weights: Path) -> None:
    values = suite_values(weights)
    values["methods"]["cached"]["options"]["projector"]["cache"] = "nowhere"
    plan = planned(values, finished.out / "elsewhere", reads_data=False)
    changes = {"steps": SCHEDULE_STEPS}
    configs = {cell.config.row: cell.config.model_copy(update=changes) for cell in plan.cells}
    options = SpeedOptions(rounds=1, steps=2, untimed_steps=1, batch_size=None, keep_memory=False, progress=None)
    measured, row = time_row(configs["cached"], options, {}, 0, describe=True)
    _, plain = time_row(configs["plain"], options, {}, 0, describe=True)
    assert row is not None
    assert plain is not None
    assert row.projector == "tiny-f4, cached latents"
    assert plain.projector == "tiny-f4"
    assert row.flops_per_step is not None
    assert plain.flops_per_step is not None
    assert row.flops_per_step < plain.flops_per_step
    assert max(measured.phases_ms["projector"]) < 1.0
    assert not (finished.out / "elsewhere").exists()


def test_tables_show_cached_latents_and_what_they_cost_before(finished: Finished) -> None:
    folder = finished.out / "cached"
    save_suite(folder, finished.suite)
    report = build_report(folder, finished.suite, command="test")
    page = report.page.read_text()
    assert page.count("cached latents") >= 3
    for row in CACHED:
        facts = finished.records[row].data["latent_cache"]
        assert facts["seconds"] > 0
        shown = f"encoded before: {number(facts['seconds'])} s, {number(facts['num_bytes'] / 2**20)} MiB"
        assert shown in page, shown


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_counts_a_cache_once_and_says_that_it_will_be_made(weights: Path, tmp_path: Path) -> None:
    plan = planned(suite_values(weights), tmp_path, save_weights=False)
    values = suite_values(weights)
    del values["methods"]["cached-twice"]
    fewer = planned(values, tmp_path, save_weights=False)
    assert sum("encoded first, off the clock" in note for note in plan.notes) == 3
    per_cell = (plan.disk_bytes - fewer.disk_bytes) - (STEPS + 1) * 160
    assert per_cell == 64 * 1024  # a further row on the same cache writes its steps and record, no latents
    without = copy.deepcopy(values)
    for name in ("cached", "still-cached"):
        del without["methods"][name]["options"]["projector"]["cache"]
    latents = fewer.disk_bytes - planned(without, tmp_path, save_weights=False).disk_bytes
    assert latents == (4 + 1) * 32 * 5 * 8 * 8 * 4
    assert list(tmp_path.iterdir()) == []


def test_a_later_run_uses_the_cache_that_is_there_and_refuses_a_damaged_one(
    finished: Finished, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.out / "cached" / "latents", tmp_path / "cached" / "latents")
    plan = planned(suite_values(weights), tmp_path)
    assert all(need.num_bytes == 0 for need in plan.caches.values())
    assert not any("encoded first" in note for note in plan.notes)
    (plan.caches["cached"].folder / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"methods\.cached\.options\.projector: latent cache .*meta\.json is missing"):
        planned(suite_values(weights), tmp_path)


def test_a_cache_of_other_images_is_refused_before_anything_runs(
    finished: Finished, weights: Path, tmp_path: Path
) -> None:
    values = suite_values(weights)
    values["methods"]["cached"]["options"]["projector"]["cache"] = finished.records["cached"].data["latent_cache"][
        "folder"
    ]
    values["data"]["seed"] = 1
    with pytest.raises(ConfigError, match=r"methods\.cached\.options\.projector: .* data scenes \(.*\), wanted scenes"):
        planned(values, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- the command ------------------------------------------------------------------------------------------------------


def test_lsp_encode_makes_the_cache_that_a_row_names(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmd-bench", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    encode = ("lsp", "encode", "--projector", weights, "--data", "scenes", "--image-size", 32, "--num-images", 32)
    out = tmp_path / "latents"
    code, said, errors = command(*encode, "--views", 2, "--out", out, "--device", "cpu")
    assert code == 0, errors
    assert "64/64 images encoded" in said
    assert f"{out}: 2 x 32 images as latents 5x8x8 float32" in said
    values = suite_values(weights)
    values["methods"]["cached"]["options"]["projector"]["cache"] = str(out)
    need = planned(values, tmp_path / "out").caches["cached"]
    assert (need.folder, need.views, need.num_bytes) == (out, 2, 0)

    code, _, errors = command(*encode, "--views", 0, "--out", tmp_path / "none")
    assert code == 2
    assert errors.count("\n") == 1
    assert "views" in errors
    code, _, errors = command(*encode, "--out", out)
    assert code == 2
    assert "there is something already" in errors
    code, _, errors = command(*encode[:-4], "--image-size", 30, "--out", tmp_path / "none")
    assert code == 2
    assert "not divisible by its factor 4" in errors
    code, _, errors = command(*encode[:-4], "--image-size", 0, "--out", tmp_path / "none")
    assert code == 2
    assert "image_size" in errors
    code, _, errors = command(*encode[:-2], "--num-images", 0, "--out", tmp_path / "none")
    assert code == 2
    assert "num_train" in errors
    assert not (tmp_path / "none").exists()


def test_a_plan_says_where_a_projector_may_have_seen_held_out_images(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "tiny-f4")
    (tmp_path / "images").mkdir()
    for index in range(64):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    values = suite_values(tmp_path / "tiny-f4")
    values["data"] = {"name": "folder", "path": str(tmp_path / "images"), "image_size": 32, "num_held_out": 8}
    for name in ("cached", "cached-twice", "still-cached"):
        del values["methods"][name]
    for seed, told in ((0, 0), (1, 2)):
        data = DataConfig(name="folder", path=str(tmp_path / "images"), num_held_out=8, seed=seed)
        split = split_of_folder(scan_folder(tmp_path / "images", data), seed)
        (tmp_path / "tiny-f4" / SPLIT_FILE).write_text(split.model_dump_json())
        notes = planned(values, tmp_path / "out").notes
        assert sum("may have been trained on" in note and "tiny-f4" in note for note in notes) == told
