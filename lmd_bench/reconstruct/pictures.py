"""Pictures as a method takes them: a user's files, or the held-out images of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmd_bench.data.decode import EXTENSIONS, ImageFileError, center_square, load_rgb
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.source import open_source
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.records import read_run

_ONE_CHANNEL = frozenset(("1", "L", "LA", "La", "I", "F"))


@dataclass(frozen=True)
class Picture:
    """One picture as the method takes it."""

    name: str
    pixels: Tensor
    """(3, S, S) uint8."""
    original_size: tuple[int, int]
    """Width and height of the file, px."""
    file: Path | None = None
    """Where it was read from; None for held-out images of a run."""


def read_pictures(paths: Sequence[Path], image_size: int) -> list[Picture]:
    """Pictures from files and from all image files below folders, resized and cropped as held-out images are.

    Raises DataError for the first that is missing, unreadable or of one channel, before anything else is done.
    """
    files = [file for path in paths for file in _files(path)]
    return [_picture(file, image_size) for file in dict.fromkeys(files)]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in EXTENSIONS)
        if not found:
            raise DataError(f"{path}: no image files in this folder ({', '.join(sorted(EXTENSIONS))})")
        return found
    if not path.is_file():
        raise DataError(f"{path}: no such image file or folder")
    return [path]


def _picture(file: Path, image_size: int) -> Picture:
    _require_colour(file)
    image = load_rgb(file)
    square = center_square(image, image_size, Image.Resampling.BICUBIC)
    return Picture(file.name, torch.from_numpy(np.array(square)).permute(2, 0, 1), image.size, file)


def _require_colour(file: Path) -> None:
    try:
        with Image.open(file) as image:
            mode = image.mode
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageFileError(file, "not a readable image of any known format") from error
    if mode in _ONE_CHANNEL or mode.startswith("I;16"):
        raise DataError(
            f"{file}: has one channel (mode {mode}), the method was trained on three: save it as an RGB image first"
        )


def held_out_pictures(checkpoint: Checkpoint, count: int) -> list[Picture]:
    """The first held-out images of the data that the method was trained on, none of which it has seen.

    Raises BenchError for a folder that no longer holds the images of the run: others would then be held out.
    """
    if checkpoint.config is None:
        raise ConfigError("give at least one image or folder: an authors' checkpoint has no held-out images of its own")
    config = checkpoint.config
    index = None
    if config.data.name == "folder" and config.data.path is not None:
        index = scan_folder(config.data.path, config.data)
        _require_images_of_the_run(checkpoint, index)
    source = open_source(
        config.data.model_copy(
            update={"num_train": config.recipe.batch_size if config.data.name == "scenes" else None}
        ),
        config.image_size,
        config.recipe.augmentation,
        torch.device("cpu"),
        index=index,
    )
    images = source.held_out(min(count, config.evaluation.num_images))
    source.close()
    size = (config.image_size, config.image_size)
    return [Picture(f"held-out-{number}.png", image.cpu(), size) for number, image in enumerate(images)]


def _require_images_of_the_run(checkpoint: Checkpoint, index: FolderIndex) -> None:
    record = checkpoint.path.parent / "record.json"
    if not record.is_file():
        raise ConfigError(
            f"{checkpoint.path}: no record.json beside it says which images of {index.root} the run held out; give at "
            "least one image or folder"
        )
    digest = read_run(record).data.get("digest")
    if digest != index.digest:
        raise DataError(
            f"{index.root}: holds other images (digest {index.digest}) than when the run was trained (digest {digest} "
            f"in {record}), so held-out ones may be among those it saw; give at least one image or folder"
        )
