"""Labelled images in a fixed order, without augmentation: accuracy is measured on them, and probes are fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor


class LabelledImages(ABC):
    """Images of one size with a label each, read in batches, always in the same order."""

    num_images: int
    """How many there are; a folder's files that turn out unusable while they are read are left out of the batches."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (B, 3, S, S) uint8, labels (B,) int64), both on the training device; the last batch may be smaller.

        Raises DataError where too many files cannot be read.
        """


class LabelledTensors(LabelledImages):
    """Images that lie in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """`images` (N, 3, S, S) uint8 and `labels` (N,) int64 on the training device."""
        self.num_images = len(images)
        self._images, self._labels = images, labels

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self._images.split(batch_size), self._labels.split(batch_size), strict=True)
