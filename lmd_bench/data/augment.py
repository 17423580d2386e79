"""Random crops and flips whose randomness is a pure function of (seed, epoch, image).

One definition serves images in memory, on any device, and files decoded by workers: draws come from counters, so they
depend neither on the number of workers nor on batches, and no generator has a state to keep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmd_bench.data._scene_random import scene_keys, uniform
from lmd_bench.seeding import derive_seed

_FLIP_STREAM, _CROP_STREAM = 1, 2
_TRIES = 10


def augmentation_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """One 64-bit key for each image of an epoch: int64 (B,) -> int64 (B,)."""
    return scene_keys(derive_seed("augmentation", seed, epoch), indices)


def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """A permutation of 0..num_images-1, int64 on CPU, drawn from (seed, epoch) alone."""
    keys = scene_keys(derive_seed("order", seed, epoch), torch.arange(num_images))
    return keys.argsort()  # keys of different images differ, so the order is unique


def random_flips(keys: Tensor) -> Tensor:
    """True with probability 1/2 for each key: bool (B,)."""
    return uniform(keys, _FLIP_STREAM, 1)[:, 0] < 0.5


def flip_where(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) left to right where `flips` (B,) is True."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop_boxes(
    keys: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Boxes of random-resized crops, int64 (B, 4): top, left, height, width.

    The distribution of torchvision's RandomResizedCrop (Szegedy et al., Going deeper with convolutions, 2015): area
    uniform in `scale` as a share of the image, log of width over height uniform in log `ratio`, ten tries to fit into
    the image, then the largest central box whose shape is within `ratio`.
    """
    draws = uniform(keys, _CROP_STREAM, 4 * _TRIES).view(-1, _TRIES, 4).double()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    shape = (low + (high - low) * draws[..., 1]).exp()
    heights, widths = (area / shape).sqrt().round().long(), (area * shape).sqrt().round().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    tops = (draws[..., 2] * (height - heights + 1)).long()
    lefts = (draws[..., 3] * (width - widths + 1)).long()
    boxes = torch.stack((tops, lefts, heights, widths), dim=-1)
    first = fits.int().argmax(dim=1)
    chosen = boxes.gather(1, first.view(-1, 1, 1).expand(-1, 1, 4))[:, 0]
    fallback = torch.tensor(_central_box(height, width, ratio), device=keys.device)
    return torch.where(fits.any(dim=1, keepdim=True), chosen, fallback)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    box_height, box_width = height, width
    if width < ratio[0] * height:
        box_height = round(width / ratio[0])
    elif width > ratio[1] * height:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_crops(images: Tensor, boxes: Tensor, interpolation: str) -> Tensor:
    """Cut a box out of each image and resize it to the image's own size, antialiased.

    `images` (B, C, S, S) float in [0, 1], `boxes` int64 (B, 4) as from `random_crop_boxes`; returns (B, C, S, S) in
    [0, 1]. The same filters as Pillow's resize of the cut-out, so nothing outside the box is seen; without Pillow's
    rounding to 8 bits between rows and columns.
    """
    size = images.shape[-1]
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], size, _KERNELS[interpolation])
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], size, _KERNELS[interpolation])
    return (rows[:, None] @ images @ columns[:, None].transpose(-1, -2)).clamp(0.0, 1.0)


def _resize_matrix(start: Tensor, length: Tensor, size: int, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights (B, size, size) that resample the interval [start, start + length) of an axis to `size` pixels."""
    start, length = start.view(-1, 1, 1).float(), length.view(-1, 1, 1).float()
    pixels = torch.arange(size, device=start.device) + 0.5
    step = length / size
    centers = start + pixels.view(1, -1, 1) * step
    weights = kernel((pixels - centers) / step.clamp(min=1.0))
    weights = weights.where((pixels > start) & (pixels < start + length), torch.zeros_like(weights))
    return weights / weights.sum(dim=-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Cubic convolution with a = -0.5 (Keys, IEEE TASSP 29(6), 1981, eq. 15), the constant that Pillow uses."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def _bilinear(x: Tensor) -> Tensor:
    return (1.0 - x.abs()).clamp(min=0.0)


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bicubic": _bicubic, "bilinear": _bilinear}
