"""RandAugment: what timm does, repeatable by seed, epoch and image alone."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.photos import make_photo_folder
from PIL import Image
from pydantic import ValidationError
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.augment import augmentation_keys, epoch_order, random_flips
from lmd_bench.data.rand_augment import RandAugment
from lmd_bench.data.source import BatchSource, InMemorySource, open_source
from lmd_bench.method import Batch

CPU = torch.device("cpu")
TEXT = "rand-m9-mstd0.5-inc1"


def images_of(count: int, size: int = 24, seed: int = 0) -> Tensor:
    """Smooth random images, uint8."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return (smooth * 255).round().to(torch.uint8)


def in_memory(images: Tensor, **rules: object) -> InMemorySource:
    augmentation = AugmentationConfig.model_validate({"crop": "none", "flip": False, "rand_augment": TEXT, **rules})
    return InMemorySource(images, torch.arange(len(images)), images[:2], augmentation)


def take(source: BatchSource, count: int, batch_size: int = 4, seed: int = 0, start_step: int = 1) -> list[Batch]:
    generator = source.batches(batch_size, seed, start_step)
    try:
        return list(islice(generator, count))
    finally:
        generator.close()


def pixels(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photo_folder(tmp_path_factory.mktemp("photos"), size=40, crops=4)


def open_photos(path: Path, num_workers: int = 0, **rules: object) -> BatchSource:
    data = DataConfig(name="folder", path=str(path), num_held_out=4, num_workers=num_workers)
    return open_source(data, 32, AugmentationConfig.model_validate(rules), CPU)


# -- the augmentation itself ------------------------------------------------------------------------------------------


def test_an_image_is_changed_as_timm_changes_it_under_the_keys_seed() -> None:
    images, keys = images_of(3), torch.tensor([5, -7, 2**62 + 11])
    changed = RandAugment(TEXT, 24, "bicubic")(images, keys)
    constants = {"translate_const": 10, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    reference = rand_augment_transform(TEXT, constants)
    state, numpy_state = random.getstate(), np.random.get_state()
    for image, key, ours in zip(images, keys.tolist(), changed, strict=True):
        word = key % 2**64
        random.seed(word)
        np.random.seed([word % 2**32, word // 2**32])
        wanted = reference(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal(ours, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    random.setstate(state)
    np.random.set_state(numpy_state)


def test_what_becomes_of_an_image_depends_on_its_key_and_nothing_else() -> None:
    images, keys = images_of(16), augmentation_keys(0, 0, torch.arange(16))
    augment = RandAugment(TEXT, 24, "bicubic")
    together = augment(images, keys)
    assert torch.equal(augment(images.flip(0), keys.flip(0)), together.flip(0))
    assert torch.equal(torch.cat([augment(images[[i]], keys[[i]]) for i in range(16)]), together)
    assert not torch.equal(augment(images, augmentation_keys(0, 1, torch.arange(16))), together)
    assert (together != images).flatten(1).any(dim=1).sum() >= 8


def test_nobody_elses_random_numbers_change() -> None:
    random.seed(1)
    np.random.seed(1)
    wanted = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state()
    RandAugment(TEXT, 24, "bilinear")(images_of(4), torch.arange(4))
    assert (random.random(), np.random.rand()) == wanted
    assert torch.equal(torch.random.get_rng_state(), before)


# -- in the sources ---------------------------------------------------------------------------------------------------


def test_images_in_memory_are_flipped_and_then_augmented() -> None:
    images = images_of(12)
    batches = take(in_memory(images, flip=True), 3, seed=3)
    order = epoch_order(3, 0, 12)
    keys = augmentation_keys(3, 0, order)
    flips = random_flips(keys)
    flipped = torch.where(flips.view(-1, 1, 1, 1), images[order].flip(-1), images[order])
    wanted = RandAugment(TEXT, 24, "bicubic")(flipped, keys)
    assert torch.equal(pixels(batches), wanted.float() / 255)
    assert torch.cat([batch.labels for batch in batches if batch.labels is not None]).tolist() == order.tolist()


def test_images_in_memory_depend_on_seed_and_step_alone() -> None:
    source = in_memory(images_of(12), crop="random_resized", flip=True)
    batches = take(source, 7)
    assert torch.equal(pixels(take(source, 2, start_step=6)), pixels(batches[5:]))
    assert torch.equal(pixels(take(source, 7)), pixels(batches))
    assert not torch.equal(pixels(take(source, 7, seed=1)), pixels(batches))
    assert 0 <= pixels(batches).min() < pixels(batches).max() <= 1


def test_methods_collate_augmented_images() -> None:
    seen: list[Tensor] = []

    def collate(samples: list[tuple[Tensor, int | None]], generator: torch.Generator) -> dict[str, Tensor]:
        seen.extend(image for image, _ in samples)
        return {}

    batch = take(in_memory(images_of(8)).with_collate(collate), 1)[0]
    assert torch.equal(torch.stack(seen).float() / 255, batch.images)


def test_workers_and_their_number_change_nothing(photos: Path) -> None:
    alone, many = open_photos(photos, 0, rand_augment=TEXT), open_photos(photos, 2, rand_augment=TEXT)
    first = pixels(take(alone, 4))
    assert torch.equal(pixels(take(many, 4)), first)
    assert torch.equal(pixels(take(many, 2, start_step=3)), first[8:])


def test_files_are_cropped_and_flipped_before(photos: Path) -> None:
    plain, augmented = open_photos(photos), open_photos(photos, rand_augment=TEXT)
    before = (take(plain, 1, batch_size=8)[0].images * 255).round().to(torch.uint8)
    keys = augmentation_keys(0, 0, epoch_order(0, 0, plain.num_train)[:8])
    wanted = RandAugment(TEXT, 32, "bicubic")(before, keys)
    assert torch.equal((take(augmented, 1, batch_size=8)[0].images * 255).round().to(torch.uint8), wanted)
    assert not torch.equal(before, wanted)


def test_held_out_images_are_left_alone(photos: Path) -> None:
    assert torch.equal(open_photos(photos).held_out(4), open_photos(photos, rand_augment=TEXT).held_out(4))


# -- the setting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT, "rand", "rand-m7-n3-p0.8", "rand-tweights-mstd101", "rand-m15-mmax20-t3aw"])
def test_timms_strings_are_taken(text: str) -> None:
    assert AugmentationConfig(rand_augment=text).rand_augment == text
    RandAugment(text, 24, "bicubic")(images_of(2), torch.arange(2))


@pytest.mark.parametrize("text", ["", "m9", "augmix-m3", "rand-m", "rand-m9-x2", "rand-m9-m5", "rand-tw0", "rand-p1.5"])
def test_strings_that_timm_passes_over_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"is not timm's form.*such as rand-m9-mstd0\.5-inc1"):
        AugmentationConfig(rand_augment=text)
