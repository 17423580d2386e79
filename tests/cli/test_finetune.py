"""Fine-tuning in `run` and by `finetune`, end to end on tiny cells, and what is refused before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import lmd_bench
from PIL import Image

from lmd_bench.data.source import InMemorySource
from lmd_bench.harness import execute, finetune_cells
from lmd_bench.records import read_finetune, read_run, write_json

SUITE = """
name: tuned
title: "Tuned: two encoders and one without"
data: {name: scenes, image_size: 32, num_train: 40, num_held_out: 8}
steps: 3
untimed_steps: 1
log_every_steps: 4
recipes:
  equal: {batch_size: 4, lr_warmup_steps: 1, lr: {base: 1.0e-3, per_images: null}, ema_decay: 0.5}
finetune_recipes:
  equal:
    batch_size: 8
    lr: {base: 1.0e-3, per_images: null}
    lr_warmup_steps: 1
    augmentation: {crop: none}
    source: invented here
    layer_decay: 0.75
    mixup_alpha: 0.8
    cutmix_alpha: 1.0
    label_smoothing: 0.1
    random_erasing: 0.25
    drop_path: 0.1
  cls: {batch_size: 8, lr: {base: 1.0e-3, per_images: null}, pool: cls}
finetune: {steps: 3, num_val: 20, num_checks: 2, batch_size_val: 10, probe_images: 20, knn_neighbors: 4}
methods:
  mae:
    label: MAE
    method: mae
    recipe: equal
    finetune: equal
    options: &vit
      patch_size: 8
      encoder_width: 32
      encoder_depth: 1
      encoder_heads: 2
      decoder_width: 32
      decoder_depth: 1
      decoder_heads: 2
  lmd:
    label: LMD
    method: lmd
    recipe: equal
    finetune: equal
    options: {<<: *vit, projector: {kind: vq, path: "shipped:scenes-vq-f8"}, patch_size: 2}
  ddpm:
    label: DDPM
    method: ddpm
    recipe: equal
    options:
      block_out_channels: [8, 8]
      attention_levels: [1]
      layers_per_block: 1
      norm_num_groups: 4
      num_train_timesteps: 40
      num_inference_steps: 2
evaluation: {num_checks: 1, num_images: 4, unit_px: 16}
estimator: {half_life_steps: 2, num_resamples: 100}
reference: mae
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tuned.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def finished(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/tuned of one whole run. Nothing may change it: copy it."""
    out = tmp_path_factory.mktemp("out")
    done = lmd_bench("run", "--suite", suite, "--out", out, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    assert "fine-tuning, step 3/3: top-1 accuracy" in done.out
    return out / "tuned"


@pytest.fixture(scope="module")
def pretrained(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/tuned of a run whose suite asks for no fine-tuning."""
    out = tmp_path_factory.mktemp("plain")
    plain = out / "plain.yaml"
    plain.write_text(SUITE.replace("    finetune: equal\n", "").replace("\nfinetune: {", "\n# {"))
    done = lmd_bench("run", "--suite", plain, "--methods", "mae", "--out", out, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    return out / "tuned"


def test_a_run_leaves_fine_tuning_and_probes_in_the_records_of_the_rows_that_name_a_recipe(finished: Path) -> None:
    for row in ("mae", "lmd"):
        record = read_run(finished / row / "seed-0" / "record.json")
        found = record.finetune
        assert found is not None, record.not_measured
        assert [check.step for check in found.checks] == [0, 2, 3]
        assert all(check.num_images == 20 for check in found.checks)
        assert (found.num_steps, found.num_train, found.num_val, found.num_classes) == (3, 40, 20, 10)
        assert len(found.losses) == 3
        assert found.mit_ms > 0
        assert found.settings == record.config["finetune"]
        gain = max(check.top1 for check in found.checks) - found.checks[0].top1
        if gain > 0:
            assert found.mat_at_1 == pytest.approx(found.timing.train_s / gain)
        else:
            assert record.not_measured["mat_at_1"] == "no increase"
        timing = found.timing
        assert timing.train_s + sum(timing.pauses_s.values()) == pytest.approx(timing.wall_s, rel=0.1)
        assert [(probe.name, probe.num_train, probe.num_val) for probe in record.probes] == [
            ("linear", 20, 20), ("knn", 20, 20),
        ]  # fmt: skip
    record = read_run(finished / "ddpm" / "seed-0" / "record.json")
    assert (record.finetune, record.probes, record.config["finetune"]) == (None, [], None)
    assert "finetune" not in record.not_measured


def test_what_fails_in_fine_tuning_leaves_the_pre_training_finished_with_the_reason(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(execute, "fine_tune", broken)
    done = lmd_bench("run", "--suite", suite, "--methods", "mae", "--out", tmp_path, "--device", "cpu")
    assert done.code == 0, done.err
    folder = tmp_path / "tuned" / "mae" / "seed-0"
    record = read_run(folder / "record.json")
    assert record.status == "finished"
    assert record.efficiency is not None
    assert record.not_measured["finetune"] == "RuntimeError: out of memory (details: error.txt)"
    assert "Traceback" in (folder / "error.txt").read_text()


def test_a_fine_tuning_that_is_stopped_leaves_a_finished_cell_that_finetune_completes(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(execute, "fine_tune", stopped)
        done = lmd_bench("run", "--suite", suite, "--methods", "mae", "--out", tmp_path, "--device", "cpu")
    assert done.code == 130
    cell = tmp_path / "tuned" / "mae" / "seed-0"
    assert read_run(cell / "record.json").status == "finished"
    assert "`lmd-bench finetune` makes up for it" in read_run(cell / "record.json").not_measured["finetune"]
    done = lmd_bench("finetune", cell, "--device", "cpu")
    assert done.code == 0, done.err
    record = read_run(cell / "record.json")
    assert record.finetune is not None
    assert "finetune" not in record.not_measured


def test_fine_tuning_saved_weights_is_what_the_run_itself_would_have_done(
    suite: Path, finished: Path, pretrained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(pretrained, folder)
    done = lmd_bench("finetune", folder, "--suite", suite, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    assert "mae seed 0: 3 steps on cpu" in done.out
    record, whole = (read_run(at / "mae" / "seed-0" / "record.json") for at in (folder, finished))
    assert record.finetune is not None
    assert whole.finetune is not None
    assert record.finetune.losses == whole.finetune.losses  # the same averaged weights
    assert [c.top1 for c in record.finetune.checks] == [c.top1 for c in whole.finetune.checks]
    assert [probe.top1 for probe in record.probes] == [probe.top1 for probe in whole.probes]
    assert record.config_hash == whole.config_hash
    assert record.finetune.notes[-1].startswith("fine-tuned from saved weights: lmd-bench finetune")
    assert (folder / "suite.yaml").read_bytes() == (pretrained / "suite.yaml").read_bytes()
    for described in (folder / "suite.yaml", suite):  # the suite it was run by, which asks for none, and the other
        again = lmd_bench("run", "--suite", described, "--methods", "mae", "--out", tmp_path, "--device", "cpu")
        assert "0 cells to run, 1 finished before" in again.out
        assert "note:" not in again.out
    assert "Recipe of fine-tuning: invented here." in (folder / "report" / "index.html").read_text()


def test_finetune_leaves_what_is_done_alone_unless_forced_and_takes_settings(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    cell = folder / "mae" / "seed-0"
    done = lmd_bench("finetune", cell, "--device", "cpu")
    assert (done.code, done.err.strip()) == (2, f"error: {cell}: is fine-tuned already; --force does it again")
    done = lmd_bench("finetune", folder, "--device", "cpu")
    assert done.code == 2
    assert "nothing to fine-tune: ddpm seed 0: names no fine-tuning recipe; lmd seed 0: is fine-tuned" in done.err
    done = lmd_bench("finetune", cell, "--device", "cpu", "--force", "--recipe", "cls", "--set", "finetune.steps=2")
    assert done.code == 0, done.err
    record = read_run(cell / "record.json")
    assert record.finetune is not None
    assert (record.finetune.num_steps, record.finetune.settings["recipe"]["pool"]) == (2, "cls")


def test_one_cell_tuned_otherwise_leaves_the_suite_and_the_other_cells_as_they_are(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    cell = folder / "mae" / "seed-0"
    words = ("--device", "cpu", "--set", "finetune.steps=2", "--set", "finetune_recipes.equal.layer_decay=0.5")
    done = lmd_bench("finetune", cell, "--force", *words)
    assert done.code == 0, done.err
    assert (folder / "suite.yaml").read_bytes() == (finished / "suite.yaml").read_bytes()
    assert read_run(cell / "record.json").config_hash == read_run(finished / "mae/seed-0/record.json").config_hash
    again = lmd_bench("run", "--suite", folder / "suite.yaml", "--out", tmp_path, "--device", "cpu", "--dry-run")
    assert again.code == 0, again.err
    assert "0 cells to run, 3 finished before" in again.out
    [note] = [line for line in again.out.splitlines() if "fine-tuned" in line]
    assert "mae seed 0: fine-tuned with other settings (recipe.layer_decay 0.5, now 0.75; steps 2, now 3)" in note
    assert f"`lmd-bench finetune {cell} --force` does it again" in note


def test_a_run_whose_suite_asks_for_fine_tuning_later_says_what_makes_up_for_it(
    suite: Path, pretrained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(pretrained, folder)
    words = ("--suite", suite, "--methods", "mae", "--out", tmp_path, "--device", "cpu", "--dry-run")
    again = lmd_bench("run", *words)
    assert again.code == 0, again.err
    assert "0 cells to run, 1 finished before" in again.out
    missing = f"mae seed 0: was not asked to be fine-tuned when it ran: `lmd-bench finetune {folder / 'mae/seed-0'}`"
    assert missing in again.out
    again = lmd_bench("run", *words, "--set", "image_quality={num_images: 4, metrics: [psnr]}")
    assert again.code == 0, again.err
    assert f"its image quality was not asked for when it ran: `lmd-bench evaluate {folder / 'mae/seed-0'}`" in again.out


def test_a_recipe_for_all_cells_passes_over_those_without_an_encoder(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "lmd")
    done = lmd_bench("finetune", folder, "--device", "cpu", "--force", "--recipe", "cls")
    assert done.code == 0, done.err
    assert "note: ddpm seed 0: no encoder to fine-tune" in done.out
    assert read_run(folder / "mae" / "seed-0" / "record.json").config["finetune"]["recipe"]["pool"] == "cls"


# -- what goes wrong while encoders are fine-tuned --------------------------------------------------------------------


def spoil(cell: Path, *, tuned: bool) -> None:
    """A cell whose weights are damaged; without `tuned` nothing stands that it was fine-tuned before."""
    weights = cell / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    record = read_run(cell / "record.json")
    if not tuned:
        write_json(cell / "record.json", record.model_copy(update={"finetune": None, "probes": []}))


@pytest.mark.parametrize("tuned", [False, True])
def test_a_damaged_cell_ends_neither_the_others_nor_the_report(finished: Path, tmp_path: Path, tuned: bool) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "report")
    before = read_run(folder / "lmd" / "seed-0" / "record.json").finetune
    spoil(folder / "lmd" / "seed-0", tuned=tuned)
    done = lmd_bench("finetune", folder, "--device", "cpu", "--force", "--set", "finetune.steps=2")
    assert done.code == 1
    assert "lmd seed 0: not fine-tuned:" in done.err
    record, other = (read_run(folder / row / "seed-0" / "record.json") for row in ("lmd", "mae"))
    assert other.finetune is not None
    assert other.finetune.num_steps == 2
    assert record.finetune == (before if tuned else None)
    assert ("finetune" in record.not_measured) == (not tuned)
    assert (folder / "report" / "index.html").is_file()


def test_what_breaks_beside_a_result_that_stands_leaves_its_traceback_and_closes_the_images(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = InMemorySource.close

    def broken(*_: object, **__: object) -> object:
        raise MemoryError("no more")

    monkeypatch.setattr(finetune_cells, "load_method_weights", broken)
    monkeypatch.setattr(InMemorySource, "close", lambda self: (closed.append(self), close(self)))
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    done = lmd_bench("finetune", folder, "--device", "cpu", "--force")
    assert done.code == 1
    for row in ("lmd", "mae"):
        cell = folder / row / "seed-0"
        assert f"{row} seed 0: not fine-tuned: MemoryError: no more (details: error.txt)" in done.err
        assert "Traceback" in (cell / "error.txt").read_text()
        assert read_run(cell / "record.json") == read_run(finished / row / "seed-0" / "record.json")
    assert len(closed) == 1  # both are of one size


def test_a_cell_that_failed_is_not_fine_tuned_by_its_path_either(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(finished, folder)
    cell = folder / "mae" / "seed-0"
    record = read_run(cell / "record.json")
    write_json(cell / "record.json", record.model_copy(update={"status": "failed", "error": "ran out of memory"}))
    reason = "failed when it ran (ran out of memory): run it again"
    done = lmd_bench("finetune", cell, "--device", "cpu", "--force")
    assert (done.code, done.err.strip()) == (2, f"error: {cell}: {reason}")
    done = lmd_bench("finetune", folder, "--device", "cpu")
    assert f"mae seed 0: {reason}" in done.err


def test_an_imported_encoder_is_fine_tuned_on_a_folder_into_a_file_beside_its_weights(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmd_bench.config import ImportedConfig
    from lmd_bench.harness.weights import WEIGHTS_FILE, save_weights
    from lmd_bench.method import DataSpec
    from lmd_bench.registry import load_method
    from lmd_bench.suite_files import load_suite

    def broken(*_: object, **__: object) -> object:
        raise MemoryError("no more")

    cell, images = tmp_path / "imported", tmp_path / "images"
    options = load_suite(str(suite)).methods["mae"].options
    kind = load_method("mae", {})
    torch.manual_seed(0)
    method = kind(kind.Config.model_validate(options), DataSpec(32))
    config = ImportedConfig(
        method="mae", options=options, image_size=32, source="mae.pth", source_sha256="0", place="the whole file"
    )
    save_weights(method, cell / WEIGHTS_FILE, config)
    for name, colour in (("red", (200, 0, 0)), ("green", (0, 200, 0))):
        for number in range(16):
            (images / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), colour).save(images / name / f"{number}.png")
    plain = tmp_path / "plain.yaml"
    plain.write_text(SUITE.replace("num_held_out: 8}", "num_held_out: 8, num_workers: 0}"))
    words = ("finetune", cell, "--suite", plain, "--data", images, "--device", "cpu", "--set", "finetune.num_val=6")
    with monkeypatch.context() as patched:
        patched.setattr(finetune_cells, "open_source", broken)
        done = lmd_bench(*words, "--recipe", "cls")
    assert done.code == 1
    assert "Traceback" in (cell / "error.txt").read_text()
    found = read_finetune(cell / "finetune.json")
    assert found.not_measured == {"finetune": "MemoryError: no more (details: error.txt)"}
    done = lmd_bench(*words)
    assert done.code == 2
    assert "row imported names no fine-tuning recipe: choose with --recipe (equal, cls)" in done.err
    done = lmd_bench(*words, "--recipe", "cls")
    assert done.code == 0, done.err
    found = read_finetune(cell / "finetune.json")
    assert found.finetune is not None, found.not_measured
    assert (found.finetune.num_classes, found.finetune.num_val) == (2, 6)
    assert found.config["source"] == "mae.pth"
    assert len(found.probes) == 2
    done = lmd_bench(*words, "--recipe", "cls")
    assert (done.code, done.err.strip()) == (
        2, f"error: {cell}: is fine-tuned already (finetune.json); --force does it again",
    )  # fmt: skip


# -- refused before anything runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods.ddpm.finetune=equal", "methods.ddpm.finetune: no encoder to fine-tune; or leave finetune out"),
        (
            "finetune.steps=1",
            "finetune (row mae): 1 step are too few, the learning rate of equal warms up for 1; raise finetune.steps",
        ),
        (
            "finetune_recipes.equal.batch_size=64",
            "finetune (row mae): 40 labelled images do not fill one batch of 64; use more images or",
        ),
        (
            "finetune.num_train=41",
            "finetune (row mae): num_train asks for 41 labelled images, there are 40 training images; lower it",
        ),
        (
            "finetune.knn_neighbors=21",
            "finetune (row mae): knn_neighbors asks for 21 neighbours among 20 probe images; lower it",
        ),
        ("methods.mae.finetune=equall", "methods.mae.finetune: no recipe 'equall'; did you mean 'equal'?"),
    ],
)
def test_a_run_that_cannot_be_fine_tuned_as_asked_is_refused(
    suite: Path, tmp_path: Path, setting: str, message: str
) -> None:
    done = lmd_bench("run", "--suite", suite, "--out", tmp_path, "--device", "cpu", "--set", setting)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "tuned").exists()


def test_a_class_token_is_asked_of_encoders_that_have_one(suite: Path, tmp_path: Path) -> None:
    text = suite.read_text().replace(
        "evaluation:",
        "  simmim:\n    {label: SimMIM, method: simmim, recipe: equal, finetune: cls, options: {mask_unit_px: 8,"
        " backbone: {kind: swin, patch_size: 2, embed_dim: 16, depths: [1, 1, 1], num_heads: [1, 2, 4],"
        " window_size: 4}}}\n"
        "evaluation:",
    )
    other = tmp_path / "cls.yaml"
    other.write_text(text)
    done = lmd_bench("run", "--suite", other, "--methods", "simmim", "--out", tmp_path, "--device", "cpu")
    assert done.code == 2
    assert "methods.simmim.finetune: its encoder has no class token: use pool mean; or leave finetune out" in done.err


def test_images_without_labels_are_noted_and_trained_on_all_the_same(suite: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.new("RGB", (32, 32), (5 * number, 0, 0)).save(images / f"{number}.png")
    words = ("run", "--suite", suite, "--methods", "mae", "--out", tmp_path / "out", "--device", "cpu")
    done = lmd_bench(*words, "--data", images, "--set", "data.num_workers=0", "--set", "finetune.num_val=null")
    assert done.code == 0, done.err
    assert "mae is not fine-tuned: no labels: the images do not lie in class folders" in done.out
    record = read_run(tmp_path / "out" / "tuned" / "mae" / "seed-0" / "record.json")
    assert record.not_measured["finetune"] == "no labels: the images do not lie in class folders"
    assert record.finetune is None


def test_a_dry_run_counts_the_steps_of_fine_tuning(suite: Path, tmp_path: Path) -> None:
    done = lmd_bench("run", "--suite", suite, "--methods", "mae", "--out", tmp_path, "--device", "cpu", "--dry-run")
    assert done.code == 0, done.err
    assert "ms a step of fine-tuning (its looks at accuracy and probes not counted)" in done.out
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{missing}"], "no such folder; give a finished cell, OUT/<suite>/<row>/seed-<n>, or OUT/<suite>"),
        (["{empty}"], "no weights.safetensors in this folder"),
        (["{plain}"], "suite tuned: has no finetune section; name a suite that has with --suite"),
        (["{plain}", "--suite", "{suite}", "--recipe", "eqal"], "no such fine-tuning recipe in suite tuned; did you"),
        (["{plain}/mae/seed-0", "--suite", "demo", "--set", "finetune.nowhere=1"], "no key 'finetune.nowhere'"),
        (
            ["{plain}", "--suite", "{suite}", "--set", "data.seed=1"],
            "--set data.seed=1: encoders are fine-tuned as they",
        ),
    ],
)
def test_finetune_says_what_is_wrong_with_what_it_is_given(
    suite: Path, pretrained: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {"missing": tmp_path / "missing", "empty": empty, "plain": pretrained, "suite": suite}
    done = lmd_bench("finetune", *(word.format(**names) for word in words), "--device", "cpu")
    assert done.code == 2
    assert message in done.err
