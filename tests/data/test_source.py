"""Batch sources: order, augmentation, workers, damaged files, and what they leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.photos import make_photo_folder
from PIL import Image
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data import image_files
from lmd_bench.data.augment import augmentation_keys, epoch_order, random_crop_boxes, resized_crops
from lmd_bench.data.folder_source import FolderSource, default_num_workers
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.source import BatchItem, BatchSource, InMemorySource, open_source, to_batch
from lmd_bench.errors import DataError
from lmd_bench.method import Batch, Method

CPU = torch.device("cpu")
PLAIN = AugmentationConfig(crop="none", flip=False)


def numbered(count: int, augmentation: AugmentationConfig = PLAIN, **options: object) -> InMemorySource:
    """Images whose every pixel is their own number, labelled with it."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 8, 8).contiguous()
    return InMemorySource(images, torch.arange(count), images[:2], augmentation, **options)  # type: ignore[arg-type]


def take(source: BatchSource, count: int, batch_size: int = 4, seed: int = 0, start_step: int = 1) -> list[Batch]:
    generator = source.batches(batch_size, seed, start_step)
    try:
        return list(islice(generator, count))
    finally:
        generator.close()


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert (a.labels is None) == (b.labels is None)
        assert a.labels is None or b.labels is None or torch.equal(a.labels, b.labels)
        assert a.extra.keys() == b.extra.keys()
        assert all(torch.equal(a.extra[name], b.extra[name]) for name in a.extra)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photo_folder(tmp_path_factory.mktemp("photos"), size=40, crops=8)


def open_photos(path: Path, num_workers: int = 0, collate: object = None, **rules: object) -> FolderSource:
    data = DataConfig(name="folder", path=str(path), num_held_out=4, num_workers=num_workers)
    source = open_source(data, 32, AugmentationConfig.model_validate(rules), CPU, collate)  # type: ignore[arg-type]
    assert isinstance(source, FolderSource)
    return source


# -- order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_and_drops_the_incomplete_batch() -> None:
    batches = take(numbered(10), 4)
    first, second = torch.cat([b.labels for b in batches[:2]]), torch.cat([b.labels for b in batches[2:]])
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 8
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first.tolist())
    for batch in batches:
        assert torch.equal(batch.images[:, 0, 0, 0], batch.labels / 255)
        assert batch.images.dtype == torch.float32


def test_what_a_step_gets_depends_on_seed_and_step_alone() -> None:
    source = numbered(10, AugmentationConfig(crop="random_resized"))
    run = take(source, 9)
    assert_equal(take(source, 9), run)
    assert_equal(take(source, 4, start_step=6), run[5:])
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(take(source, 9, seed=1), run, strict=True))


def test_orders_are_permutations_without_drift() -> None:
    orders = torch.stack([epoch_order(0, epoch, 20) for epoch in range(2000)])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(20).expand(2000, 20))
    assert (orders.float().mean(dim=0) - 9.5).abs().max() < 4.5 * (33.25 / 2000) ** 0.5


def test_global_generators_are_left_alone(photos: Path) -> None:
    sources = [numbered(10, AugmentationConfig(crop="random_resized")), open_photos(photos), open_photos(photos, 1)]
    for source in sources:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        take(source, 3)
        assert torch.equal(torch.rand(3), expected)


def test_too_few_images_for_a_batch_are_refused_at_once(photos: Path) -> None:
    with pytest.raises(DataError, match="10 training images do not fill one batch of 16"):
        numbered(10).batches(16, 0)
    with pytest.raises(DataError, match="36 training images do not fill one batch of 64"):
        open_photos(photos).batches(64, 0)


# -- augmentation -----------------------------------------------------------------------------------------------------


def test_half_of_the_images_are_flipped_differently_in_every_epoch() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(200, 3, 8, 8).contiguous()
    source = InMemorySource(ramp, None, ramp[:1], AugmentationConfig(crop="none", flip=True))
    flips = [batch.images[:, 0, 0, 0] > 0 for batch in take(source, 20, batch_size=200)]
    share = torch.stack(flips).float().mean()
    assert abs(share - 0.5) < 4.5 * (0.25 / 4000) ** 0.5
    assert not torch.equal(flips[0], flips[1])


def test_crops_have_the_distribution_of_torchvisions() -> None:
    """Means and spreads of area, shape and place over 2,000 draws, wide image and all."""
    from torchvision.transforms import RandomResizedCrop

    height, width, scale, ratio = 48, 80, (0.2, 1.0), (0.75, 4 / 3)
    ours = random_crop_boxes(augmentation_keys(0, 0, torch.arange(2000)), height, width, scale, ratio).double()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    draws = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(2000)]
    theirs = torch.tensor(draws, dtype=torch.float64)
    for a, b in zip(_features(ours), _features(theirs), strict=True):
        error = (a.var() / 2000 + b.var() / 2000).sqrt()
        assert abs(a.mean() - b.mean()) < 4.5 * error
        assert abs(a.std() / b.std() - 1) < 0.12


def _features(boxes: Tensor) -> list[Tensor]:
    top, left, height, width = boxes.unbind(1)
    return [height * width, (width / height).log(), top + height / 2, left + width / 2]


@pytest.mark.parametrize(("height", "width"), [(1000, 8), (8, 1000)])
def test_boxes_of_extreme_images_fall_back_to_the_central_box(height: int, width: int) -> None:
    boxes = random_crop_boxes(augmentation_keys(0, 0, torch.arange(50)), height, width, (0.9, 1.0), (0.75, 4 / 3))
    top, left, box_height, box_width = boxes[0].tolist()
    assert (boxes == boxes[0]).all()
    assert abs(top + box_height / 2 - height / 2) <= 0.5
    assert abs(left + box_width / 2 - width / 2) <= 0.5
    assert 0.7 < box_width / box_height < 1.4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resized_crops_are_pillows(interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    boxes = random_crop_boxes(augmentation_keys(0, 0, torch.arange(6)), 48, 48, (0.05, 1.0), (0.5, 2.0))
    ours = resized_crops(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, boxes, interpolation)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    for number, (top, left, height, width) in enumerate(boxes.tolist()):
        cut = Image.fromarray(pixels[number]).crop((left, top, left + width, top + height))
        theirs = np.asarray(cut.resize((48, 48), resample), dtype=float)
        difference = ours[number].permute(1, 2, 0).numpy() * 255 - theirs
        # Pillow rounds and clips to 8 bits between the two passes
        assert np.abs(difference).mean() < 0.6
        assert np.quantile(np.abs(difference), 0.95) < 2.0


def test_the_whole_image_as_box_changes_nothing() -> None:
    images = torch.rand(2, 3, 16, 16)
    boxes = torch.tensor([[0, 0, 16, 16]]).expand(2, 4)
    torch.testing.assert_close(resized_crops(images, boxes, "bicubic"), images)


# -- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_are_held_in_memory_and_held_out_ones_are_others() -> None:
    data = DataConfig(num_train=40, num_held_out=6)
    source = open_source(data, 32, AugmentationConfig(), CPU)
    assert source.num_train == 40
    assert source.num_classes == 10
    held_out = source.held_out(6)
    assert held_out.shape == (6, 3, 32, 32)
    assert held_out.dtype == torch.uint8
    batch = take(source, 1, batch_size=8)[0]
    assert batch.images.shape == (8, 3, 32, 32)
    assert 0.0 <= float(batch.images.min()) <= float(batch.images.max()) <= 1.0
    assert batch.labels is not None
    train = torch.cat([b.images for b in take(open_source(data, 32, PLAIN, CPU), 5, 8)])
    distances = (train[:, None] - held_out[None] / 255).flatten(2).abs().amax(dim=2)
    assert float(distances.min()) > 0.05
    with pytest.raises(DataError, match="7 held-out images are asked for, 6 are held out"):
        source.held_out(7)


def test_the_record_of_scenes_tells_seeds_apart() -> None:
    def digest(seed: int) -> object:
        return open_source(DataConfig(num_train=8, num_held_out=2, seed=seed), 32, PLAIN, CPU).describe()["digest"]

    assert digest(0) == digest(0) != digest(1)


def test_scenes_that_do_not_fit_into_memory_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.num_train: 100000064 scenes of 1024 px take .* --data DIR"):
        open_source(DataConfig(num_train=100_000_000), 1024, PLAIN, CPU)


# -- collate ----------------------------------------------------------------------------------------------------------


def noisy_collate(samples: list[tuple[Tensor, int | None]], generator: torch.Generator) -> Mapping[str, Tensor]:
    """Something random, something of the images and something of the labels."""
    return {
        "noise": torch.rand(len(samples), generator=generator),
        "first": torch.stack([image[0, 0, 0] for image, _ in samples]),
        "label": torch.tensor([-1 if label is None else label for _, label in samples]),
    }


def test_collate_sees_the_batch_and_a_generator_of_seed_and_step(photos: Path) -> None:
    for source in (numbered(10, collate=noisy_collate), open_photos(photos, 0, noisy_collate)):
        batches = take(source, 5)
        for batch in batches:
            assert torch.equal(batch.extra["first"] / 255, batch.images[:, 0, 0, 0])
            assert batch.labels is not None
            assert torch.equal(batch.extra["label"], batch.labels)
        assert not torch.equal(batches[0].extra["noise"], batches[1].extra["noise"])
        assert torch.equal(take(source, 1, start_step=4)[0].extra["noise"], batches[3].extra["noise"])


def test_a_method_without_a_collate_of_its_own_costs_nothing(photos: Path) -> None:
    class Plain(Method):
        def training_step(self, inputs: object, *, step: int, total_steps: int) -> object: ...  # type: ignore[override]
        def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor: ...  # type: ignore[empty-body]

    method = Plain.__new__(Plain)
    source = open_photos(photos, 0, method.collate)
    assert source._collate is None
    assert take(source, 1)[0].extra == {}


# -- folders ----------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_whatever_the_number_of_workers(photos: Path) -> None:
    expected = take(open_photos(photos, 0, noisy_collate), 11, batch_size=8)
    assert expected[0].images.shape == (8, 3, 32, 32)
    for workers in (1, 3):
        assert_equal(take(open_photos(photos, workers, noisy_collate), 11, batch_size=8), expected)
    assert_equal(take(open_photos(photos, 2, noisy_collate), 3, batch_size=8, start_step=9), expected[8:])


def test_folder_images_carry_their_own_labels(photos: Path) -> None:
    source = open_photos(photos, crop="none", flip=False)
    index = scan_folder(photos, DataConfig(name="folder", num_held_out=4))
    assert index.train_labels is not None
    means = {}
    for path, label in zip(index.train, index.train_labels, strict=True):
        image = Image.open(photos / path).resize((32, 32), Image.Resampling.BICUBIC)
        means[np.asarray(image).tobytes()] = label
    for batch in take(source, 4, batch_size=9):
        assert batch.labels is not None
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            assert means[(image * 255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()] == label


def test_a_photograph_is_cropped_differently_in_every_epoch(photos: Path) -> None:
    plain = take(open_photos(photos, crop="none", flip=False), 2, batch_size=36)
    auto = take(open_photos(photos), 2, batch_size=36)
    for batches, same in ((plain, True), (auto, False)):
        first, second = (batch.images[batch.images.flatten(1).sum(1).argsort()] for batch in batches)
        assert torch.allclose(first, second) is same


def test_held_out_photographs_are_fixed_and_apart(photos: Path) -> None:
    source = open_photos(photos)
    four = source.held_out(4)
    assert four.shape == (4, 3, 32, 32)
    assert four.dtype == torch.uint8
    assert torch.equal(source.held_out(2), four[:2])
    assert torch.equal(open_photos(photos, interpolation="bilinear").held_out(4), four)
    with pytest.raises(DataError, match=r"raise data\.num_held_out"):
        source.held_out(5)


def flat_folder(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path / f"{number:03d}.png")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_after_the_scan_gives_way_to_the_next(tmp_path: Path, workers: int) -> None:
    path = flat_folder(tmp_path / "flat", 40)
    source = open_photos(path, workers, crop="none", flip=False)
    broken = source._index.train[7]
    (path / broken).write_bytes(b"broken")
    batch = take(source, 1, batch_size=36)[0]
    shown = sorted((batch.images[:, 0, 0, 0] * 255).round().int().tolist())
    expected = [int(name[:3]) for name in source._index.train if name != broken]
    assert shown == sorted([*expected, int(source._index.train[8][:3])])
    assert batch.labels is None
    assert list(source.unreadable) == [broken]
    assert source.describe()["num_unreadable_in_training"] == 1
    take(source, 3, batch_size=36)  # the same file again is not counted again
    assert len(source.unreadable) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_of_breaking_files_end_the_run_in_one_line(tmp_path: Path, workers: int) -> None:
    path = flat_folder(tmp_path / "flat", 40)
    source = open_photos(path, workers)
    for name in source._index.train:
        (path / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"of 36 training images cannot be used \(more than 1 %\)") as raised:
        take(source, 9)
    assert "\n" not in str(raised.value)


def test_the_record_of_a_folder_names_what_was_left_out(tmp_path: Path) -> None:
    path = flat_folder(tmp_path / "flat", 40)
    (path / "broken.png").write_bytes(b"broken")
    facts = open_photos(path).describe()
    assert facts["num_train"] == 36
    assert facts["num_skipped"] == 1
    assert facts["skipped"][0].startswith("broken.png: ")
    assert str(tmp_path) not in str(facts)


def test_closing_stops_the_workers(photos: Path) -> None:
    import multiprocessing

    source = open_photos(photos, 2)
    generator = source.batches(4, 0)
    next(generator)
    assert len(multiprocessing.active_children()) == 2
    source.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(generator)


def test_a_scan_that_was_made_is_not_made_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(name="folder", path=str(photos), num_held_out=4, num_workers=0)
    index = scan_folder(photos, data)
    monkeypatch.setattr(image_files, "decode", None)
    assert open_source(data, 32, PLAIN, CPU, index=index).num_train == 36


def test_a_folder_must_be_named() -> None:
    with pytest.raises(DataError, match="give --data DIR"):
        open_source(DataConfig(name="folder"), 32, PLAIN, CPU)


def test_worker_numbers_stay_within_bounds() -> None:
    assert 1 <= default_num_workers() <= 16


def test_to_batch_converts_bytes_and_keeps_floats() -> None:
    item = BatchItem(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1), None, {"a": torch.ones(2)})
    batch = to_batch(item, CPU)
    torch.testing.assert_close(batch.images.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert batch.labels is None
    assert torch.equal(batch.extra["a"], torch.ones(2))
    floats = torch.rand(1, 3, 2, 2)
    assert torch.equal(to_batch(BatchItem(floats, None, {}), CPU).images, floats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_are_those_of_the_cpu_and_never_wait(photos: Path) -> None:
    gpu = torch.device("cuda", 0)
    data = DataConfig(num_train=40, num_held_out=6)
    on_cpu = take(open_source(data, 32, AugmentationConfig(), CPU), 12)
    source = open_source(data, 32, AugmentationConfig(), gpu)
    generator = source.batches(4, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = [next(generator) for _ in range(12)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.images.device == gpu
        assert (a.images - b.images.cpu()).abs().max() <= 1.01 / 255
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.labels, b.labels.cpu())
    folder = DataConfig(name="folder", path=str(photos), num_held_out=4, num_workers=2)
    photo_batches = take(open_source(folder, 32, AugmentationConfig(), gpu), 3)
    assert all(batch.images.device == gpu for batch in photo_batches)
