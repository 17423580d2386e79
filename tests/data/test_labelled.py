"""Labelled images for accuracy and probes: which ones, with which labels, and what is wrong with a folder's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data import folder_source
from lmd_bench.data.labelled import LabelledImages
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.source import FIRST_VALIDATION_SCENE, BatchSource, InMemorySource, open_source
from lmd_bench.errors import DataError

CPU = torch.device("cpu")
PLAIN = AugmentationConfig(crop="none", flip=False)
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def write(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def coloured(root: Path, *, train: int = 6, val: int = 3, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """train/ and val/ with a folder for each colour."""
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            for number in range(count):
                write(root / split / name / f"{number}.png", COLOURS[name])
    return root


def folder(path: Path, num_workers: int = 0, num_held_out: int = 3) -> BatchSource:
    values = {"name": "folder", "path": str(path), "num_held_out": num_held_out, "num_workers": num_workers}
    return open_source(DataConfig.model_validate(values), 16, PLAIN, CPU)


def read(images: LabelledImages, batch_size: int = 4) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*images.batches(batch_size), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def labels_by_colour(pixels: Tensor) -> Tensor:
    """The strongest channel, blue first as in the folders' order."""
    return 2 - pixels.float().mean(dim=(2, 3)).argmax(dim=1)


# -- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_are_validated_on_fresh_ones_with_every_class_as_often() -> None:
    source = open_source(DataConfig(image_size=16, num_train=20, num_held_out=8), 16, PLAIN, CPU)
    pixels, labels = read(source.validation(30))
    wanted = FIRST_VALIDATION_SCENE + torch.arange(30)
    assert torch.equal(pixels, Scenes(0, 16).render(wanted))
    assert torch.equal(labels.bincount(), torch.full((10,), 3))
    assert source.validation(None).num_images == 8


def test_scenes_can_be_labelled_by_the_colour_that_their_captions_name() -> None:
    from lmd_bench.data._scene_layout import COLOURS as OF_OBJECTS

    data = DataConfig(image_size=16, num_train=40, num_held_out=8, labels="colour")
    source = open_source(data, 16, PLAIN, CPU)
    assert source.num_classes == 8
    for images, first in ((source.labelled_sample(40), 0), (source.validation(40), FIRST_VALIDATION_SCENE)):
        captions = Scenes(0, 16).captions(first + torch.arange(40))
        for label, caption in zip(read(images)[1].tolist(), captions, strict=True):
            assert f" {OF_OBJECTS[label][0]} " in caption


def test_labelled_scenes_are_the_first_of_those_trained_on_under_another_augmentation() -> None:
    source = open_source(DataConfig(image_size=16, num_train=40, num_held_out=8), 16, AugmentationConfig(), CPU)
    labelled = source.labelled(PLAIN, 20)
    assert (labelled.num_train, labelled.num_classes) == (20, 10)
    batch = next(labelled.batches(20, seed=1))
    assert batch.labels is not None
    order = batch.labels.argsort(stable=True)
    scenes = Scenes(0, 16)
    found = {pixels.numpy().tobytes() for pixels in (batch.images * 255).round().to(torch.uint8)}
    assert found == {pixels.numpy().tobytes() for pixels in scenes.render(range(20))}
    assert torch.equal(batch.labels[order], scenes.labels(range(20)).sort().values)
    pixels, labels = read(source.labelled_sample(10))
    assert torch.equal(pixels, scenes.render(range(10)))
    assert torch.equal(labels, scenes.labels(range(10)))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folders_validation_images_are_all_of_val_with_the_classes_of_train(tmp_path: Path, num_workers: int) -> None:
    source = folder(coloured(tmp_path), num_workers)
    images = source.validation(None)
    assert images.num_images == 9
    pixels, labels = read(images)
    assert pixels.shape == (9, 3, 16, 16)
    assert torch.equal(labels, labels_by_colour(pixels))
    assert torch.equal(labels.bincount(), torch.tensor([3, 3, 3]))
    assert torch.equal(read(images)[0], pixels)
    source.close()


def test_fewer_validation_images_are_the_first_of_one_order_however_many(tmp_path: Path) -> None:
    source = folder(coloured(tmp_path))
    few, more = read(source.validation(3))[1], read(source.validation(7))[1]
    assert torch.equal(more[:3], few)
    with pytest.raises(DataError, match=r"10 validation images are asked for, 9 are there; lower finetune\.num_val"):
        source.validation(10)


def test_without_val_the_held_out_images_are_validated_on(tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        for number in range(8):
            write(tmp_path / name / f"{number}.png", colour)
    source = folder(tmp_path, num_held_out=5)
    pixels, labels = read(source.validation(None), 5)
    assert torch.equal(pixels, source.held_out(5))
    assert torch.equal(labels, labels_by_colour(pixels))


def test_many_validation_images_are_read_anew_at_every_pass_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(coloured(tmp_path))
    kept = read(source.validation(None))
    monkeypatch.setattr(folder_source, "_KEPT_BYTES", 0)
    images = source.validation(None)
    for _ in range(2):
        again = read(images)
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_a_crop_shows_the_middle_of_the_central_square(tmp_path: Path) -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[8:24, 16:32] = 255  # the middle half of the central 32 x 32
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / split / "one" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    whole, _ = read(folder(tmp_path).validation(None))
    middle, _ = read(folder(tmp_path).validation(None, 0.5))
    assert 0.2 < whole.float().mean() / 255 < 0.3
    assert (middle == 255).all()


def test_labelled_training_images_are_as_many_as_asked_for_with_their_own_labels(tmp_path: Path) -> None:
    source = folder(coloured(tmp_path))
    labelled = source.labelled(PLAIN, 7)
    assert (labelled.num_train, labelled.num_classes) == (7, 3)
    batch = next(labelled.batches(7, seed=0))
    assert batch.labels is not None
    assert torch.equal(batch.labels, labels_by_colour(batch.images))
    pixels, labels = read(source.labelled_sample(5))
    assert len(labels) == 5
    assert torch.equal(labels, labels_by_colour(pixels))
    assert source.labelled(PLAIN, None).num_train == source.num_train


def test_a_sample_shows_every_class_however_rare_and_is_the_first_of_one_order(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / "train" / "blue" / f"{number:02}.png", (0, 0, 200))
    for name in ("green", "red"):
        write(tmp_path / "train" / name / "0.png", COLOURS[name])
    write(tmp_path / "val" / "red" / "0.png", COLOURS["red"])
    source = folder(tmp_path, num_held_out=1)
    for count in (3, 10):
        pixels, labels = read(source.labelled_sample(count), 20)
        assert labels.bincount().tolist() == [count - 2, 1, 1]
        assert torch.equal(labels, labels_by_colour(pixels))
        assert torch.equal(read(source.labelled_sample(count), 20)[0], pixels)
    assert len(read(source.labelled_sample(2))[1].unique()) == 2
    assert source.labelled_sample(100).num_images == 62


def test_a_sample_in_memory_shows_every_class_and_then_the_first_images() -> None:
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 1, 2])
    source = InMemorySource(images, labels, images, PLAIN, num_classes=3)
    for count, wanted in ((2, [0, 3]), (3, [0, 3, 8]), (5, [0, 1, 2, 3, 8]), (20, list(range(12)))):
        pixels, found = read(source.labelled_sample(count), 20)
        assert pixels[:, 0, 0, 0].tolist() == wanted
        assert torch.equal(found, labels[wanted])


def test_classes_in_val_that_train_lacks_are_named_with_their_images_counted(tmp_path: Path) -> None:
    coloured(tmp_path)
    for number in range(2):
        write(tmp_path / "val" / "Red" / f"{number}.png", (200, 0, 0))
    source = folder(tmp_path)
    with pytest.raises(DataError, match=r"in class folders that no training image lies in: Red \(2\); name the"):
        source.validation(None)


def test_val_without_class_folders_is_told(tmp_path: Path) -> None:
    coloured(tmp_path, val=0)
    for number in range(4):
        write(tmp_path / "val" / f"{number}.png", (200, 0, 0))
    with pytest.raises(DataError, match=r"no training image lies in: no folder \(4\)"):
        folder(tmp_path).validation(None)


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for number in range(16):
        write(tmp_path / f"{number}.png", (10 * number, 0, 0))
    source = folder(tmp_path)
    for ask in (lambda: source.validation(None), lambda: source.labelled(PLAIN, 4), lambda: source.labelled_sample(4)):
        with pytest.raises(DataError, match="no labels: the images do not lie in class folders"):
            ask()


def test_a_file_that_breaks_after_the_scan_is_left_out_and_too_many_are_an_error(tmp_path: Path) -> None:
    source = folder(coloured(tmp_path))
    images = source.validation(None)
    (tmp_path / "val" / "red" / "0.png").write_bytes(b"no picture")
    assert len(read(images)[1]) == 8
    images = source.validation(None)
    (tmp_path / "val" / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 of 9 labelled images cannot be used \(more than 1 %\): val/red/0\.png"):
        read(images)


def test_lsuns_validation_records_have_the_class_of_their_category(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")
    for category, colour in (("bedroom", (0, 0, 200)), ("church", (0, 200, 0))):
        for split, count in (("train", 6), ("val", 4)):
            place = tmp_path / f"{category}_{split}_lmdb"
            place.mkdir()
            database = lmdb.open(str(place), map_size=2**22)
            with database.begin(write=True) as transaction:
                for number in range(count):
                    file = io.BytesIO()
                    Image.new("RGB", (20, 16), colour).save(file, "PNG")
                    transaction.put(f"{number:040x}".encode(), file.getvalue())
            database.close()
    pixels, labels = read(folder(tmp_path).validation(None))
    assert torch.equal(labels.bincount(), torch.tensor([4, 4]))
    assert torch.equal(labels, labels_by_colour(pixels))
