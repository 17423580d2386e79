"""Fills the hidden parts of images with a method, a chunk at a time, the same for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data.yardstick import hide, paste
from lmd_bench.errors import TrainingError
from lmd_bench.harness.loop import autocast
from lmd_bench.harness.seeding import reseed
from lmd_bench.method import Method
from lmd_bench.metrics.image import to_uint8
from lmd_bench.nn.masking import pixel_mask

MID_GREY = 128
"""Mid-grey, 127.5, rounded as every image is."""


@dataclass(frozen=True)
class Chunk:
    """Some images of a set, with their masks."""

    start: int
    """Place of the first one in the set."""
    images: Tensor
    """(B, 3, S, S) uint8."""
    mask: Tensor
    """(B, g, g) bool, True = hidden."""
    captions: tuple[str, ...] | None


def chunks(images: Tensor, masks: Tensor, captions: Sequence[str] | None, size: int) -> list[Chunk]:
    """Images (N, 3, S, S), masks (N, g, g) and captions, `size` at a time; views, nothing is copied."""
    starts = range(0, len(images), size)
    return [
        Chunk(
            start,
            images[start : start + size],
            masks[start : start + size],
            None if captions is None else tuple(captions[start : start + size]),
        )
        for start in starts
    ]


@torch.no_grad()
def fill(method: Method, chunk: Chunk, seed: int, device: torch.device, precision: str = "fp32") -> Tensor:
    """The chunk's images with their hidden part filled by the method, (B, 3, S, S) uint8 on the CPU.

    The method sees hidden pixels as zeros, and the captions where there are any. Visible pixels are pasted back and
    come out as they went in. Draws depend on `seed` and the chunk's place alone. precision: fp32, or bf16 for autocast
    around the method. Raises TrainingError for a result that is misshapen or not finite, DataError for one outside
    [0, 1].
    """
    images = chunk.images.to(device).float() / 255
    mask = chunk.mask.to(device)
    reseed(device, seed, "image quality", chunk.start)
    hidden = hide(images, mask)
    with autocast(device, precision):
        if chunk.captions is None:
            filled = method.reconstruct(hidden, mask)
        else:
            filled = method.reconstruct_captioned(hidden, mask, chunk.captions)
    if filled.shape != images.shape or not bool(torch.isfinite(filled).all()):
        raise TrainingError("the filled images are misshapen or not finite")
    return to_uint8(paste(filled.float(), images, mask)).cpu()


def grey_filled(chunk: Chunk) -> Tensor:
    """The chunk's images (B, 3, S, S) uint8 with mid-grey in place of hidden pixels."""
    return chunk.images.masked_fill(pixel_mask(chunk.mask, chunk.images.shape[-1]), MID_GREY)
