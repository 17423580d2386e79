"""Pictures that a cell leaves for the report: the same held-out images as every row fills them, and samples."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lmd_bench.errors import TrainingError
from lmd_bench.harness.seeding import reseed
from lmd_bench.method import Method
from lmd_bench.metrics.image import to_uint8
from lmd_bench.reconstruct.output import all_or_nothing

_MOST_COLUMNS = 8


def save_pictures(folder: Path, tiles: dict[str, Tensor]) -> None:
    """Write NAME.png for each entry of uint8 tiles (n, 3, S, S), all files or none.

    `samples` stand in rows of at most eight, white where the last one ends early; everything else is one strip of n
    tiles. Tiles touch: a tile's place in the file is a multiple of S.
    """
    with all_or_nothing(folder) as partial:
        for name, images in tiles.items():
            columns = min(_MOST_COLUMNS, len(images)) if name == "samples" else len(images)
            Image.fromarray(_grid(images, columns).permute(1, 2, 0).numpy()).save(partial / f"{name}.png")


def _grid(images: Tensor, columns: int) -> Tensor:
    """(3, H, W) uint8 of tiles (n, 3, S, S)."""
    count, channels, side, _ = images.shape
    rows = -(-count // columns)
    blank = images.new_full((rows * columns - count, channels, side, side), 255)
    placed = torch.cat([images, blank]).view(rows, columns, channels, side, side)
    return placed.permute(2, 0, 3, 1, 4).reshape(channels, rows * side, columns * side)


def generates(method: Method) -> bool:
    """Whether the method makes images from nothing."""
    return type(method).sample is not Method.sample


@torch.no_grad()
def sample_tiles(method: Method, num_images: int, batch_size: int, seed: int, device: torch.device) -> Tensor:
    """Images that the method generates, (num_images, 3, S, S) uint8 on the CPU; the same for the same seed.

    Raises TrainingError for images that are misshapen or not finite.
    """
    size, made = method.data.image_size, []
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        reseed(device, seed, "report samples", start)
        images = method.sample(count)
        if images.shape != (count, 3, size, size) or not bool(torch.isfinite(images).all()):
            raise TrainingError("generated images are misshapen or not finite")
        made.append(to_uint8(images.float().clamp(0.0, 1.0)).cpu())
    return torch.cat(made)
