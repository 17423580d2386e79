"""Images and latent maps as sequences of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut maps into patches, in raster order.

    `images` (B, C, H, W) with H and W divisible by `patch_size` p; returns (B, L, p * p * C), L = H/p * W/p. Within
    a patch the order is row, column, channel, channel fastest (MAE's order of target values).
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """The inverse of `patchify` for square maps: (B, g * g, p * p * C) to (B, C, g * p, g * p)."""
    batch, length, _ = patches.shape
    grid = round(length**0.5)
    cut = patches.reshape(batch, grid, grid, patch_size, patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * patch_size, grid * patch_size)


def normalised(patches: Tensor) -> Tensor:
    """Patches (..., P), each to mean 0 and unbiased variance 1 over its values, eps 1e-6 (MAE's norm_pix_loss)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
