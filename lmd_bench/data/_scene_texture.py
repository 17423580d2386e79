"""Texture fields in unit coordinates: fractal value noise and soft stripes, (B, S, S) float32 within about [-1, 1].

Only sums, products, floors and clamps touch pixels here and in the sibling modules: each is rounded alike by every
IEEE 754 device and by vector and scalar code, so pixels do not depend on batch, thread count, or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmd_bench.data._scene_random import uniform

_NOISE_STREAM = 16
_OCTAVES = (4, 8, 16, 32, 64, 128, 256)  # cells across the image


def pixel_centers(size: int, device: torch.device) -> Tensor:
    """Coordinates of pixel centers along one axis in image widths, float32 (size,)."""
    # A product, not a quotient: CUDA divides by a number through its reciprocal, which rounds in another way.
    return (torch.arange(size, dtype=torch.float32, device=device) + 0.5) * (1.0 / size)


def _octave(lattice: Tensor, centers: Tensor) -> Tensor:
    """Smooth interpolation of a lattice (B, g + 1, g + 1), its knots in the middle of cells, at pixel centers."""
    cells = lattice.shape[1] - 1
    position = centers * cells + 0.5
    low = position.floor().clamp(max=cells - 1)
    t = position - low
    weight = t * t * (3.0 - 2.0 * t)
    low_index = low.long()
    above, below = lattice.index_select(1, low_index), lattice.index_select(1, low_index + 1)
    rows = above + (below - above) * weight[None, :, None]
    left, right = rows.index_select(2, low_index), rows.index_select(2, low_index + 1)
    return left + (right - left) * weight


def value_noise(keys: Tensor, size: int) -> Tensor:
    """Sum of octaves of value noise, (B, size, size), of equal strength: an amplitude spectrum near 1/f.

    Octaves with cells under a pixel are left out, and cells of a pixel count in part: a pixel averages over them.
    """
    centers = pixel_centers(size, keys.device)
    field = torch.zeros(len(keys), size, size, device=keys.device)
    for number, cells in enumerate(_OCTAVES):
        share = min(1.0, 1.4 - 0.7 * cells / size)
        if cells > size:
            break
        lattice = uniform(keys, _NOISE_STREAM + number, (cells + 1) ** 2).view(-1, cells + 1, cells + 1)
        field += (_octave(lattice, centers) - 0.5) * share
    return field


def stripes(phase: Tensor, cycles: Tensor, size: int) -> Tensor:
    """Soft stripes, (B, S, S), of a phase in cycles (B, S, S) that runs `cycles` (B,) times across the image.

    The wave is made of two parabolas, a sine within 6 %. It fades out where a cycle nears two pixels.
    """
    t = phase - phase.floor()
    wave = (t - 0.5) * (16.0 * (1.0 - (t - 0.5).abs() * 2.0))
    visible = (size / (2.0 * cycles) - 1.0).clamp(0.0, 1.0)
    return wave * (0.5 * visible)[:, None, None]
