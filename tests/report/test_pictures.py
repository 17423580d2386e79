"""Reconstructions side by side and samples: the files that cells left, with their numbers, and nothing blank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lmd_bench.config import Suite
from lmd_bench.records import PICTURES, cell_folder
from tests.report.conftest import simulated_quality, write_pictures, write_run
from tests.report.test_build import build
from tests.report.test_image_quality import brightness_spread


def kinds(folder: Path, stem: str) -> list[tuple[str, str]]:
    frame = pd.read_csv(folder / f"{stem}.csv", comment="#")
    return list(zip(frame.row, frame.kind, strict=True))


def test_every_row_fills_the_same_images_and_the_files_are_listed(tmp_path: Path, suite: Suite) -> None:
    for name in ("lmd-cs", "mae"):
        for seed in (0, 1):
            write_run(tmp_path, suite, name, seed)
            write_pictures(tmp_path, suite, name, seed)
    report = build(tmp_path, suite)
    assert kinds(report.folder, "reconstructions") == [
        ("lmd-cs", "original"), ("lmd-cs", "masked"), ("lmd-cs", "filled"), ("mae", "filled"),
    ]  # fmt: skip
    frame = pd.read_csv(report.folder / "reconstructions.csv", comment="#")
    assert set(frame.seed) == {0}
    assert frame.file[0] == f"lmd-cs/seed-0/{PICTURES}/original.png"
    assert brightness_spread(report.folder / "reconstructions.png") > 10
    assert "Reconstructions side by side" in report.page.read_text(encoding="utf-8")
    assert str(tmp_path) not in (report.folder / "reconstructions.csv").read_text(encoding="utf-8")


def test_the_picture_shows_the_tiles_of_its_files(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae")
    write_pictures(tmp_path, suite, "mae", tile_px=16, count=4)
    report = build(tmp_path, suite)
    with Image.open(report.folder / "reconstructions.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    with Image.open(cell_folder(tmp_path, "demo", "mae", 0) / PICTURES / "filled.png") as image:
        wanted = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)[[0, 63]].tolist()}
    assert wanted <= {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}


def test_rows_of_own_masks_are_shown_with_what_they_were_given(tmp_path: Path, suite: Suite) -> None:
    quality = simulated_quality(1.0, what="filled against real, own masks: one of every 2 x 2")
    write_run(tmp_path, suite, "lmd-cs", image_quality=quality)
    write_run(tmp_path, suite, "mae")
    for name in ("lmd-cs", "mae"):
        write_pictures(tmp_path, suite, name)
    report = build(tmp_path, suite)
    assert kinds(report.folder, "reconstructions") == [
        ("mae", "original"), ("mae", "masked"), ("lmd-cs", "masked"), ("lmd-cs", "filled"), ("mae", "filled"),
    ]  # fmt: skip
    assert "masks of their own are shown with what they were given" in report.page.read_text(encoding="utf-8")


def test_samples_stand_in_a_figure_of_their_own(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "ddpm")
    write_run(tmp_path, suite, "mae")
    write_pictures(tmp_path, suite, "ddpm", kinds=("samples",))
    report = build(tmp_path, suite)
    assert kinds(report.folder, "samples") == [("ddpm", "samples")]
    assert brightness_spread(report.folder / "samples.png") > 10
    assert not (report.folder / "reconstructions.png").exists()
    (cell_folder(tmp_path, "demo", "ddpm", 0) / PICTURES / "samples.png").unlink()
    assert not (build(tmp_path, suite).folder / "samples.png").exists(), "left over from a picture that is gone"


def test_a_damaged_picture_is_a_problem_and_the_others_are_drawn(tmp_path: Path, suite: Suite) -> None:
    for name in ("lmd-cs", "mae"):
        write_run(tmp_path, suite, name)
        write_pictures(tmp_path, suite, name)
    (cell_folder(tmp_path, "demo", "lmd-cs", 0) / PICTURES / "filled.png").write_bytes(b"no picture")
    report = build(tmp_path, suite)
    assert [kind for _, kind in kinds(report.folder, "reconstructions")] == ["original", "masked", "filled"]
    (problem,) = report.problems
    assert problem.startswith("lmd-cs/seed-0/pictures/filled.png: not a readable picture")
    assert str(tmp_path) not in problem


def test_other_images_are_named_and_rows_without_pictures_are_left_out(tmp_path: Path, suite: Suite) -> None:
    for name in ("lmd-cs", "mae"):
        write_run(tmp_path, suite, name)
        write_pictures(tmp_path, suite, name)
    write_run(tmp_path, suite, "ddpm")
    folder = cell_folder(tmp_path, "demo", "mae", 0) / PICTURES
    Image.new("RGB", (64, 16), (1, 2, 3)).save(folder / "original.png")
    report = build(tmp_path, suite)
    frame = pd.read_csv(report.folder / "reconstructions.csv", comment="#")
    assert list(frame[frame.kind == "filled"].label) == ["LMD-CS", "MAE (other images)"]
