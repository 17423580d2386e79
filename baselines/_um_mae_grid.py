"""Maps kept as sequences in quadtree order, in which a pyramid's merging, pooling and windows are runs of patches.

In that order the four patches of every 2 x 2 square stand next to each other, top left, top right, bottom left,
bottom right; so do the four squares of every 4 x 4 square, and so on. Merging 2 x 2 patches, pooling r x r of them and
cutting a map into windows is then a change of shape, and nothing has to be carried from one order to another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Index = np.ndarray[Any, np.dtype[np.int64]]


def quadtree_order(side: int) -> Index:
    """Raster index of every patch of a square map, (side^2,) int64.

    Squares are formed for as long as they fit; an odd number of squares along a side is left in raster order.
    """
    if side == 1 or side % 2:
        return np.arange(side**2)
    rows, columns = np.divmod(quadtree_order(side // 2), side // 2)
    rows = 2 * rows[:, None] + [0, 0, 1, 1]
    columns = 2 * columns[:, None] + [0, 1, 0, 1]
    order: Index = (rows * side + columns).ravel()
    return order


def raster_ranks(side: int) -> Index:
    """Where each patch of the raster stands in quadtree order, (side^2,) int64: the inverse of `quadtree_order`."""
    return np.argsort(quadtree_order(side))


def constant(values: np.ndarray[Any, Any]) -> Tensor:
    """A table as a tensor on the device modules are being made on (the meta device too); float64 becomes float32."""
    table = torch.from_numpy(np.ascontiguousarray(values))
    table = table.float() if table.is_floating_point() else table
    return torch.empty(table.shape, dtype=table.dtype).copy_(table)


def merge_squares(x: Tensor, proj: nn.Conv2d) -> Tensor:
    """The 2 x 2 convolution of stride 2 on patches in quadtree order: (B, N, C) to (B, N / 4, D).

    A matrix product; patches and weight hold (square, channel) in opposite orders, and the smaller of both is turned.
    """
    batch, length, width = x.shape
    squares, weight = x.reshape(batch, length // 4, 4, width), proj.weight.flatten(2)
    if squares.numel() < weight.numel():
        squares = squares.transpose(2, 3)
    else:
        weight = weight.transpose(1, 2)
    return F.linear(squares.flatten(2), weight.flatten(1), proj.bias)
