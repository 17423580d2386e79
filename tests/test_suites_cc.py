"""Suite cc, Table 4: its rows, rows that lack published weights, and the whole line at toy size."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image

from lmd_bench.config import Suite
from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError
from lmd_bench.harness.plan import Plan, make_plan
from lmd_bench.pretrained import Manifest, WeightsStore
from lmd_bench.records import read_bounds, read_run
from lmd_bench.suite_files import load_suite
from tests.helpers.commands import lmd_bench
from tests.helpers.pipelines import save_amused, save_stable_diffusion

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of scenes with captions.csv."""
    folder = tmp_path_factory.mktemp("captioned")
    scenes, numbers = Scenes(3, 32), list(range(NUM_IMAGES))
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        for number, image, caption in zip(numbers, scenes.render(numbers), scenes.captions(numbers), strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02d}.png")
            rows.writerow([f"{number:02d}.png", caption])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --weights with tiny pipelines under the published ones' names."""
    folder = tmp_path_factory.mktemp("weights")
    save_stable_diffusion(folder / "stable-diffusion-v1-4")
    save_amused(folder / "amused-256")
    return folder


def unhashed_manifest() -> Manifest:
    """A manifest that takes any folder with an index for the weights of its name."""
    entry = {"what": "tiny", "used_for": "tests", "licence": "none", "hub": "none/none", "is_folder": True,
             "files": [{"name": "model_index.json"}]}  # fmt: skip
    names = {"stable-diffusion-v1-4": "Stable Diffusion v1.4", "amused-256": "aMUSEd-256", "alexnet": "AlexNet"}
    return Manifest.model_validate({"weights": {name: {**entry, "title": title} for name, title in names.items()}})


def unhashed(folder: Path) -> WeightsStore:
    """A store in which the names mean whatever lies in the folder."""
    return WeightsStore(folder, offline=True, manifest=unhashed_manifest())


def planned(captioned: Path, out: Path, store: WeightsStore, rows: list[str] | None = None, **changes: Any) -> Plan:
    suite = load_suite("cc")
    values = suite.model_dump(mode="json")
    values["data"] = {**values["data"], "path": str(captioned), "image_size": 32}
    values["evaluation"]["unit_px"] = 8
    values["recipes"]["lmd"]["batch_size"] = 4
    values["methods"]["lmd-cs"]["options"]["patch_size"] = 1
    values["image_quality"] = None
    suite = Suite.model_validate({**values, **changes})
    names = list(suite.methods) if rows is None else rows
    return make_plan(
        suite, names, device="cpu", out=out, added={}, force=False, weights=store, named=rows is not None,
        save_weights=False,
    )  # fmt: skip


def test_the_rows_are_table_4s_and_stand_beside_the_published_ones() -> None:
    suite = load_suite("cc")
    assert {row.published for row in suite.methods.values()} == {"LMD-CS", "SD-v1.4", "Muse-base"}
    assert suite.tables == ("table4",)
    quality = suite.image_quality
    assert quality is not None
    assert (quality.num_images, quality.evaluators) == (1000, "real")
    assert suite.methods["lmd-cs"].options["variant"] == "generative"
    assert suite.methods["sd"].recipe is suite.methods["muse"].recipe is None


def test_rows_without_their_weights_are_left_out_and_the_suite_says_why(captioned: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    plan = planned(captioned, tmp_path / "out", unhashed(empty))
    assert [cell.config.row for cell in plan.cells] == ["lmd-cs"]
    assert set(plan.missing) == {"sd", "muse"}
    for row, words in (("sd", "no Stable Diffusion v1.4 weights: put the folder"), ("muse", "no aMUSEd-256 weights")):
        assert plan.missing[row].startswith(words)
        assert plan.suite.methods[row].missing == plan.missing[row]


def test_a_row_asked_for_by_name_needs_its_weights(captioned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^row muse cannot be run: no aMUSEd-256 weights: put the folder amused-256"):
        planned(captioned, tmp_path / "out", WeightsStore(tmp_path, offline=True), ["lmd-cs", "muse"])


def test_rows_that_fill_what_captions_say_are_refused_on_images_without_captions(
    captioned: Path, weights: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(captioned, tmp_path / "bare", ignore=shutil.ignore_patterns("captions.csv")))
    quality = {"num_images": 4, "metrics": ["psnr"]}
    with pytest.raises(ConfigError, match=r"^rows sd, muse fill what captions say: no captions: .* add one, or name"):
        planned(bare, tmp_path / "out", unhashed(weights), image_quality=quality)
    with pytest.raises(ConfigError, match=r"^row sd fills what captions say: no captions"):
        planned(bare, tmp_path / "out", unhashed(weights), ["lmd-cs", "sd"], image_quality=quality)
    assert planned(bare, tmp_path / "out", unhashed(weights), ["lmd-cs"], image_quality=quality).cells
    assert len(planned(bare, tmp_path / "out", unhashed(weights)).cells) == 3
    assert len(planned(captioned, tmp_path / "out", unhashed(weights), image_quality=quality).cells) == 3


def test_weights_that_have_come_since_are_used(captioned: Path, weights: Path, tmp_path: Path) -> None:
    lacking = planned(captioned, tmp_path / "out", WeightsStore(tmp_path, offline=True)).suite
    plan = planned(captioned, tmp_path / "out", unhashed(weights), methods=lacking.model_dump()["methods"])
    assert [cell.config.row for cell in plan.cells] == ["lmd-cs", "sd", "muse"]
    assert plan.missing == {}
    assert plan.suite.methods["sd"].options["path"] == "weights:stable-diffusion-v1-4"
    config = plan.cells[1].config
    assert config.options["path"] == str(weights / "stable-diffusion-v1-4")
    assert (config.steps, config.untimed_steps, config.lr_warmup_steps) == (0, 0, 0)
    assert config.inputs is not None


def test_an_option_may_name_a_part_of_published_weights(captioned: Path, weights: Path, tmp_path: Path) -> None:
    rows = load_suite("cc").model_dump(mode="json")["methods"]
    options = {**rows["lmd-cs"]["options"], "patch_size": 1}
    options["projector"] = {"kind": "kl", "path": "weights:stable-diffusion-v1-4/vae"}
    plan = planned(
        captioned, tmp_path / "out", unhashed(weights), methods={"lmd-cs": {**rows["lmd-cs"], "options": options}},
    )  # fmt: skip
    assert plan.cells[0].config.options["projector"]["path"] == str(weights / "stable-diffusion-v1-4" / "vae")


def test_weights_that_are_not_the_published_ones_end_a_run(captioned: Path, weights: Path, tmp_path: Path) -> None:
    words = ("run", "--suite", "cc", "--data", captioned, "--out", tmp_path / "out", "--device", "cpu", "--offline")
    done = lmd_bench(*words, "--weights", weights)
    assert done.code == 2, done.out + done.err
    assert "error: row sd cannot be run: " in done.err
    assert "error: row muse cannot be run: " in done.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_rows_that_are_to_be_downloaded_says_how_large_they_are(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_reachable(folder: Path | None, offline: bool) -> WeightsStore:
        return WeightsStore(tmp_path, offline, can_reach=lambda url: True)

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys.modules["lmd_bench.cli.run"], "open_weights", open_reachable)
    words = ("run", "--suite", "cc", "--data", captioned, "--out", tmp_path / "out", "--device", "cpu", "--dry-run")
    sizes = ("data.num_held_out=8", "evaluation.num_images=4", "image_quality.num_images=8")
    done = lmd_bench(*words, "--methods", "sd", *(word for size in sizes for word in ("--set", size)),
                     "--set", "recipes.lmd.batch_size=4")  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "0 cells to run, 0 finished before" in done.out
    assert "note: sd: a run downloads Stable Diffusion v1.4 weights (about 4070 MiB from" in done.out
    assert not (tmp_path / "hub").exists()


def test_the_whole_suite_runs_at_toy_size(
    captioned: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_unhashed(folder: Path, offline: bool) -> WeightsStore:
        return WeightsStore(folder, offline, unhashed_manifest())

    monkeypatch.setattr(sys.modules["lmd_bench.cli.run"], "open_weights", open_unhashed)
    settings = [
        "data.image_size=32", "data.num_held_out=8", "evaluation.unit_px=8", "evaluation.num_images=4",
        "evaluation.num_checks=1", "recipes.lmd.batch_size=4", "precision=fp32", "untimed_steps=1",
        "image_quality.num_images=8", "image_quality.evaluators=scenes", "image_quality.num_pictures=2",
        "methods.lmd-cs.options.patch_size=1", "methods.lmd-cs.options.encoder_width=32",
        "methods.lmd-cs.options.encoder_depth=1", "methods.lmd-cs.options.encoder_heads=2",
        "methods.lmd-cs.options.decoder_width=32", "methods.lmd-cs.options.decoder_depth=1",
        "methods.lmd-cs.options.decoder_heads=2", "estimator.half_life_steps=2", "estimator.num_resamples=100",
        "methods.*.options.num_inference_steps=2",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    command = (
        "run",
        "--suite",
        "cc",
        "--data",
        captioned,
        "--out",
        tmp_path,
        "--steps",
        6,
        "--device",
        "cpu",
        "--offline",
        "--weights",
        weights,
    )
    done = lmd_bench(*command, *words)
    assert done.code == 0, done.out + done.err
    assert "sd: comes trained, at 32 px" in done.out
    records = {row: read_run(tmp_path / "cc" / row / "seed-0" / "record.json") for row in ("lmd-cs", "sd", "muse")}
    for row, record in records.items():
        quality = record.image_quality
        assert quality is not None, record.not_measured
        assert quality.num_images == 8
        assert {"psnr_db", "ssim", "fid_scenes", "clip_score_scenes"} <= set(quality.values), quality.not_measured
        assert (tmp_path / "cc" / row / "seed-0" / "pictures" / "filled.png").is_file()
    assert len({record.image_quality.real_digest for record in records.values() if record.image_quality}) == 1
    bounds = read_bounds(tmp_path / "cc" / "quality-bounds.json")
    assert bounds.truth.values["fid_scenes"] < bounds.grey.values["fid_scenes"]
    assert (tmp_path / "cc" / "report" / "table4.md").is_file()

    again = lmd_bench(*command, *words)
    assert again.code == 0, again.out + again.err
    assert "0 cells to run, 3 finished before" in again.out

    shutil.rmtree(tmp_path / "cc" / "sd")
    estimated = lmd_bench(*command, *words, "--dry-run")
    assert estimated.code == 0, estimated.out + estimated.err
    assert "sd: comes trained, " in estimated.out
