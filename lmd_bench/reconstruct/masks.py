"""What is hidden: units at random, or what a user has painted white."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lmd_bench.data.decode import ImageFileError
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.nn.masking import ids_from_noise, pixel_mask, token_mask
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.reconstruct.pictures import Picture


def random_mask(checkpoint: Checkpoint, ratio: float | None, seed: int) -> Tensor:
    """(1, g, g) bool, True = hidden: int((1 - ratio) * n) of the n = g^2 units stay visible, chosen by the seed.

    `ratio` None hides as many as the run's yardstick. Raises ConfigError where nothing would be visible or hidden.
    """
    unit = checkpoint.unit_px
    if checkpoint.image_size % unit:
        raise ConfigError(f"mask units of {unit} px do not tile images of {checkpoint.image_size} px")
    side = checkpoint.image_size // unit
    visible = int(checkpoint.keep * side**2) if ratio is None else _num_visible(side**2, ratio)
    if not 0 < visible < side**2:
        given = "--mask-ratio" if ratio is None else f"--mask-ratio {ratio:g}"
        raise ConfigError(
            f"{given}: leaves {visible} of {side**2} units of {unit} px visible; at least one must be visible and one "
            f"hidden: use more than 0 and at most {_largest_ratio(side**2)}"
        )
    order = ids_from_noise(torch.rand(1, side**2, generator=torch.Generator().manual_seed(seed)))
    return torch.ones(1, side**2, dtype=torch.bool).scatter(1, order[:, :visible], False).view(1, side, side)


def _num_visible(num_units: int, ratio: float) -> int:
    """int((1 - ratio) * n), safe from the rounding that makes 9 of (1 - 0.9) * 100."""
    return math.floor(round(num_units * (1 - ratio), 6)) if 0 <= ratio <= 1 else 0


def _largest_ratio(num_units: int) -> float:
    """The largest ratio of four decimals that leaves a unit visible."""
    return math.floor(1e4 * (1 - 1 / num_units)) / 1e4


def mask_from_image(file: Path, picture: Picture, image_size: int) -> Tensor:
    """(1, S, S) bool from a picture of a mask, white (128 of 255 and more) = hidden.

    It has the size of the picture's file, or of what the method sees of it. In the first case it is resized and
    cropped with the picture, and grows by the reach of the resampling filter, so that no hidden pixel is mixed into a
    visible one. Raises DataError for another size, transparency (is what cannot be seen white?), or a mask that hides
    everything or nothing of the central square that the method takes.
    """
    mask = _read_mask(file)
    size = (mask.shape[1], mask.shape[0])
    if size == picture.original_size:
        hidden = _mask_like_picture(mask, image_size)
    elif size == (image_size, image_size):
        hidden = mask
    else:
        raise DataError(
            f"{file}: a mask of {size[0]} x {size[1]} px does not fit {picture.name} of {picture.original_size[0]} x "
            f"{picture.original_size[1]} px; make it of that size, or {image_size} x {image_size} px"
        )
    if bool(hidden.all()) or not bool(hidden.any()):
        what = "everything" if bool(hidden.all()) else "nothing"
        raise DataError(
            f"{file}: hides {what} of {picture.name}; white pixels are hidden, black ones visible{_lies_outside(mask)}"
        )
    return hidden.unsqueeze(0)


def _lies_outside(mask: Tensor) -> str:
    """Where the mask's white pixels are, for one whose central square is all of one kind and the rest is not."""
    height, width = mask.shape
    if height == width or not bool(mask.any()) or bool(mask.all()):
        return ""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    rows, columns = (mask.any(dim=other).nonzero().flatten() for other in (1, 0))
    return (
        f". Pictures are cropped to their central square, here x {left} to {left + side - 1} and y {top} to "
        f"{top + side - 1} px of {width} x {height}; white lies at x {int(columns[0])} to {int(columns[-1])} and y "
        f"{int(rows[0])} to {int(rows[-1])}"
    )


def _read_mask(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            opaque = not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255
            grey = np.array(image.convert("L"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such mask image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageFileError(file, "not a readable image of any known format") from error
    if not opaque:
        raise DataError(
            f"{file}: has transparent pixels, which are neither white nor black; save the mask without transparency, "
            "white where the picture is to be hidden"
        )
    return torch.from_numpy(grey >= 128)


def _mask_like_picture(mask: Tensor, image_size: int) -> Tensor:
    """A mask (H, W) bool through `center_square`'s crop: hidden wherever its bicubic filter touches a hidden pixel."""
    height, width = mask.shape
    side = min(height, width)
    if height == width == image_size:
        return mask
    scale = side / image_size
    reach = math.ceil(2 * max(scale, 1.0)) + 1  # bicubic: two pixels of the coarser grid to each side
    grown = mask.float()[None, None]
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        grown = F.max_pool2d(grown, kernel, stride=1, padding=padding)
    centres = (torch.arange(image_size) + 0.5) * scale
    rows, columns = ((centres + (length - side) / 2).long().clamp(max=length - 1) for length in (height, width))
    return grown[0, 0].bool()[rows][:, columns]


def hidden_tokens(checkpoint: Checkpoint, mask: Tensor, name: str) -> Tensor | None:
    """(1, L) bool: the tokens that touch a hidden pixel. Raises DataError where none is left to see."""
    token_px = checkpoint.token_px
    if token_px is None:
        return None
    try:
        return token_mask(pixel_mask(mask, checkpoint.image_size), token_px)
    except DataError:
        raise DataError(
            f"{name}: the mask touches every token of {token_px} px, so nothing would be left to see; hide less"
        ) from None
