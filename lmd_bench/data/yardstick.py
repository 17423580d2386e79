"""The common yardstick's masks: the same hidden units of the same held-out images for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from lmd_bench.data._scene_random import scene_keys, uniform
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.nn.masking import pixel_mask, take_tokens
from lmd_bench.nn.patches import patchify, unpatchify
from lmd_bench.seeding import derive_seed


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


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, S, S) with hidden pixels set to 0, whatever they held."""
    return images.masked_fill(pixel_mask(mask, images.shape[-1]), 0.0)


def paste(filled: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """The composite (B, 3, S, S): `filled` where hidden, `images` where visible."""
    return torch.where(pixel_mask(mask, images.shape[-1]), filled, images)


def fill_nearest_unit(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, C, S, S) with a copy of the nearest visible unit in every hidden unit of `mask` (B, g, g) bool.

    Distances are between the units' centres; of several at the same distance the first in raster order is taken. No
    value of a hidden pixel reaches the result. Every image needs a visible unit.
    """
    side = mask.shape[-1]
    hidden = mask.flatten(1)
    if bool(hidden.all(dim=1).any()):
        raise DataError("nearest visible unit: an image has no visible unit at all")
    rows, columns = torch.meshgrid(*[torch.arange(side, device=mask.device)] * 2, indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squares = (places[:, None] - places[None]).square().sum(dim=-1)
    # one distinct number for each pair, so that the least is unique on every device: distance first, then the raster
    ranks = squares * side**2 + torch.arange(side**2, device=mask.device)
    nearest = ranks.masked_fill(hidden.unsqueeze(1), torch.iinfo(torch.int64).max).argmin(dim=2)
    unit_px = images.shape[-1] // side
    copied = unpatchify(take_tokens(patchify(images, unit_px), nearest), unit_px, images.shape[1])
    return paste(copied, images, mask)
