"""Swin (Liu et al. 2021, arXiv 2103.14030) as UM-MAE runs it: position biases from coordinates, not from a table.

After uniform sampling, neighbours on the compact map are not equally far apart, so the bias of a pair of patches is a
small MLP of the difference of their coordinates on the full map, sign(d) ln(1 + |d|) per axis, key less query.
Coordinates count patches; a merged patch takes its top left patch's, halved. (Found by matching the authors' outputs.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._um_mae_grid import Index, constant, merge_squares, quadtree_order, raster_ranks
from lmd_bench.nn.drop_path import DropPath
from lmd_bench.nn.vit import NORM_EPS, Mlp

_SEPARATE = -100.0
"""Added to a pair of patches that only the cyclic shift brought together (Swin's value)."""


class Windows(nn.Module):
    """One way of cutting a map in quadtree order into square windows, and what can be known of it ahead of a step.

    A window consists of units: squares of patches that always move together (a visible token), so that the biases of
    two units' patches depend on the units' offset alone. They are computed once per offset and copied to where that
    offset occurs.
    """

    log_offsets: Tensor
    chunks: Tensor
    chunks_back: Tensor
    separate: Tensor

    def __init__(
        self,
        side: int,
        window: int,
        *,
        unit: int = 1,
        stride: int = 1,
        jitter: int = 0,
        spacing: float = 1.0,
        shifted: bool = False,
    ) -> None:
        """`side`, `window` and `unit` count patches; the window divides the side.

        Units are placed on a grid of positions, `stride` of its steps apart give or take `jitter`; a step of it is
        `spacing` of the stage's coordinates. `shifted` moves the windows by half their side, around the edges.
        """
        super().__init__()
        self.area = window**2
        self.num_windows = (side // window) ** 2
        self.num_units = (window // unit) ** 2
        self.reach = stride * (window // unit - 1) + jitter
        self.register_buffer("log_offsets", constant(_log_offsets(self.reach, unit, spacing)), persistent=False)
        self.shifted = shifted
        if shifted:
            chunks, wrapped = _shifted_chunks(2 * side // window)
            separate = (wrapped[:, :, None] != wrapped[:, None, :]).any(axis=-1)
            units = self.num_units // 4
            self.register_buffer("chunks", constant(chunks), persistent=False)
            self.register_buffer("chunks_back", constant(np.argsort(chunks)), persistent=False)
            separate = separate.repeat(units, axis=1).repeat(units, axis=2)
            self.register_buffer("separate", constant(separate), persistent=False)

    def split(self, x: Tensor) -> Tensor:
        """Patches (B, N, C) in quadtree order to windows (B * W, window^2, C)."""
        return self._in_windows(x).reshape(-1, self.area, x.shape[-1])

    def join(self, windows: Tensor, batch_size: int) -> Tensor:
        """The inverse of `split`."""
        width = windows.shape[-1]
        if self.shifted:
            chunks = windows.reshape(batch_size, self.num_windows * 4, -1)
            windows = chunks.index_select(1, self.chunks_back)
        return windows.reshape(batch_size, -1, width)

    def offsets(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of `log_offsets` holds for every pair (query, key) of a window's units: (B * W, T, T) int64.

        `rows` and `columns` (B, N / unit^2) int64 are the units' positions in quadtree order. One more than the last
        stands for pairs that must not see each other.
        """
        span = 2 * self.reach + 1
        code = self._in_windows((rows * span + columns).unsqueeze(-1)).reshape(len(rows), -1, self.num_units)
        pairs = code.unsqueeze(2) - code.unsqueeze(3) + self.reach * (span + 1)
        if self.shifted:
            pairs = pairs.masked_fill(self.separate, span**2)
        return pairs.flatten(0, 1)

    def _in_windows(self, x: Tensor) -> Tensor:
        if not self.shifted:
            return x
        chunks = x.reshape(len(x), self.num_windows * 4, -1)
        return chunks.index_select(1, self.chunks)


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a LayerNorm and added to its input; a stage's first block merges.

    Takes and returns patches in quadtree order. `previous_dim` is the width before a stage's first block, None for
    every other block and for the first of all.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, bias_hidden: int, previous_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = WindowAttention(dim, num_heads, bias_hidden)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.downsample = None if previous_dim is None else PatchMerging(previous_dim, dim)

    def forward(self, x: Tensor, windows: Windows, offsets: Tensor, drop_path: DropPath | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or (B, 4 N, previous D) to it; `offsets` as `windows.offsets` gives them.

        `drop_path` adds the branches, None adds them as they are.
        """
        add = torch.add if drop_path is None else drop_path
        if self.downsample is not None:
            x = self.downsample(x)
        attended = self.attn(windows.split(self.norm1(x)), windows.log_offsets, offsets)
        x = add(x, windows.join(attended, len(x)))
        out: Tensor = add(x, self.mlp(self.norm2(x)))
        return out


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a bias per pair of patches from an MLP of their offset."""

    def __init__(self, dim: int, num_heads: int, bias_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.posmlp = nn.Sequential(nn.Conv2d(2, bias_hidden, 1), nn.ReLU(), nn.Conv2d(bias_hidden, num_heads, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, log_offsets: Tensor, offsets: Tensor) -> Tensor:
        """Windows (V, A, D) to (V, A, D); `offsets` (W, T, T), where V is W or, for windows alike, a multiple of it."""
        num_windows, area, dim = x.shape
        heads = self.qkv(x).view(num_windows, area, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.flatten(1, 2).unbind(0)
        scores = self._scores(query, key, self.bias(log_offsets, offsets))
        attended = (scores.softmax(dim=-1) @ value).view(num_windows, self.num_heads, area, -1)
        merged: Tensor = self.proj(attended.transpose(1, 2).reshape(num_windows, area, dim))
        return merged

    def _scores(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """(V * heads, A, A), the biases (W, heads, A, A) repeated where V is a multiple of W."""
        scale = query.shape[-1] ** -0.5
        bias = bias.flatten(0, 1)
        if len(bias) == len(query):
            return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
        products = torch.bmm(query * scale, key.transpose(1, 2))
        return (products.view(-1, *bias.shape) + bias).flatten(0, 1)

    def bias(self, log_offsets: Tensor, offsets: Tensor) -> Tensor:
        """(W, heads, A, A) from `log_offsets` (M, P, P, 2), P patches in a unit, and `offsets` (W, T, T), A = T P."""
        num_offsets, patches = log_offsets.shape[:2]
        values = log_offsets.flatten(0, 2)
        for layer in self.posmlp:
            if isinstance(layer, nn.Conv2d):
                values = F.linear(values, layer.weight.flatten(1), layer.bias)
            else:
                values = layer(values)
        values = values.view(num_offsets, patches**2, -1)
        table = F.pad(values.transpose(1, 2).flatten(1), (0, 0, 0, 1), value=_SEPARATE)
        count, units = offsets.shape[:2]
        copied = F.embedding(offsets, table).view(count, units, units, -1, patches, patches)
        return copied.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, units * patches, units * patches)


class PatchMerging(nn.Module):
    """2 x 2 patches to one: a LayerNorm of each, then a convolution."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) in quadtree order to (B, N / 4, out_dim)."""
        return merge_squares(self.norm(x), self.proj)


def _log_offsets(reach: int, unit: int, spacing: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(M, P, P, 2), M = (2 reach + 1)^2: the MLP's input for every offset of two units and every pair of their P
    patches, query first, in quadtree order; rows, then columns."""
    steps = spacing * np.arange(-reach, reach + 1)
    units = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 1, 1, 2)
    patches = np.stack(np.divmod(quadtree_order(unit), unit), axis=-1)
    offsets = units + patches[None, None, :, :] - patches[None, :, None, :]
    logarithms: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.sign(offsets) * np.log1p(np.abs(offsets))
    return logarithms


def _shifted_chunks(side: int) -> tuple[Index, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """Quarters of windows, `side` of them along a side, as windows shifted by one quarter hold them.

    Their places in quadtree order (side^2,), four per window; and whether each came around the map's lower and right
    edge, (W, 4, 2).
    """
    rows, columns = np.divmod(quadtree_order(side), side)
    places = np.stack([rows, columns], axis=-1).reshape(-1, 4, 2) + 1
    wrapped = places >= side
    row, column = np.moveaxis(places % side, -1, 0)
    return raster_ranks(side)[(row * side + column).ravel()], wrapped
