"""What a projector is trained on, and what it never sees."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lmd_bench.config import DataConfig
from lmd_bench.data import source
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import DataError
from lmd_bench.projector import train_data
from lmd_bench.projector.train_config import LSPTrainOptions
from lmd_bench.projector.train_data import HELD_OUT_START, TrainData, patch_pca_psnr

CPU = torch.device("cpu")
TINY = {"batch_size": 4, "image_size": 32, "crop_size": 16, "num_images": 16, "num_held_out": 8, "disc_weight": 0.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images, each of one grey of its own."""
    (tmp_path / "greys").mkdir()
    for index in range(40):
        Image.new("RGB", (48, 40), (5 * index, 5 * index, 5 * index)).save(tmp_path / "greys" / f"{index:02d}.png")
    return tmp_path / "greys"


def greys(images: torch.Tensor) -> set[int]:
    return {round(float(image.float().mean())) for image in images}


def test_batches_are_crops_in_minus_one_to_one_that_depend_on_the_step_alone() -> None:
    data = TrainData(LSPTrainOptions(**TINY), CPU)  # type: ignore[arg-type]
    first = list(itertools.islice(data.batches(0), 6))
    assert {batch.shape for batch in first} == {(4, 3, 16, 16)}
    assert all(batch.min() >= -1 and batch.max() <= 1 and batch.min() < -0.2 for batch in first)
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in first)
    for one, other in zip(first[3:], data.batches(3), strict=False):
        assert torch.equal(one, other)
    assert not torch.equal(first[0], first[4])


def test_uncropped_unturned_batches_are_the_scenes_once_each() -> None:
    options = LSPTrainOptions(**{**TINY, "crop_size": 32, "turn": False})  # type: ignore[arg-type]
    batches = torch.cat(list(itertools.islice(TrainData(options, CPU).batches(0), 4)))
    scenes = Scenes(0, 32).render(range(16)).float() / 127.5 - 1.0
    both = torch.cat((scenes, scenes.flip(3))).flatten(1)
    nearest = torch.cdist(batches.flatten(1), both).argmin(1) % 16
    assert sorted(nearest.tolist()) == list(range(16))


def test_held_out_scenes_start_at_two_to_the_forty() -> None:
    data = TrainData(LSPTrainOptions(**TINY), CPU)  # type: ignore[arg-type]
    assert torch.equal(data.held_out, Scenes(0, 32).render(torch.arange(8) + HELD_OUT_START))
    assert "scenes of 32 px" in data.described
    assert "2^40" in data.described_held_out


def test_the_sample_holds_whole_training_images() -> None:
    data = TrainData(LSPTrainOptions(**TINY), CPU)  # type: ignore[arg-type]
    sample = data.sample(100)
    assert sample.shape == (16, 3, 32, 32)
    assert 0 <= sample.min() < sample.max() <= 1
    assert torch.equal(data.sample(6), sample[:6])


def test_a_folders_held_out_images_are_never_trained_on(folder: Path) -> None:
    data = TrainData(LSPTrainOptions(**{**TINY, "data": str(folder)}), CPU)  # type: ignore[arg-type]
    try:
        assert data.held_out.shape == (8, 3, 32, 32)
        seen: set[int] = set()
        for batch in itertools.islice(data.batches(0), 16):
            seen |= greys((batch + 1.0) * 127.5)
        assert len(seen) == 32
        assert not seen & greys(data.held_out)
        assert greys(data.sample(64) * 255.0) == seen
    finally:
        data.close()
    assert str(folder) in data.described


def test_a_small_folder_gives_up_a_quarter_at_most(folder: Path) -> None:
    data = TrainData(LSPTrainOptions(**{**TINY, "data": str(folder), "num_held_out": 256}), CPU)  # type: ignore[arg-type]
    assert len(data.held_out) == 10


def test_held_out_images_hang_on_the_data_seed_and_their_order_not_on_seed_or_number(folder: Path) -> None:
    def held_out(**values: Any) -> list[int]:
        data = TrainData(LSPTrainOptions(**{**TINY, "data": str(folder), **values}), CPU)
        data.close()
        return [round(float(image.float().mean())) for image in data.held_out]

    usual = held_out()
    assert held_out(seed=5) == usual
    assert held_out(num_held_out=3) == usual[:3]
    assert held_out(data_seed=1) != usual
    data = DataConfig(name="folder", path=str(folder), num_held_out=8)
    assert [5 * int(name[:2]) for name in scan_folder(folder, data).held_out] == usual  # a run's own choice


def test_scenes_are_of_the_data_seed() -> None:
    data = TrainData(LSPTrainOptions(**{**TINY, "data_seed": 4, "seed": 9}), CPU)  # type: ignore[arg-type]
    assert torch.equal(data.held_out, Scenes(4, 32).render(torch.arange(8) + HELD_OUT_START))
    assert "seed 4" in data.described
    assert data.split.data_seed == 4


def test_errors_name_the_commands_own_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"^lsp train: .* do not fill one batch of 99; use more images or lower --batch"
    ):
        TrainData(LSPTrainOptions(**{**TINY, "data": str(folder), "batch_size": 99}), CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(source, "_MEMORY_SHARE", 0.0)
    with pytest.raises(DataError, match=r"^lsp train: --num-images: 24 scenes of 32 px take"):
        TrainData(LSPTrainOptions(**TINY), CPU)  # type: ignore[arg-type]


def test_a_sample_is_bounded_in_bytes_and_whole_at_64_px(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_data._SAMPLE_BYTES >= 4096 * 3 * 64 * 64 * 4
    data = TrainData(LSPTrainOptions(**TINY), CPU)  # type: ignore[arg-type]
    whole = data.sample(16)
    monkeypatch.setattr(train_data, "_SAMPLE_BYTES", 5 * 3 * 32 * 32 * 4)
    assert torch.equal(data.sample(16), data.sample(5))
    assert len(data.sample(16)) == 5 < len(whole)


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no such folder"):
        TrainData(LSPTrainOptions(data="/nowhere/at/all"), CPU)


def test_patch_pca_with_all_components_is_exact_and_with_fewer_is_worse() -> None:
    scenes = Scenes(0, 32).render(range(200))
    train, held_out = scenes[:150], scenes[150:]
    few, many = (patch_pca_psnr(train, held_out, patch_size=4, num_components=n) for n in (2, 12))
    assert few + 3 < many
    assert patch_pca_psnr(train, held_out, patch_size=4, num_components=48) > 80
    as_floats = patch_pca_psnr(train / 255.0, held_out / 255.0, patch_size=4, num_components=2)
    assert as_floats == pytest.approx(few, abs=1e-3)
