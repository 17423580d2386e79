"""Image quality on tensors: PSNR over hidden pixels and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lmd_bench.errors import DataError
from lmd_bench.nn.masking import pixel_mask

PSNR_CAP_DB = 100.0
"""PSNR of equal images, and the most that is ever reported: a mean over images stays finite."""
_WINDOW_PX, _SIGMA_PX = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


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
    mse = squares.sum(dim=(1, 2, 3)) / count
    return -10.0 * mse.clamp(min=10.0 ** (-PSNR_CAP_DB / 10.0)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [0, 1]: (B,) float64, mean over channels and window positions.

    Wang et al., Image quality assessment, IEEE TIP 13(4), 2004: Gaussian window of 11 px with sigma 1.5 px, K1 0.01,
    K2 0.03, population covariances, windows that lie inside the image. Raises DataError for values outside [0, 1],
    differing shapes, or images below 11 px.
    """
    _require_pair(a, b)
    if min(a.shape[-2:]) < _WINDOW_PX:
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
    offsets = torch.arange(_WINDOW_PX, dtype=images.dtype, device=images.device) - _WINDOW_PX // 2
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
