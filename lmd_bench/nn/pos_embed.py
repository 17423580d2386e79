"""Fixed sine-cosine position tables, in the order of MAE's code."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def sincos_pos_embed(embed_dim: int, grid_size: int) -> Tensor:
    """The 2-D table of a square grid with a class row of zeros in front: (1, 1 + grid_size^2, embed_dim) float32.

    The first half of the channels comes from the column, the second from the row; within a half, all sines stand
    before all cosines (MAE's code; LMD's paper, eq. 7, reads row first and interleaves, its code does as MAE).
    `embed_dim` must be divisible by 4. Computed in float64.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be divisible by 4, got {embed_dim}")
    rows, columns = np.divmod(np.arange(grid_size**2, dtype=np.float64), grid_size)
    halves = [_sincos(embed_dim // 2, positions) for positions in (columns, rows)]
    table = np.concatenate([np.zeros((1, embed_dim)), np.concatenate(halves, axis=1)])
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def frozen_pos_embed(embed_dim: int, grid_size: int, *, class_row: bool) -> nn.Parameter:
    """That table as MAE holds it, a parameter that is not trained; on the device modules are being made on.

    Without `class_row` it is (1, grid_size^2, embed_dim).
    """
    table = sincos_pos_embed(embed_dim, grid_size)[:, 0 if class_row else 1 :]
    return nn.Parameter(torch.empty(table.shape).copy_(table), requires_grad=False)


def _sincos(dim: int, positions: Array) -> Array:
    omega = 10000.0 ** -(np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
