"""The images that are measured: those that rows hold out, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.captioned import csv_folder

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.source import open_source
from lmd_bench.errors import DataError
from lmd_bench.evaluation.held_out import open_held_out, pixel_digest

CPU = torch.device("cpu")


def test_scenes_are_those_that_rows_hold_out_with_their_captions() -> None:
    data = DataConfig(num_train=20, num_held_out=8, image_size=32)
    source = open_source(data, 32, AugmentationConfig(), CPU)
    found = open_held_out(data, 32, 6)
    assert torch.equal(found.images, source.held_out(6))
    assert found.captions is not None
    assert len(set(found.captions)) > 1
    assert found.digest == pixel_digest(found.images)
    assert found.digest != open_held_out(data, 32, 7).digest


def test_a_folders_held_out_images_come_with_the_captions_of_its_file(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "images", 24)
    data = DataConfig(name="folder", path=str(folder), num_held_out=5, image_size=32)
    index = scan_folder(folder, data)
    found = open_held_out(data, 32, 5, index)
    source = open_source(data, 32, AugmentationConfig(), CPU, index=index)
    assert torch.equal(found.images, source.held_out(5))
    assert found.captions is not None
    assert all(caption for caption in found.captions)
    digest = found.captions_digest
    assert digest == open_held_out(data, 32, 5).captions_digest
    assert digest != open_held_out(data, 32, 4).captions_digest
    (folder / "captions.csv").unlink()
    assert open_held_out(data, 32, 5).captions_digest is None
    with pytest.raises(DataError, match="6 held-out images are asked for, 5 are held out"):
        open_held_out(data, 32, 6, index)
