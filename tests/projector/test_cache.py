"""Latent caches: what is in them, in which order it is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photos import make_photo_folder
from PIL import Image
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.augment import epoch_order
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.source import BatchSource, open_source
from lmd_bench.errors import BenchError, ConfigError, DataError, WeightsError
from lmd_bench.harness.encode import EncodeOptions, encode_data
from lmd_bench.method import Method
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.cache import cache_contents, check_cache, open_cache, plan_cache, read_meta
from lmd_bench.projector.cache_source import CachedSource
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.projector.open import open_projector
from tests.projector.test_projector import tiny_autoencoder

CPU = torch.device("cpu")
SCENES = DataConfig(image_size=32, num_train=13, num_held_out=4)
FLIPS = AugmentationConfig()
STILL = AugmentationConfig(flip=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny-f4"
    tiny_autoencoder().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "other-f4"
    tiny_autoencoder(seed=1).save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def projector(weights: Path) -> LatentProjector:
    return open_projector(ProjectorConfig(kind="kl", path=str(weights)))


def encode(weights: Path, out: Path, **changes: Any) -> Path:
    """A cache of the small scenes, or of what `changes` say."""
    values = {"projector": str(weights), "data": SCENES.model_dump(), "views": 3, "batch_size": 4, **changes}
    encode_data(EncodeOptions.parse(values, "lsp encode"), out, device="cpu", command="the command")
    return out


@pytest.fixture(scope="module")
def cache(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(weights, tmp_path_factory.mktemp("caches") / "scenes")


def images_of(data: DataConfig, augmentation: AugmentationConfig = FLIPS) -> BatchSource:
    return open_source(data, data.image_size, augmentation, CPU)


def wanted(weights: Path, data: DataConfig = SCENES, augmentation: AugmentationConfig = FLIPS, **projector: Any) -> Any:
    config = ProjectorConfig.model_validate({"kind": "kl", "path": str(weights), **projector})
    return cache_contents(config, data, augmentation, data.image_size, None)


def read(source: BatchSource, num_steps: int, seed: int = 0, start_step: int = 1) -> list[Tensor]:
    return [batch.prepared for batch in islice(source.batches(4, seed, start_step), num_steps)]  # type: ignore[misc]


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_a_cache_holds_every_view_of_every_image_the_last_incomplete_batch_included(
    cache: Path, projector: LatentProjector
) -> None:
    meta, latents, labels = open_cache(cache)
    assert latents.shape == (3, 13, 5, 8, 8)
    assert latents.dtype == np.float32
    source = images_of(SCENES)
    for view in range(3):
        order = epoch_order(0, view, 13)
        for position, batch in enumerate(islice(source.batches(1, 0, view * 13 + 1), 13)):
            expected = projector.encode(batch.images)[0].numpy()
            np.testing.assert_allclose(latents[view, order[position]], expected, rtol=1e-4, atol=1e-5)
            assert labels is not None
            assert batch.labels is not None
            assert labels[order[position]] == int(batch.labels)
    assert not np.allclose(latents[0], latents[1])
    assert meta.num_bytes == latents.nbytes
    assert (meta.command, meta.views, meta.has_labels) == ("the command", 3, True)
    assert meta.seconds > 0
    assert sorted(file.name for file in cache.iterdir()) == ["labels.npy", "latents.npy", "meta.json"]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_half_precision_halves_the_file_and_rounds_the_latents(weights: Path, cache: Path, tmp_path: Path) -> None:
    half = encode(weights, tmp_path / "half", dtype="float16")
    _, exact, _ = open_cache(cache)
    meta, rounded, _ = open_cache(half)
    assert meta.num_bytes * 2 == exact.nbytes
    np.testing.assert_allclose(rounded.astype(np.float32), exact, rtol=1e-3, atol=1e-4)
    assert read(CachedSource(half, images_of(SCENES), CPU), 1)[0].dtype == torch.float32


def test_photographs_are_cropped_flipped_and_labelled_as_in_training(
    weights: Path, projector: LatentProjector, tmp_path: Path
) -> None:
    make_photo_folder(tmp_path / "photos", size=40, crops=3)
    data = DataConfig(name="folder", path=str(tmp_path / "photos"), image_size=32, num_held_out=2, num_workers=0)
    folder = encode(weights, tmp_path / "cache", data=data.model_dump(), views=2, batch_size=4)
    source = images_of(data)
    cached = CachedSource(folder, source, CPU)
    for plain, latent in zip(islice(source.batches(4, 0), 4), islice(cached.batches(4, 0), 4), strict=True):
        assert latent.prepared is not None
        torch.testing.assert_close(latent.prepared, projector.encode(plain.images), rtol=1e-4, atol=1e-5)
        assert torch.equal(latent.labels, plain.labels)  # type: ignore[arg-type]
    assert torch.equal(cached.held_out(2), source.held_out(2))
    assert cached.describe()["digest"] == scan_folder(str(data.path), data).digest


# -- the order in which it is read ------------------------------------------------------------------------------------


def test_latents_come_in_the_order_of_the_images_and_the_first_epochs_are_equal_bit_for_bit(
    cache: Path, projector: LatentProjector
) -> None:
    """Epochs of 3 batches, 3 views: what 9 steps see is what they would see without a cache, flips included."""
    source = images_of(SCENES)
    cached = read(CachedSource(cache, source, CPU), 9)
    plain = [projector.encode(batch.images) for batch in islice(source.batches(4, 0), 9)]
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_without_augmentation_one_view_equals_every_epoch_bit_for_bit(
    weights: Path, projector: LatentProjector, tmp_path: Path
) -> None:
    data = SCENES.model_copy(update={"num_train": 12})
    folder = encode(weights, tmp_path / "still", views=1, data=data.model_dump(), augmentation=STILL.model_dump())
    source = images_of(data, STILL)
    cached = read(CachedSource(folder, source, CPU), 12, seed=7)
    plain = [projector.encode(batch.images) for batch in islice(source.batches(4, 7), 12)]
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_epochs_take_views_in_turn_and_any_step_can_be_the_first(cache: Path) -> None:
    _, latents, _ = open_cache(cache)
    source = CachedSource(cache, images_of(SCENES), CPU)
    steps = read(source, 15, seed=5)
    for step, seen in enumerate(steps):
        epoch, number = divmod(step, 3)
        rows = epoch_order(5, epoch, 13)[4 * number : 4 * number + 4]
        assert torch.equal(seen, torch.from_numpy(latents[epoch % 3, rows.numpy()]))
    assert torch.equal(read(source, 1, seed=5, start_step=8)[0], steps[7])


def test_batches_bring_no_images_and_held_out_images_are_the_real_ones(cache: Path) -> None:
    images = images_of(SCENES)
    source = CachedSource(cache, images, CPU)
    batch = next(source.batches(4, 0))
    assert batch.images.numel() == 0
    assert torch.equal(source.held_out(4), images.held_out(4))
    facts = source.describe()
    assert facts["num_train"] == 13
    assert facts["latent_cache"]["views"] == 3
    assert facts["latent_cache"]["seconds"] > 0
    json.dumps(facts)


def test_a_batch_larger_than_the_cache_is_refused(cache: Path) -> None:
    with pytest.raises(DataError, match="13 training images do not fill one batch of 14"):
        CachedSource(cache, images_of(SCENES), CPU).batches(14, 0)


def test_a_method_that_collates_images_cannot_read_latents(cache: Path) -> None:
    class Collating:
        def collate(self, samples: Any, generator: Any) -> dict[str, Tensor]:
            return {}

    source = CachedSource(cache, images_of(SCENES), CPU)
    with pytest.raises(ConfigError, match="leave out cache"):
        source.with_collate(Collating().collate)

    class Plain(Collating):
        collate = Method.collate  # type: ignore[assignment]

    assert source.with_collate(Plain().collate) is source


# -- what is refused --------------------------------------------------------------------------------------------------


def test_the_right_cache_passes_and_other_weights_are_refused_with_both_hashes(
    cache: Path, weights: Path, other_weights: Path
) -> None:
    right, other = wanted(weights), wanted(other_weights)
    assert check_cache(cache, right).views == 3
    with pytest.raises(DataError) as refused:
        check_cache(cache, other)
    for text in ("tiny-f4", right.projector_digest, "other-f4", other.projector_digest, "lsp encode"):
        assert text in str(refused.value)
    assert right.projector_digest != other.projector_digest
    assert "data" not in str(refused.value)


def test_other_data_is_refused_with_both_hashes(cache: Path, weights: Path) -> None:
    more = DataConfig(image_size=32, num_train=14)
    with pytest.raises(DataError) as refused:
        check_cache(cache, wanted(weights, more))
    for contents in (wanted(weights), wanted(weights, more)):
        assert f"scenes ({contents.data_digest})" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 2.0}, "projector.scale 1.0, wanted 2.0"),
        ({"precision": "bf16"}, "projector.precision fp32, wanted bf16"),
        ({"data": DataConfig(image_size=16, num_train=13)}, "image_size 32, wanted 16"),
        ({"augmentation": STILL}, "augmentation crop=none flip=True"),
    ],
)
def test_other_settings_are_named(cache: Path, weights: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_cache(cache, wanted(weights, **changes))


def test_values_without_effect_make_no_difference(weights: Path) -> None:
    """Scenes are not cropped: neither the crop's range nor its filter changes a pixel."""
    assert wanted(weights) == wanted(
        weights, augmentation=AugmentationConfig(scale=(0.5, 1.0), interpolation="bilinear")
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "meta.json").write_text('{"format": 9}'), "of format 9, this version reads 2"),
        (lambda folder: (folder / "meta.json").write_text('{"format": 2}'), "contents: Field required"),
        (lambda folder: _truncate(folder / "latents.npy"), "latents.npy: cannot be read"),
        (lambda folder: (folder / "latents.npy").unlink(), "latents.npy: cannot be read"),
        (lambda folder: (folder / "labels.npy").unlink(), "labels.npy: cannot be read"),
        (lambda folder: np.save(folder / "latents.npy", np.zeros((1, 2))), r"float64 \[1, 2\]"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_cache_is_refused(cache: Path, weights: Path, tmp_path: Path, damage: Any, says: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(cache, folder)
    damage(folder)
    with pytest.raises(DataError, match=says):
        check_cache(folder, wanted(weights))


def _truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"views": 0}, ConfigError, "lsp encode: views: .*greater than or equal to 1, got 0"),
        ({"data": {"num_train": 8, "image_size": 30}}, WeightsError, "image_size 30 is not divisible by its factor 4"),
        ({"dtype": "int8"}, ConfigError, "lsp encode: dtype"),
        ({"projector": "nowhere"}, WeightsError, "nowhere: no such folder"),
        ({"data": {"name": "folder", "path": "nowhere"}}, DataError, "nowhere: no such folder"),
    ],
)
def test_bad_options_leave_nothing_behind(
    weights: Path, tmp_path: Path, changes: dict[str, Any], error: type[BenchError], says: str
) -> None:
    with pytest.raises(error, match=says):
        encode(weights, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(weights: Path, cache: Path) -> None:
    before = read_meta(cache)
    with pytest.raises(ConfigError, match="there is something already"):
        encode(weights, cache)
    assert read_meta(cache) == before


def grey_folder(path: Path, first: int) -> DataConfig:
    """Eight uncompressed images under the same names and of the same sizes, whatever their grey."""
    path.mkdir()
    for number in range(8):
        Image.new("RGB", (72, 72), (first + number,) * 3).save(path / f"{number}.bmp")
    return DataConfig(name="folder", path=str(path), image_size=32, num_held_out=1, num_workers=0)


def test_other_pictures_under_the_same_names_are_refused_and_auto_makes_another_cache(
    weights: Path, tmp_path: Path
) -> None:
    data = grey_folder(tmp_path / "images", 10)
    config = ProjectorConfig.model_validate({"kind": "kl", "path": str(weights), "cache": "auto"})
    first = scan_folder(str(data.path), data)
    folder = encode(weights, tmp_path / "cache", data=data.model_dump(), views=1)
    own = config.model_copy(update={"cache": str(folder)})
    plan_cache(own, data, FLIPS, 32, first, tmp_path)
    before = plan_cache(config, data, FLIPS, 32, first, tmp_path).folder
    shutil.rmtree(tmp_path / "images")
    grey_folder(tmp_path / "images", 90)
    second = scan_folder(str(data.path), data)
    assert second.digest == first.digest  # names alone
    with pytest.raises(DataError, match=rf"data .*images \({first.content_digest}\), wanted .*{second.content_digest}"):
        plan_cache(own, data, FLIPS, 32, second, tmp_path)
    assert plan_cache(config, data, FLIPS, 32, second, tmp_path).folder != before


@pytest.mark.parametrize("place", [0, 35, 69])
def test_large_files_are_told_apart_by_their_ends_and_their_middle(place: int, tmp_path: Path) -> None:
    data = grey_folder(tmp_path / "images", 10)
    index = scan_folder(str(data.path), data)
    before = index.content_digest
    file = tmp_path / "images" / index.train[3]
    assert file.stat().st_size > 15_000
    with Image.open(file) as picture:
        picture.load()
        picture.putpixel((30, place), (1, 2, 3))
        picture.save(file)
    assert scan_folder(str(data.path), data).content_digest != before


def test_a_scene_generator_that_draws_otherwise_makes_another_cache(
    cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Scenes.render

    def one_pixel_moved(self: Scenes, *arguments: Any) -> Tensor:
        images = render(self, *arguments)
        images[0, 0, 3, 3] ^= 1
        return images

    assert check_cache(cache, wanted(weights)).views == 3
    monkeypatch.setattr(Scenes, "render", one_pixel_moved)
    with pytest.raises(DataError, match=r"data scenes \(.*\), wanted scenes"):
        check_cache(cache, wanted(weights))


def test_a_cache_must_have_a_name_to_take(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", ".."):
        with pytest.raises(ConfigError, match="give one that is not there yet"):
            encode(weights, Path(out))
    assert list(tmp_path.iterdir()) == []


def test_images_that_were_left_out_are_told(weights: Path, tmp_path: Path) -> None:
    data = grey_folder(tmp_path / "images", 10)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    lines: list[str] = []
    options = EncodeOptions.parse({"projector": str(weights), "data": data.model_dump(), "views": 1}, "lsp encode")
    encode_data(options, tmp_path / "cache", device="cpu", command="c", log=lines.append)
    assert len(lines) == 1
    assert "left out 1 of 9 images" in lines[0]
    assert "broken.png" in lines[0]


def test_pixels_have_no_latents_to_cache() -> None:
    with pytest.raises(ConfigError, match="no latents to cache"):
        cache_contents(ProjectorConfig(kind="pixels"), SCENES, FLIPS, 32, None)


def test_too_little_disk_is_found_before_anything_is_made(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 1000))
    with pytest.raises(ConfigError, match="0 MiB free"):
        encode(weights, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_encoding_leaves_nothing_that_passes_for_a_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(self: LatentProjector, images: Tensor) -> Tensor:
        seen.append([path.name for path in tmp_path.iterdir()])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return torch.zeros(len(images), 5, 8, 8)

    monkeypatch.setattr(LatentProjector, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(weights, tmp_path / "out")
    assert all("out" not in names and len(names) == 1 for names in seen)
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_are_not_kept(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentProjector, "encode", lambda _, images: torch.full((len(images), 5, 8, 8), 1e6))
    with pytest.raises(DataError, match="not finite as float16"):
        encode(weights, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


# -- auto -------------------------------------------------------------------------------------------------------------


def test_auto_is_named_by_what_decides_its_contents_and_needs_one_view_where_views_are_equal(
    weights: Path, other_weights: Path, tmp_path: Path
) -> None:
    def need(path: Path, augmentation: AugmentationConfig = FLIPS, **options: Any) -> Any:
        config = ProjectorConfig.model_validate({"kind": "kl", "path": str(path), "cache": "auto", **options})
        return plan_cache(config, SCENES, augmentation, 32, None, tmp_path)

    first = need(weights)
    assert first.folder.parent == tmp_path / "latents"
    assert (first.views, first.num_bytes) == (4, 4 * 13 * 5 * 8 * 8 * 4)
    assert need(weights, STILL).views == 1
    folders = [first, need(other_weights), need(weights, STILL), need(weights, cache_views=2), need(weights, scale=0.5)]
    assert len({one.folder for one in folders}) == 5
    moved = tmp_path / "moved"
    shutil.copytree(weights, moved)
    assert need(moved).folder == first.folder
