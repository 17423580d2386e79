"""Bad input to `run`: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import lmd_bench


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
        (["--add", f"{Path(__file__).parents[1] / 'helpers' / 'methods.py'}:MAE"], "a method 'mae' is installed"),
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
    words: list[str], line: str, suite_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    done = lmd_bench("run", "--suite", suite_file, "--device", "cpu", "--out", out, *words)
    assert done.code == 2
    assert line in done.err, done.err
    assert "Traceback" not in done.err
    assert not out.exists()


def test_all_problems_are_listed_together(suite_file: Path, tmp_path: Path) -> None:
    done = lmd_bench(
        "run", "--suite", suite_file, "--device", "tpu", "--out", tmp_path / "o",
        "--set", "methods.mae.options.patch_size=5", "--set", "evaluation.num_images=9",
    )  # fmt: skip
    assert done.code == 2
    assert len(done.err.splitlines()) == 3


@pytest.mark.parametrize("kind", ["empty", "text", "file"])
def test_folders_without_images_are_refused(kind: str, suite_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if kind == "file":
        folder.write_text("no folder")
    else:
        folder.mkdir()
    if kind == "text":
        (folder / "notes.txt").write_text("no image")
    done = lmd_bench("run", "--suite", suite_file, "--data", folder, "--out", tmp_path / "o", "--device", "cpu")
    assert done.code == 2
    assert str(folder) in done.err
    assert "Traceback" not in done.err


def test_an_out_that_is_a_file_is_refused(suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("")
    done = lmd_bench("run", "--suite", suite_file, "--out", tmp_path / "o", "--device", "cpu")
    assert done.code == 2
    assert "is a file, not a folder" in done.err


def test_a_record_of_another_schema_is_named(finished: Path, suite_file: Path, tmp_path: Path) -> None:
    values = json.loads((finished / "small" / "mae" / "seed-0" / "record.json").read_text())
    values["schema"] = 99
    path = tmp_path / "small" / "mae" / "seed-0" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
    done = lmd_bench("run", "--suite", suite_file, "--out", tmp_path, "--methods", "mae", "--device", "cpu")
    assert done.code == 2
    assert "a record of schema 99, this version reads schema" in done.err


def test_too_little_disk_is_found_before_the_run(
    suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    done = lmd_bench("run", "--suite", suite_file, "--out", tmp_path / "o", "--methods", "mae", "--device", "cpu")
    assert done.code == 2
    assert "free some space" in done.err


def test_a_broken_file_is_refused_in_one_line(suite_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nowhere\n")
    done = lmd_bench(
        "run", "--suite", suite_file, "--add", f"{path}:Mine", "--methods", "mine", "--out", tmp_path / "o"
    )
    assert done.code == 2
    assert "importing" in done.err
    assert "No module named 'nowhere'" in done.err
