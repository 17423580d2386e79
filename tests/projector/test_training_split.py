"""Held-out images stay held out: the splits of trainings, of `lsp inspect` and of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lmd_bench.config import DataConfig
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.projector.training_split import (
    SPLIT_FILE,
    TrainingSplit,
    read_split,
    require_unseen,
    seen_in_training,
    split_of_folder,
)


def make_images(folder: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", [f"{number:02d}.png" for number in range(40)])


def scan(folder: Path, num_held_out: int, seed: int = 0) -> FolderIndex:
    return scan_folder(folder, DataConfig(name="folder", path=str(folder), num_held_out=num_held_out, seed=seed))


def trained_on(index: FolderIndex, folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / SPLIT_FILE).write_text(split_of_folder(index, seed).model_dump_json(exclude_defaults=True))
    return folder


def test_a_smaller_split_of_the_same_seed_is_part_of_a_larger_one(images: Path, tmp_path: Path) -> None:
    projector = trained_on(scan(images, 8), tmp_path / "p")
    assert scan(images, 4).held_out == scan(images, 8).held_out[:4]
    for number in (1, 4, 8):
        assert seen_in_training(projector, scan(images, number)) is None
        require_unseen(projector, scan(images, number))


@pytest.mark.parametrize(("number", "seed"), [(10, 0), (8, 1), (2, 7)])
def test_images_that_may_have_been_trained_on_are_counted_and_refused(
    number: int, seed: int, images: Path, tmp_path: Path
) -> None:
    trained = scan(images, 8)
    projector = trained_on(trained, tmp_path / "p")
    other = scan(images, number, seed)
    seen = len(set(other.held_out) & set(trained.train))
    assert seen > 0
    told = seen_in_training(projector, other)
    assert told is not None
    assert f"{seen} of the {number} images" in told
    with pytest.raises(ConfigError, match=r"use --images 8 --data-seed 0, or other images"):
        require_unseen(projector, other)


def test_a_copy_of_the_folder_is_known_and_another_folder_is_not(images: Path, tmp_path: Path) -> None:
    projector = trained_on(scan(images, 8), tmp_path / "p")
    copy = make_images(tmp_path / "copy", [f"{number:02d}.png" for number in range(40)])
    assert seen_in_training(projector, scan(copy, 10)) is not None
    other = make_images(tmp_path / "other", [f"{number:02d}.png" for number in range(50)])
    assert seen_in_training(projector, scan(other, 10)) is None


def test_images_that_came_later_do_not_make_trained_ones_held_out(images: Path, tmp_path: Path) -> None:
    projector = trained_on(scan(images, 8), tmp_path / "p")
    make_images(images, [f"late-{number}.png" for number in range(40)])
    later = scan(images, 8)
    old = {f"{number:02d}.png" for number in range(40)}
    assert set(later.held_out) & old <= set(read_split(projector).held_out)  # type: ignore[union-attr]


def test_a_val_folder_is_never_trained_on(tmp_path: Path) -> None:
    names = [f"{part}/{number}.png" for part in ("train", "val") for number in range(12)]
    folder = make_images(tmp_path / "images", names)
    projector = trained_on(scan(folder, 2), tmp_path / "p")
    assert seen_in_training(projector, scan(folder, 12, seed=5)) is None
    assert read_split(projector).held_out == ()  # type: ignore[union-attr]


def test_scenes_and_folders_without_a_split_are_never_suspected(images: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    assert seen_in_training(tmp_path / "p", scan(images, 8)) is None
    split = TrainingSplit(data="scenes", digest="0" * 16, data_seed=0, num_train=9, num_held_out=1)
    (tmp_path / "p" / SPLIT_FILE).write_text(split.model_dump_json(exclude_defaults=True))
    assert read_split(tmp_path / "p") == split
    assert seen_in_training(tmp_path / "p", scan(images, 8)) is None


@pytest.mark.parametrize("text", ["{", '{"data": "scenes"}'])
def test_a_damaged_split_is_refused(text: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / SPLIT_FILE).write_text(text)
    with pytest.raises(WeightsError, match=r"training-data\.json cannot be read"):
        seen_in_training(tmp_path / "p", scan(images, 8))
