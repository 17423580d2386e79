"""`run` and `report` end to end: what they write, how they go on, and a method of one's own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import Outcome, lmd_bench, own_process_environment, own_process_words
from helpers.photos import make_photo_folder
from helpers.without_torch import run_without_torch
from PIL import Image

from lmd_bench.records import STEP_COLUMNS, read_run, read_steps

ROWS = ["lmd-us", "lmd-ps", "lmd-cs", "lmd-cs-adan", "mae", "ddpm", "simmim", "greenmim", "iddpm", "ldm"]
OWN = Path(__file__).parents[1] / "helpers" / "methods.py"


def cell(out: Path, row: str, seed: int = 0) -> Path:
    return out / "small" / row / f"seed-{seed}"


def learned(out: Path, rows: list[str]) -> dict[str, object]:
    """Everything in a suite's records that does not depend on time."""
    values: dict[str, object] = {}
    for row in rows:
        record = read_run(cell(out, row) / "record.json")
        steps = read_steps(cell(out, row) / "steps.csv")
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
        record = read_run(cell(finished, row) / "record.json")
        assert record.status == "finished"
        assert record.timing is not None
        assert record.phases is not None
        assert record.cost is not None
        assert record.cost.flops_per_step is not None, record.not_measured
        assert record.timing.train_s > 0
        assert record.environment["packages"]["torch"] == torch.__version__
        assert record.command.startswith("lmd-bench run")
        steps = read_steps(cell(finished, row) / "steps.csv")
        assert steps["step"] == [-2, -1, 1, 2, 3, 4, 5, 6]
        assert steps["timed"] == [0, 0, 1, 1, 1, 1, 1, 1]
        assert [check.step for check in record.yardstick.checks] == [0, 3, 6]  # type: ignore[union-attr]


def test_latent_methods_report_projector_ceiling_and_leak_and_pixel_methods_do_not(finished: Path) -> None:
    lmd_record = read_run(cell(finished, "lmd-cs") / "record.json")
    mae_record = read_run(cell(finished, "mae") / "record.json")
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
    table = (report / "table1.md").read_text()
    assert "Later" in table
    assert "left to another suite" in table


def test_columns_of_steps_are_the_documented_ones(finished: Path) -> None:
    header = (cell(finished, "mae") / "steps.csv").read_text().splitlines()[0]
    assert header.split(",") == list(STEP_COLUMNS)


def test_finished_cells_are_never_run_again_and_the_report_is_made_again(
    finished: Path, suite_file: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    stamps = {row: (cell(out, row) / "record.json").stat().st_mtime_ns for row in ROWS}
    page = out / "small" / "report" / "index.html"
    page.unlink()
    done = lmd_bench("run", "--suite", suite_file, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    assert f"0 cells to run, {len(ROWS)} finished before" in done.out
    assert "later: not measured: left to another suite" in done.out
    assert stamps == {row: (cell(out, row) / "record.json").stat().st_mtime_ns for row in ROWS}
    assert page.is_file()


def test_other_settings_never_overwrite_finished_cells_without_force(finished: Path, suite_file: Path) -> None:
    words = ("--suite", suite_file, "--out", finished, "--methods", "mae", "--steps", 7, "--device", "cpu")
    done = lmd_bench("run", *words)
    assert done.code == 2
    assert "finished with other settings (steps 6, now 7)" in done.err
    assert "--force" in done.err


def test_report_works_alone_and_without_torch(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    words = ["lmd-bench", "report", str(out)]
    done = run_without_torch(f"sys.argv = {words!r}; from lmd_bench.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(finished: Path, suite_file: Path, tmp_path: Path) -> None:
    rows = ["lmd-cs", "mae", "ddpm"]
    words = ("run", "--suite", suite_file, "--out", tmp_path, "--device", "cpu", "--methods", ",".join(rows))
    for row, how in (("mae", signal.SIGKILL), ("ddpm", signal.SIGINT)):
        process = subprocess.Popen(
            own_process_words(*words),
            env=own_process_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not (cell(tmp_path, row) / "steps.csv").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        code = process.wait(timeout=60)
        if how == signal.SIGINT and not (cell(tmp_path, "ddpm") / "record.json").exists():
            assert code == 130
    done = lmd_bench(*words)
    assert done.code == 0, done.err
    assert learned(tmp_path, rows) == learned(finished, rows)


def test_dry_run_estimates_and_writes_nothing(suite_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    words = ("--suite", suite_file, "--out", out, "--device", "cpu", "--dry-run")
    done = lmd_bench("run", *words, "--add", f"{OWN}:Collating", "--methods", "mae,collating")
    assert done.code == 0, done.err
    assert "could not be timed" not in done.out
    assert done.out.count("ms a step") == 2
    assert "nothing was written" in done.out
    assert not out.exists()


# -- a method of one's own, seeds, another estimator ------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of 30 steps of two methods of one's own and of MAE with two seeds. Nothing may change it: copy it."""
    out = tmp_path_factory.mktemp("own")
    done = lmd_bench(*own_words(suite_file, out))
    assert done.code == 0, done.err
    return out


def own_words(suite_file: Path, out: Path, file: Path = OWN) -> tuple[object, ...]:
    return (
        "run", "--suite", suite_file, "--out", out, "--device", "cpu", "--steps", 30, "--seeds", "0,1", "--add",
        f"{file}:Tiny", "--add", f"{file}:Collating", "--methods", "tiny,collating,mae", "--set",
        "methods.tiny.options.width=16",
    )  # fmt: skip


def test_a_users_own_method_is_one_file(own: Path) -> None:
    record = read_run(cell(own, "tiny") / "record.json")
    assert record.config["options"]["width"] == 16
    assert "tiny" in (own / "small" / "report" / "index.html").read_text()


def test_a_method_may_prepare_batches_in_a_collate_of_its_own(own: Path) -> None:
    record = read_run(cell(own, "collating") / "record.json")
    assert record.cost is not None
    assert record.cost.flops_per_step is not None, record.not_measured


def test_a_changed_file_is_another_experiment(own: Path, suite_file: Path, tmp_path: Path) -> None:
    changed = tmp_path / "methods.py"
    changed.write_text(OWN.read_text() + "\n# changed\n")
    done = lmd_bench(*own_words(suite_file, own, changed))
    assert done.code == 2
    assert "finished with other settings (code" in done.err


def test_force_runs_again_and_the_seeds_differ(own: Path, suite_file: Path, tmp_path: Path) -> None:
    losses = [read_steps(cell(own, "mae", seed) / "steps.csv")["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    out = Path(shutil.copytree(own, tmp_path / "out"))
    stamp = (cell(out, "mae") / "record.json").stat().st_mtime_ns
    words = ("--suite", suite_file, "--out", out, "--device", "cpu", "--steps", 30, "--methods", "mae", "--force")
    assert lmd_bench("run", *words).code == 0
    assert (cell(out, "mae") / "record.json").stat().st_mtime_ns != stamp
    assert read_steps(cell(out, "mae") / "steps.csv")["loss"] == losses[0]


def test_another_estimator_is_counted_from_the_steps_on_disk(own: Path, suite_file: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(own, tmp_path / "out"))
    before = read_run(cell(out, "mae") / "record.json")
    words = ("--suite", suite_file, "--out", out, "--device", "cpu", "--steps", 30, "--methods", "mae")
    done = lmd_bench("run", *words, "--set", "estimator.delta=0.05")
    assert done.code == 0, done.err
    assert "counted anew, from the steps on disk: mae" in done.out
    after = read_run(cell(out, "mae") / "record.json")
    assert after.efficiency is not None
    assert before.efficiency is not None
    assert after.efficiency["config"]["delta"] == 0.05
    assert after.efficiency["estimators"]["relative"] != before.efficiency["estimators"]["relative"]
    assert after.efficiency["estimators"]["fraction"] == before.efficiency["estimators"]["fraction"]
    assert after.started_at == before.started_at


# -- cells that fail --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """OUT and end of a run of three cells: a loss that is no number, a file that cannot be written, a sound one."""
    out = tmp_path_factory.mktemp("failing")
    (cell(out, "mae") / "steps.csv").mkdir(parents=True)
    words = (
        "--suite",
        suite_file,
        "--out",
        out,
        "--device",
        "cpu",
        "--add",
        f"{OWN}:Tiny",
        "--add",
        f"{OWN}:Collating",
    )
    settings = ("--methods", "tiny,mae,collating", "--set", "methods.tiny.options.nan_at=5")
    return out, lmd_bench("run", *words, *settings)


def test_a_cell_that_fails_is_recorded_the_others_go_on_and_the_code_is_1(failing: tuple[Path, Outcome]) -> None:
    out, done = failing
    assert done.code == 1
    assert "step 5: the loss is nan" in done.out
    assert "2 of 3 cells failed: tiny seed 0, mae seed 0" in done.err
    failed = read_run(cell(out, "tiny") / "record.json")
    assert failed.status == "failed"
    assert failed.error is not None
    assert "step 5" in failed.error
    assert read_steps(cell(out, "tiny") / "steps.csv")["step"][-1] == 5
    assert read_run(cell(out, "collating") / "record.json").status == "finished"
    assert "step 5: the loss is nan" in (out / "small" / "report" / "index.html").read_text()


def test_a_cell_that_cannot_write_fails_in_words(failing: tuple[Path, Outcome]) -> None:
    _, done = failing
    assert "IsADirectoryError" in done.out
    assert "Traceback" not in done.out + done.err


def test_a_failed_cell_runs_again(failing: tuple[Path, Outcome], suite_file: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(failing[0], tmp_path / "out"))
    words = ("--suite", suite_file, "--out", out, "--device", "cpu", "--add", f"{OWN}:Tiny", "--methods", "tiny")
    again = lmd_bench("run", *words)
    assert again.code == 0, again.err
    assert read_run(cell(out, "tiny") / "record.json").status == "finished"


# -- image folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_run(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """OUT and end of a run on photographs, pictures of odd kinds and one file cut off."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out")
    make_photo_folder(folder, size=64, crops=16)
    (folder / "odd").mkdir()
    for number in range(12):
        Image.new("CMYK", (40, 40), (number * 20, 0, 0, 0)).save(folder / "odd" / f"cmyk{number}.jpg")
        Image.new("I;16", (40, 40), number * 5000).save(folder / "odd" / f"deep{number}.png")
        Image.new("P", (40, 40), number).save(folder / "odd" / f"palette{number}.png")
        Image.new("RGBA", (40, 40), (number, 0, 0, 128)).save(folder / "odd" / f"clear{number}.png")
    broken = folder / "astronaut" / "astronaut-0000.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    done = lmd_bench(
        "run", "--suite", suite_file, "--data", folder, "--methods", "lmd-cs,mae", "--out", out,
        "--set", "data.num_workers=0", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out, done


def test_it_runs_on_a_folder_of_photographs_with_one_corrupt_file(folder_run: tuple[Path, Outcome]) -> None:
    out, done = folder_run
    assert "astronaut-0000.jpg" in done.out
    record = read_run(cell(out, "mae") / "record.json")
    assert record.data["num_skipped"] == 1
    assert "astronaut-0000.jpg" in " ".join(record.notes)


def test_images_of_odd_kinds_are_read(folder_run: tuple[Path, Outcome]) -> None:
    record = read_run(cell(folder_run[0], "lmd-cs") / "record.json")
    assert record.data["num_train"] + record.data["num_held_out"] + record.data["num_skipped"] == 5 * 16 + 4 * 12


@pytest.mark.slow
def test_in1k_runs_three_steps_at_published_size(tmp_path: Path) -> None:
    make_photo_folder(tmp_path / "train_images", size=64, crops=20)
    done = lmd_bench(
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
    assert "the released recipe uses the SD-v1.4 KL autoencoder" in done.out
