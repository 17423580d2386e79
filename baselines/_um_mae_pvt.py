"""PVT (Wang et al. 2021, arXiv 2102.12122) as UM-MAE runs it: average pooling reduces what attention looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._um_mae_grid import merge_squares
from lmd_bench.nn.drop_path import DropPath
from lmd_bench.nn.vit import NORM_EPS, Mlp


class PvtBlock(nn.Module):
    """Attention on a pooled map and MLP, each after a LayerNorm and added to its input; a stage's first block merges.

    Takes and returns patches in quadtree order. `previous_dim` is the width before a stage's first block, None for
    every other block and for the first of all.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, previous_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = PooledAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.downsample = None if previous_dim is None else PatchMerging(previous_dim, dim)

    def forward(self, x: Tensor, reduction: int, drop_path: DropPath | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or (B, 4 N, previous D) to it; keys and values from means of r x r patches.

        `drop_path` adds the branches, None adds them as they are.
        """
        add = torch.add if drop_path is None else drop_path
        if self.downsample is not None:
            x = self.downsample(x)
        x = add(x, self.attn(self.norm1(x), reduction))
        out: Tensor = add(x, self.mlp(self.norm2(x)))
        return out


class PooledAttention(nn.Module):
    """Every patch asks; keys and values are projected and normalised means of r x r patches (r = 1: of each patch)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5 here, unlike every other norm of the model

    def forward(self, x: Tensor, reduction: int) -> Tensor:
        """(B, N, D) to (B, N, D); r^2 divides N."""
        batch, _, dim = x.shape
        pooled = x if reduction == 1 else x.view(batch, -1, reduction**2, dim).mean(dim=2)
        context = self.norm(F.linear(pooled, self.sr.weight.flatten(1), self.sr.bias))
        key, value = self.kv(context).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(self._heads(self.q(x)), self._heads(key), self._heads(value))
        merged: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, -1).transpose(1, 2)


class PatchMerging(nn.Module):
    """2 x 2 patches to one by a convolution, without a norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) in quadtree order to (B, N / 4, out_dim)."""
        return merge_squares(x, self.proj)
