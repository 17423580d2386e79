"""Pictures for the report: their sizes, where tiles lie, and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.methods import Tiny, TinyConfig
from PIL import Image
from torch import Tensor

from lmd_bench.errors import TrainingError
from lmd_bench.evaluation.pictures import generates, sample_tiles, save_pictures
from lmd_bench.method import DataSpec

CPU = torch.device("cpu")


class Generating(Tiny):
    """Makes noise."""

    def sample(self, num_images: int) -> Tensor:
        return torch.rand(num_images, 3, 16, 16)


class Misshapen(Tiny):
    """Makes images of another size."""

    def sample(self, num_images: int) -> Tensor:
        return torch.rand(num_images, 3, 8, 8)


def tiles(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)


def test_strips_are_tiles_beside_each_other_without_gaps(tmp_path: Path) -> None:
    strip = tiles(11)
    save_pictures(tmp_path / "pictures", {"filled": strip})
    with Image.open(tmp_path / "pictures" / "filled.png") as image:
        assert image.size == (11 * 16, 16)
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(found[:, :, 10 * 16 :], strip[10])


def test_samples_stand_in_rows_of_eight_and_the_rest_is_white(tmp_path: Path) -> None:
    made = tiles(10)
    save_pictures(tmp_path, {"samples": made})
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (8 * 16, 2 * 16)
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(found[:, 16:, 16:32], made[9])
    assert bool((found[:, 16:, 32:] == 255).all())


def test_samples_are_the_same_for_the_same_seed_and_come_from_methods_that_generate() -> None:
    spec = DataSpec(16)
    method = Generating(TinyConfig(), spec)
    assert generates(method)
    assert not generates(Tiny(TinyConfig(), spec))
    first = sample_tiles(method, 5, 2, 0, CPU)
    assert first.shape == (5, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(sample_tiles(method, 5, 2, 0, CPU), first)
    assert not torch.equal(sample_tiles(method, 5, 2, 1, CPU), first)
    with pytest.raises(TrainingError, match="generated images are misshapen"):
        sample_tiles(Misshapen(TinyConfig(), spec), 2, 2, 0, CPU)
