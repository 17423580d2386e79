"""The held-out images of a suite as image quality measures them: on the host, with captions and a digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.captions import captions_digest
from lmd_bench.data.folders import FolderIndex
from lmd_bench.data.source import open_source


@dataclass(frozen=True)
class HeldOut:
    """Images that no row was trained on, the same for every row of this size."""

    images: Tensor
    """(N, 3, S, S) uint8 on the CPU."""
    captions: tuple[str, ...] | None
    """One for each image; None where the data has none."""
    digest: str
    """`pixel_digest` of the images."""

    @property
    def captions_digest(self) -> str | None:
        """Digest of the captions; None where the data has none."""
        return None if self.captions is None else captions_digest(self.captions)


def open_held_out(data: DataConfig, image_size: int, num_images: int, index: FolderIndex | None = None) -> HeldOut:
    """The first `num_images` held-out images of `data` at `image_size` px.

    They are made or read apart from any row's source, on the CPU: the same on every device, and no memory of a GPU is
    taken from the rows that train on it. A folder is scanned unless its `index` is given. Raises DataError for fewer
    held-out images than asked for.
    """
    if data.name == "scenes":  # those of training are not needed, and a held-out scene does not depend on the others
        data = data.model_copy(update={"num_train": 1, "num_held_out": num_images})
    source = open_source(data, image_size, AugmentationConfig(), torch.device("cpu"), index=index)
    try:
        images = source.held_out(num_images)
        captions = source.held_out_captions(num_images)
    finally:
        source.close()
    return HeldOut(images, None if captions is None else tuple(captions), pixel_digest(images))


def pixel_digest(images: Tensor) -> str:
    """SHA-256 over the pixels of uint8 images (N, 3, H, W) in order, 16 hex digits."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]
