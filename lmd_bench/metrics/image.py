"""Images as tensors: PSNR, SSIM, and the one place where they are rounded to 8 bits and resized."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lmd_bench.data.decode import center_square
from lmd_bench.errors import DataError
from lmd_bench.nn.masking import pixel_mask

PSNR_CAP_DB = 100.0
"""PSNR of equal images, and the most that is ever reported: a mean over images stays finite."""
SSIM_WINDOW_PX = 11
_SIGMA_PX = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def to_uint8(images: Tensor) -> Tensor:
    """Images of any shape in [0, 1] as uint8, rounded to the nearest level; uint8 images are given back as they are.

    Raises DataError for other types, values outside [0, 1], and NaN.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"images: need uint8, or floats in [0, 1], got {images.dtype}")
    if images.numel():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
            raise DataError(f"images: floats must lie in [0, 1], got [{low:g}, {high:g}]")
    return (images.float() * 255.0).round().to(torch.uint8)


def resize_square(images: Tensor, size: int) -> Tensor:
    """The largest central square of images (B, 3, H, W) uint8 at size x size px, antialiased bicubic: (B, 3, S, S).

    It is `data.decode.center_square`, the rule by which images are read, on images that are tensors already. Done by
    Pillow image by image: torch's own interpolation takes as long and differs from it, on a GPU by up to 20 levels at
    sharp edges. Images that have the size already are given back as they are.
    """
    if images.shape[-2:] == (size, size):
        return images
    return map_pictures(images, lambda picture: center_square(picture, size, Image.Resampling.BICUBIC))


def map_pictures(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Images (B, 3, H, W) uint8 each changed as a Pillow picture, back on their device: (B, 3, H', W') uint8."""
    arrays = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous().to(images.device)


def psnr_hidden(filled: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """PSNR over the hidden pixels only, (B,) float64, dB, at most PSNR_CAP_DB.

    `filled` and `images` (B, 3, S, S) floats in [0, 1]; `mask` bool (B, g, g), True = hidden. Visible pixels do not
    count. Raises DataError for values outside [0, 1], other shapes, or an image without hidden pixels.
    """
    _require_pair(filled, images)
    hidden = pixel_mask(mask, images.shape[-1])
    count = hidden.sum(dim=(1, 2, 3)) * images.shape[1]
    if mask.shape[0] != images.shape[0] or not bool((count > 0).all()):
        raise DataError(f"PSNR: every one of {len(images)} images needs a mask with hidden units")
    squares = (filled.double() - images.double()).square().masked_fill(~hidden, 0.0)
    return _decibels(squares.sum(dim=(1, 2, 3)) / count)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR over all pixels of images (B, C, H, W) in [0, 1]: (B,) float64, dB, at most PSNR_CAP_DB.

    Raises DataError for values outside [0, 1] or differing shapes.
    """
    _require_pair(a, b)
    return _decibels((a.double() - b.double()).square().mean(dim=(1, 2, 3)))


def _decibels(mse: Tensor) -> Tensor:
    return -10.0 * mse.clamp(min=10.0 ** (-PSNR_CAP_DB / 10.0)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [0, 1]: (B,) float64, mean over channels and window positions.

    Wang et al., Image quality assessment, IEEE TIP 13(4), 2004: Gaussian window of 11 px with sigma 1.5 px, K1 0.01,
    K2 0.03, population covariances, windows that lie inside the image. Raises DataError for values outside [0, 1],
    differing shapes, or images below 11 px.
    """
    _require_pair(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW_PX:
        raise DataError(f"SSIM: images of {a.shape[-2]} x {a.shape[-1]} px are smaller than its window of 11 px")
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2.0 * covariance + _C2) / (var_a + var_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """Gaussian-weighted means over all windows inside the image: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    channels = images.shape[1]
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=images.dtype, device=images.device) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-0.5 * (offsets / _SIGMA_PX) ** 2)
    weights = (weights / weights.sum()).expand(channels, 1, -1)
    rows = functional.conv2d(images, weights[..., None, :], groups=channels)
    return functional.conv2d(rows, weights[..., None], groups=channels)


def _require_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4 or a.shape[0] == 0:
        raise DataError(f"image metrics: need two equal (B, C, H, W) batches, got {list(a.shape)} and {list(b.shape)}")
    for images in (a, b):
        low, high = (float(value) for value in images.aminmax())
        # written so that NaN fails too
        if not images.is_floating_point() or not (low >= 0.0 and high <= 1.0):
            raise DataError(
                f"image metrics: values must be floats in [0, 1], got {images.dtype} in [{low:g}, {high:g}]"
            )
