"""The common yardstick's masks: the same hidden units of the same held-out images for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from lmd_bench.data._scene_random import scene_keys, uniform
from lmd_bench.data._seeds import derive_seed
from lmd_bench.errors import ConfigError


def yardstick_masks(num_images: int, image_size: int, unit_px: int, keep: float, seed: int = 0) -> Tensor:
    """Which units of each image are hidden: bool (num_images, g, g) on CPU, True = hidden, g = image_size / unit_px.

    Of n = g^2 units int(keep * n) stay visible. The mask of image i depends on (seed, i, n) alone, and its draws come
    from counters: it is the same for every method, number of images, machine and torch version. Raises ConfigError
    where units do not tile the image, or none would be visible or hidden.
    """
    if image_size % unit_px:
        raise ConfigError(
            f"evaluation.unit_px: units of {unit_px} px do not tile images of {image_size} px; "
            f"use a divisor of {image_size}"
        )
    side = image_size // unit_px
    num_units = side * side
    num_visible = int(keep * num_units)
    if not 0 < num_visible < num_units:
        raise ConfigError(
            f"evaluation: keep {keep} of {num_units} units of {unit_px} px leaves {num_visible} visible; "
            "at least one must be visible and one hidden: use a smaller unit_px or another keep"
        )
    keys = scene_keys(derive_seed("yardstick", seed, num_units), torch.arange(num_images))
    order = uniform(keys, 0, num_units).argsort(dim=1, stable=True)
    hidden = torch.ones(num_images, num_units, dtype=torch.bool)
    hidden.scatter_(1, order[:, :num_visible], False)
    return hidden.view(num_images, side, side)


def mask_to_pixels(mask: Tensor, image_size: int) -> Tensor:
    """Units as pixels: bool (B, g, g) -> bool (B, 1, image_size, image_size)."""
    if image_size % mask.shape[-1]:
        raise ConfigError(f"a mask of {mask.shape[-1]} units a side does not tile images of {image_size} px")
    unit = image_size // mask.shape[-1]
    return mask.repeat_interleave(unit, dim=-2).repeat_interleave(unit, dim=-1).unsqueeze(1)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, S, S) with hidden pixels set to 0, whatever they held."""
    return images.masked_fill(mask_to_pixels(mask, images.shape[-1]), 0.0)


def paste(filled: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """The composite (B, 3, S, S): `filled` where hidden, `images` where visible."""
    return torch.where(mask_to_pixels(mask, images.shape[-1]), filled, images)


def fill_mean_visible(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, S, S) with hidden pixels set to the mean colour of the image's visible ones.

    Hidden pixels do not influence the result, not even where they are not finite. Every image needs a visible unit.
    """
    hidden = mask_to_pixels(mask, images.shape[-1])
    num_visible = (~hidden).sum(dim=(2, 3), keepdim=True)
    mean = images.masked_fill(hidden, 0.0).sum(dim=(2, 3), keepdim=True) / num_visible
    return torch.where(hidden, mean, images)
