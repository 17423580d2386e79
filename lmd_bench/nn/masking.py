"""Which tokens are hidden: random masks for training, given masks for the yardstick. True or 1 means hidden.

A mask is carried as `ids` (B, L), a permutation of the tokens of each sample whose first `num_kept` entries are the
visible ones; the rest are hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import DataError


def random_ids(batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
    """A uniformly random permutation of the tokens for each sample, (B, L) int64 (MAE's per-sample shuffle)."""
    return ids_from_noise(torch.rand(batch_size, num_tokens, device=device))


def ids_from_noise(noise: Tensor) -> Tensor:
    """Permutation that sorts `noise` (B, L) in ascending order: tokens with the least noise stay visible."""
    return noise.argsort(dim=1)


def ids_from_mask(mask: Tensor) -> tuple[Tensor, int]:
    """`ids` and `num_kept` of a given token mask (B, L) bool, both parts in raster order.

    Raises DataError where samples keep different numbers of tokens: go through `groups_of_equal_count` then.
    """
    counts = set((~mask).sum(dim=1).tolist())
    if len(counts) != 1:
        raise DataError(
            f"token masks of one batch keep different numbers of tokens {sorted(counts)}: split the batch by count"
        )
    return mask.to(torch.uint8).argsort(dim=1, stable=True), counts.pop()


def groups_of_equal_count(mask: Tensor) -> Iterator[Tensor]:
    """Indices (n,) of the samples of `mask` (B, L) that keep the same number of tokens, one group after another."""
    counts = (~mask).sum(dim=1)
    for count in counts.unique().tolist():
        yield (counts == count).nonzero().squeeze(1)


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows of `tokens` (B, L, D) chosen by `ids` (B, n), as (B, n, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def pixel_mask(mask: Tensor, image_size: int) -> Tensor:
    """A mask over square units (B, g, g) bool as one over pixels (B, 1, S, S) bool."""
    grid = mask.shape[-1]
    if mask.ndim != 3 or mask.shape[1] != grid or image_size % grid:
        raise DataError(
            f"mask of shape {tuple(mask.shape)} for images of {image_size} px: give (B, g, g) with g dividing the size"
        )
    unit = image_size // grid
    return mask.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).unsqueeze(1)


def token_mask(hidden_pixels: Tensor, token_px: int) -> Tensor:
    """Tokens (B, L) bool that touch at least one hidden pixel of `hidden_pixels` (B, 1, S, S) bool.

    `token_px` is the side of the pixel area that a token stands for; it divides S. Raises DataError where an image
    has no token left to see.
    """
    hidden = F.max_pool2d(hidden_pixels.float(), token_px).flatten(1).bool()
    blind = hidden.all(dim=1).nonzero().flatten().tolist()
    if blind:
        raise DataError(
            f"every token of image {blind[0]} touches a hidden unit: tokens of {token_px} px need larger mask units"
        )
    return hidden


def fill_with_visible_mean(images: Tensor, hidden_pixels: Tensor) -> Tensor:
    """Images (B, C, S, S) whose hidden pixels hold the mean colour of that image's visible ones.

    No value of a hidden pixel, not even NaN, reaches the result.
    """
    visible = images.masked_fill(hidden_pixels, 0.0)
    count = (~hidden_pixels).sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(hidden_pixels, visible.sum(dim=(2, 3), keepdim=True) / count, visible)
