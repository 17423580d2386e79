"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) by timm, its randomness a pure function of (seed, epoch, image)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FILL = (124, 116, 104)
"""What shears and shifts leave empty: ImageNet's mean colour, as in MAE's fine-tuning."""
_SHIFT_SHARE = 0.45
"""Largest shift as a share of the side, timm's for images of any size."""


class RandAugment:
    """timm's RandAugment with the constants that its `create_transform` gives it in MAE's fine-tuning.

    timm draws from the global generators of `random` and numpy. They are seeded here from an image's key and put back
    afterwards, so what becomes of an image depends neither on workers nor on batches, and nobody else's numbers change.
    """

    def __init__(self, text: str, image_size: int, interpolation: str) -> None:
        """`text` as in `AugmentationConfig.rand_augment`, which has checked it; `interpolation` bicubic or bilinear."""
        from timm.data.auto_augment import rand_augment_transform  # here: it takes seconds to import

        constants = {
            "translate_const": int(_SHIFT_SHARE * image_size),
            "img_mean": _FILL,
            "interpolation": _RESAMPLING[interpolation],
        }
        self._transform = rand_augment_transform(text, constants)

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images (B, 3, S, S) uint8 on the CPU, each changed as its key (B,) int64 says: the same shape, a copy."""
        changed = np.empty((len(images), *images.shape[2:], 3), dtype=np.uint8)
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        with _generators_put_back():
            for number, key in enumerate(keys.tolist()):
                word = key % 2**64
                random.seed(word)
                np.random.seed([word & 0xFFFFFFFF, word >> 32])
                changed[number] = np.asarray(self._transform(Image.fromarray(pixels[number])))
        return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _generators_put_back() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
