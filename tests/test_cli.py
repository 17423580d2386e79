"""The command line end to end: what it runs, what it writes, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.photos import make_photo_folder
from helpers.without_torch import run_without_torch
from PIL import Image

from lmd_bench.cli import main
from lmd_bench.records import STEP_COLUMNS, read_run, read_steps

SMALL = """
extends: demo
name: small
data: {image_size: 32, num_train: 32, num_held_out: 8}
steps: 6
untimed_steps: 2
log_every_steps: 4
recipes: {equal: {batch_size: 4, lr_warmup_steps: 2}, adan: {batch_size: 4, lr_warmup_steps: 2}}
methods:
  ddpm:
    options: {block_out_channels: [32, 32], attention_levels: [1], num_train_timesteps: 10, num_inference_steps: 2}
evaluation: {num_checks: 2, num_images: 4, unit_px: 16}
estimator: {half_life_steps: 2, num_resamples: 100}
"""


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Lmd = Callable[..., Outcome]


@pytest.fixture
def lmd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lmd:
    """Runs one command in this process."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lmd-bench", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of one whole small run in a process of its own, all six rows."""
    out = tmp_path_factory.mktemp("out")
    done = command("run", "--suite", suite_file, "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def command(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lmd_bench", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


ROWS = ["lmd-us", "lmd-ps", "lmd-cs", "lmd-cs-adan", "mae", "ddpm"]


def learned(out: Path) -> dict[str, object]:
    """Everything in a suite's records that does not depend on time."""
    values: dict[str, object] = {}
    for row in ROWS:
        folder = out / "small" / row / "seed-0"
        if (folder / "record.json").exists():
            record = read_run(folder / "record.json")
            steps = read_steps(folder / "steps.csv")
            assert record.yardstick is not None
            values[row] = (
                record.config_hash,
                [steps[name] for name in ("step", "timed", "loss", "mask_ratio", "tokens", "lr")],
                [(check.step, check.psnr_db, check.ssim) for check in record.yardstick.checks],
                record.yardstick.ceiling_psnr_db,
                record.yardstick.latent_leak_db,
            )
    return values


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_complete_records_for_every_row(finished: Path) -> None:
    for row in ROWS:
        folder = finished / "small" / row / "seed-0"
        record = read_run(folder / "record.json")
        assert record.status == "finished"
        assert record.timing is not None
        assert record.phases is not None
        assert record.cost is not None
        assert record.cost.flops_per_step is not None, record.not_measured
        assert record.timing.train_s > 0
        assert record.environment["packages"]["torch"] == torch.__version__
        assert record.command.startswith("lmd-bench run")
        steps = read_steps(folder / "steps.csv")
        assert steps["step"] == [-2, -1, 1, 2, 3, 4, 5, 6]
        assert steps["timed"] == [0, 0, 1, 1, 1, 1, 1, 1]
        assert [check.step for check in record.yardstick.checks] == [0, 3, 6]  # type: ignore[union-attr]


def test_latent_methods_report_projector_ceiling_and_leak_and_pixel_methods_do_not(finished: Path) -> None:
    lmd_record = read_run(finished / "small" / "lmd-cs" / "seed-0" / "record.json")
    mae_record = read_run(finished / "small" / "mae" / "seed-0" / "record.json")
    assert lmd_record.yardstick is not None
    assert mae_record.yardstick is not None
    assert lmd_record.yardstick.ceiling_psnr_db is not None
    assert lmd_record.yardstick.latent_leak_db is not None
    assert lmd_record.phases is not None
    assert lmd_record.phases.projector_share > 0.01
    assert mae_record.yardstick.ceiling_psnr_db is None
    assert mae_record.yardstick.mean_colour_psnr_db == lmd_record.yardstick.mean_colour_psnr_db


def test_the_report_has_its_tables_figures_and_page(finished: Path) -> None:
    report = finished / "small" / "report"
    for name in ("table1.md", "table1.csv", "table3.md", "table3.csv", "index.html"):
        assert (report / name).stat().st_size > 200, name
    assert len(list(report.glob("*.png"))) >= 3
    page = (report / "index.html").read_text()
    for label in ("LMD-US", "LMD-PS", "LMD-CS", "MAE", "DDPM"):
        assert label in page


def test_finished_cells_are_never_run_again_and_the_report_is_made_again(
    finished: Path, suite_file: Path, lmd: Lmd
) -> None:
    stamps = {row: (finished / "small" / row / "seed-0" / "record.json").stat().st_mtime_ns for row in ROWS}
    done = lmd("run", "--suite", suite_file, "--out", finished, "--device", "cpu")
    assert done.code == 0, done.err
    assert "0 cells to run, 6 finished before" in done.out
    assert stamps == {row: (finished / "small" / row / "seed-0" / "record.json").stat().st_mtime_ns for row in ROWS}


def test_other_settings_never_overwrite_finished_cells_without_force(
    finished: Path, suite_file: Path, lmd: Lmd
) -> None:
    done = lmd("run", "--suite", suite_file, "--out", finished, "--methods", "mae", "--steps", 7, "--device", "cpu")
    assert done.code == 2
    assert "finished with other settings (steps 6, now 7)" in done.err
    assert "--force" in done.err


def test_report_works_alone_and_without_torch(finished: Path) -> None:
    words = ["lmd-bench", "report", str(finished)]
    done = run_without_torch(f"sys.argv = {words!r}; from lmd_bench.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(finished: Path, suite_file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lmd_bench", "run", "--suite", str(suite_file), "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words += ["--device", "cpu"]
    for number, how in enumerate((signal.SIGKILL, signal.SIGINT)):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = tmp_path / "small" / ROWS[number + 1] / "seed-0" / "steps.csv"
        deadline = time.monotonic() + 120
        while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        code = process.wait(timeout=60)
        if how == signal.SIGINT and not (tmp_path / "small" / "ddpm" / "seed-0" / "record.json").exists():
            assert code == 130
    done = command("run", "--suite", suite_file, "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path) == learned(finished)
    assert set(learned(tmp_path)) == set(ROWS)


def test_force_runs_again_and_the_seeds_differ(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    words = ("run", "--suite", suite_file, "--out", tmp_path, "--methods", "mae", "--seeds", "0,1", "--device", "cpu")
    assert lmd(*words).code == 0
    folders = [tmp_path / "small" / "mae" / f"seed-{seed}" for seed in (0, 1)]
    losses = [read_steps(folder / "steps.csv")["loss"] for folder in folders]
    assert losses[0] != losses[1]
    stamp = (folders[0] / "record.json").stat().st_mtime_ns
    assert lmd(*words, "--force").code == 0
    assert (folders[0] / "record.json").stat().st_mtime_ns != stamp
    assert read_steps(folders[0] / "steps.csv")["loss"] == losses[0]


def test_dry_run_estimates_and_writes_nothing(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    done = lmd(
        "run", "--suite", suite_file, "--out", tmp_path / "o", "--methods", "mae", "--dry-run", "--device", "cpu"
    )
    assert done.code == 0, done.err
    assert "ms a step" in done.out
    assert "nothing was written" in done.out
    assert not (tmp_path / "o").exists()


# -- image folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_photo_folder(folder, size=64, crops=16)
    return folder


def test_it_runs_on_a_folder_of_photographs_with_one_corrupt_file(
    photos: Path, suite_file: Path, tmp_path: Path, lmd: Lmd
) -> None:
    broken = next(iter(sorted(photos.rglob("*.png")) or sorted(photos.rglob("*.jpg"))))
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    try:
        done = lmd(
            "run", "--suite", suite_file, "--data", photos, "--methods", "lmd-cs,mae", "--out", tmp_path,
            "--set", "data.num_workers=0", "--device", "cpu",
        )  # fmt: skip
    finally:
        broken.write_bytes(whole)
    assert done.code == 0, done.err
    assert broken.name in done.out
    record = read_run(tmp_path / "small" / "mae" / "seed-0" / "record.json")
    assert record.data["num_skipped"] == 1
    assert broken.name in " ".join(record.notes)


@pytest.mark.slow
def test_in1k_runs_three_steps_at_published_size(tmp_path: Path, lmd: Lmd) -> None:
    make_photo_folder(tmp_path / "train_images", size=64, crops=20)
    done = lmd(
        "run", "--suite", "in1k", "--data", tmp_path / "train_images", "--steps", 3, "--methods", "mae,lmd-cs",
        "--out", tmp_path / "o", "--device", "cpu", "--precision", "fp32", "--set", "recipes.*.batch_size=2",
        "--set", "untimed_steps=0", "--set", "data.num_held_out=4", "--set", "evaluation.num_images=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    mae = read_run(tmp_path / "o" / "in1k" / "mae" / "seed-0" / "record.json")
    lmd_cs = read_run(tmp_path / "o" / "in1k" / "lmd-cs" / "seed-0" / "record.json")
    assert mae.cost is not None
    assert lmd_cs.cost is not None
    assert mae.cost.parameters == 111_907_840
    assert lmd_cs.cost.parameters - lmd_cs.cost.projector_parameters == 110_817_856
    assert mae.not_measured["yardstick"] == "normalised targets"
    assert lmd_cs.config["recipe"]["augmentation"]["crop"] == "random_resized"
    table = (tmp_path / "o" / "in1k" / "report" / "table1.md").read_text()
    for planned in ("SimMIM", "GreenMIM", "UM-MAE"):
        assert planned in table
    assert "not built yet" in table
    assert "the released recipe uses the SD-v1.4 KL autoencoder" in done.out


# -- bad input: one clear line, exit 2, nothing written ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--suite", "dmeo"], "no suite 'dmeo'; did you mean 'demo'"),
        (["--methods", "mea"], "--methods: suite small has no row 'mea'; did you mean 'mae'?"),
        (["--methods", ","], "--methods names no method"),
        (["--set", "stepps=3"], "--set stepps=3: no key 'stepps'; did you mean 'steps'?"),
        (["--set", "steps=soon"], "steps: Input should be a valid integer"),
        (["--set", "methods.mae.options.mask_ratio=high"], "methods.mae.options: mask_ratio: Input should be a valid"),
        (["--set", "methods.mae.options.patch_size=5"], "methods.mae.options:"),
        (["--set", "methods.lmd-cs.options.mask_ratio_start=0.8"], "mask ratios out of order"),
        (["--set", "methods.lmd-cs.options.projector.path=/nowhere"], "methods.lmd-cs.options: "),
        (["--set", "data.image_size=36"], "lmd-cs"),
        (["--set", "evaluation.unit_px=5"], "evaluation.unit_px: units of 5 px do not tile images of 32 px"),
        (["--set", "evaluation.num_images=9"], "data.num_held_out holds back only 8"),
        (["--set", "recipes.equal.batch_size=64"], "32 training images do not fill one batch of 64"),
        (["--set", "evaluation.keep=0.01"], "evaluation: keep 0.01 of 4 units of 16 px leaves 0 visible"),
        (
            ["--set", "data.image_size=64", "--set", "methods.mae.options.patch_size=32"],
            "row mae cannot take the yardstick's masks",
        ),
        (["--set", "recipes.equal.lr.base=.inf"], "recipes.equal.lr.base: Input should be a finite number"),
        (["--seeds=-1"], "seeds.0: Input should be greater than or equal to 0"),
        (["--add", f"{Path(__file__).parent / 'helpers' / 'methods.py'}:MAE"], "a method 'mae' is installed"),
        (["--device", "tpu"], "--device tpu: use auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--seeds", "a"], "--seeds a: whole numbers separated by commas"),
        (["--precision", "fp8"], "precision: Input should be 'fp32' or 'bf16'"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--add", "mine.txt"], "--add mine.txt: write it as file.py:ClassName"),
        (["--add", "missing.py:Mine"], "--add missing.py:Mine: no file missing.py"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    words: list[str], line: str, suite_file: Path, tmp_path: Path, lmd: Lmd
) -> None:
    out = tmp_path / "o"
    done = lmd("run", "--suite", suite_file, "--device", "cpu", "--out", out, *words)
    assert done.code == 2
    assert line in done.err, done.err
    assert "Traceback" not in done.err
    assert not out.exists()


def test_all_problems_are_listed_together(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    done = lmd(
        "run", "--suite", suite_file, "--device", "tpu", "--out", tmp_path / "o",
        "--set", "methods.mae.options.patch_size=5", "--set", "evaluation.num_images=9",
    )  # fmt: skip
    assert done.code == 2
    assert len(done.err.splitlines()) == 3


@pytest.mark.parametrize("kind", ["empty", "text", "file"])
def test_folders_without_images_are_refused(kind: str, suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    folder = tmp_path / "data"
    if kind == "file":
        folder.write_text("no folder")
    else:
        folder.mkdir()
    if kind == "text":
        (folder / "notes.txt").write_text("no image")
    done = lmd("run", "--suite", suite_file, "--data", folder, "--out", tmp_path / "o", "--device", "cpu")
    assert done.code == 2
    assert str(folder) in done.err
    assert "Traceback" not in done.err


def test_an_out_that_is_a_file_is_refused(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    (tmp_path / "o").write_text("")
    done = lmd("run", "--suite", suite_file, "--out", tmp_path / "o", "--device", "cpu")
    assert done.code == 2
    assert "is a file, not a folder" in done.err


def test_a_record_of_another_schema_is_named(finished: Path, suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    values = json.loads((finished / "small" / "mae" / "seed-0" / "record.json").read_text())
    values["schema"] = 99
    path = tmp_path / "small" / "mae" / "seed-0" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
    done = lmd("run", "--suite", suite_file, "--out", tmp_path, "--methods", "mae", "--device", "cpu")
    assert done.code == 2
    assert "a record of schema 99, this version reads schema" in done.err


def test_too_little_disk_is_found_before_the_run(
    suite_file: Path, tmp_path: Path, lmd: Lmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    done = lmd("run", "--suite", suite_file, "--out", tmp_path / "o", "--methods", "mae", "--device", "cpu")
    assert done.code == 2
    assert "free some space" in done.err


# -- a method of one's own --------------------------------------------------------------------------------------------


TINY = Path(__file__).parent / "helpers" / "methods.py"


def test_a_users_own_method_is_one_file(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    done = lmd(
        "run", "--suite", suite_file, "--add", f"{TINY}:Tiny", "--methods", "tiny,mae", "--out", tmp_path,
        "--device", "cpu", "--set", "methods.tiny.options.width=16",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = read_run(tmp_path / "small" / "tiny" / "seed-0" / "record.json")
    assert record.config["options"]["width"] == 16
    assert "tiny" in (tmp_path / "small" / "report" / "index.html").read_text()


def test_a_cell_that_fails_is_recorded_the_others_go_on_and_the_code_is_1(
    suite_file: Path, tmp_path: Path, lmd: Lmd
) -> None:
    words = ("run", "--suite", suite_file, "--add", f"{TINY}:Tiny", "--out", tmp_path, "--device", "cpu")
    done = lmd(*words, "--methods", "tiny,mae", "--set", "methods.tiny.options.nan_at=5")
    assert done.code == 1
    assert "step 5: the loss is nan" in done.out
    failed = read_run(tmp_path / "small" / "tiny" / "seed-0" / "record.json")
    assert failed.status == "failed"
    assert failed.error is not None
    assert "step 5" in failed.error
    assert read_steps(tmp_path / "small" / "tiny" / "seed-0" / "steps.csv")["step"][-1] == 5
    assert read_run(tmp_path / "small" / "mae" / "seed-0" / "record.json").status == "finished"
    assert "step 5: the loss is nan" in (tmp_path / "small" / "report" / "index.html").read_text()
    again = lmd(*words, "--methods", "tiny")
    assert again.code == 0
    assert read_run(tmp_path / "small" / "tiny" / "seed-0" / "record.json").status == "finished"


def test_a_changed_file_is_another_experiment(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    path = tmp_path / "own.py"
    path.write_text(TINY.read_text())
    words = ("run", "--suite", suite_file, "--add", f"{path}:Tiny", "--methods", "tiny", "--out", tmp_path / "o")
    assert lmd(*words).code == 0
    path.write_text(TINY.read_text() + "\n# changed\n")
    done = lmd(*words)
    assert done.code == 2
    assert "finished with other settings (code" in done.err


def test_a_method_may_prepare_batches_in_a_collate_of_its_own(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    words = ("--suite", suite_file, "--add", f"{TINY}:Collating", "--methods", "collating", "--out", tmp_path)
    assert "could not be timed" not in lmd("run", *words, "--dry-run", "--device", "cpu").out
    assert lmd("run", *words, "--device", "cpu").code == 0
    record = read_run(tmp_path / "small" / "collating" / "seed-0" / "record.json")
    assert record.cost is not None
    assert record.cost.flops_per_step is not None, record.not_measured


def test_another_estimator_is_counted_from_the_steps_on_disk(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    words = ("run", "--suite", suite_file, "--methods", "mae", "--out", tmp_path, "--device", "cpu", "--steps", 30)
    assert lmd(*words).code == 0
    path = tmp_path / "small" / "mae" / "seed-0" / "record.json"
    before = read_run(path)
    done = lmd(*words, "--set", "estimator.delta=0.05")
    assert done.code == 0
    assert "counted anew, from the steps on disk: mae" in done.out
    after = read_run(path)
    assert after.efficiency is not None
    assert before.efficiency is not None
    assert after.efficiency["config"]["delta"] == 0.05
    assert after.efficiency["estimators"]["relative"] != before.efficiency["estimators"]["relative"]
    assert after.efficiency["estimators"]["fraction"] == before.efficiency["estimators"]["fraction"]
    assert after.started_at == before.started_at


def test_a_cell_whose_disk_is_full_fails_in_words_and_the_others_go_on(
    suite_file: Path, tmp_path: Path, lmd: Lmd
) -> None:
    (tmp_path / "small" / "mae" / "seed-0" / "steps.csv").mkdir(parents=True)
    words = ("run", "--suite", suite_file, "--add", f"{TINY}:Tiny", "--methods", "mae,tiny", "--out", tmp_path)
    done = lmd(*words, "--device", "cpu")
    assert done.code == 1
    assert "IsADirectoryError" in done.out
    assert "Traceback" not in done.out + done.err
    assert read_run(tmp_path / "small" / "tiny" / "seed-0" / "record.json").status == "finished"


def test_a_broken_file_is_refused_in_one_line(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nowhere\n")
    done = lmd("run", "--suite", suite_file, "--add", f"{path}:Mine", "--methods", "mine", "--out", tmp_path / "o")
    assert done.code == 2
    assert "importing" in done.err
    assert "No module named 'nowhere'" in done.err


# -- the other commands -----------------------------------------------------------------------------------------------


def test_list_names_suites_methods_datasets_and_metrics(lmd: Lmd) -> None:
    done = lmd("list")
    assert done.code == 0
    for word in ("demo", "in1k", "ablation", "lmd", "mae", "ddpm", "scenes", "MIT", "TTQ", "simmim", "not built yet"):
        assert word in done.out


@pytest.mark.parametrize("words", [["--help"], ["list"]])
def test_help_and_list_never_import_torch(words: list[str]) -> None:
    done = run_without_torch(f"sys.argv = ['lmd-bench', *{words!r}]; from lmd_bench.cli import main; main()")
    assert done.returncode == 0, done.stderr


def test_show_resolves_a_suite_and_a_method(lmd: Lmd) -> None:
    suite = lmd("show", "ablation")
    assert suite.code == 0
    assert "wo-mds" in suite.out
    assert "SD-v1.4" in suite.out
    method = lmd("show", "lmd")
    assert "mask_schedule" in method.out
    assert "projector.path" in method.out
    unknown = lmd("show", "lmdd")
    assert unknown.code == 2
    assert "did you mean 'lmd'" in unknown.err


def test_doctor_shows_machine_versions_and_weights(lmd: Lmd) -> None:
    done = lmd("doctor")
    assert done.code == 0
    assert torch.__version__ in done.out
    assert "shipped:scenes-kl-f8: found" in done.out


@pytest.mark.slow
def test_profile_times_every_row_beside_the_calibrator(suite_file: Path, tmp_path: Path) -> None:
    done = command(
        "profile", "--suite", suite_file, "--methods", "lmd-cs,mae", "--rounds", 2, "--steps", 2, "--untimed", 1,
        "--out", tmp_path, "--device", "cpu",
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


def test_columns_of_steps_are_the_documented_ones(finished: Path) -> None:
    header = (finished / "small" / "mae" / "seed-0" / "steps.csv").read_text().splitlines()[0]
    assert header.split(",") == list(STEP_COLUMNS)


def test_images_of_odd_kinds_are_read(suite_file: Path, tmp_path: Path, lmd: Lmd) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for number in range(12):
        Image.new("CMYK", (40, 40), (number * 20, 0, 0, 0)).save(folder / f"cmyk{number}.jpg")
        Image.new("I;16", (40, 40), number * 5000).save(folder / f"deep{number}.png")
        Image.new("P", (40, 40), number).save(folder / f"palette{number}.png")
        Image.new("RGBA", (40, 40), (number, 0, 0, 128)).save(folder / f"clear{number}.png")
    done = lmd(
        "run", "--suite", suite_file, "--data", folder, "--methods", "mae", "--out", tmp_path / "o",
        "--set", "data.num_workers=0", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
