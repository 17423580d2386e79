"""Pre-norm transformer blocks with the parameter names of MAE's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.nn.drop_path import DropPath

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention on (B, N, D); one fused projection for queries, keys and values, with bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); with `num_queries` only the last tokens ask: (B, num_queries, D)."""
        query, key, value = self._project(x, num_queries)
        attended = F.scaled_dot_product_attention(query, key, value)
        merged: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return merged

    def _project(self, x: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        if num_queries is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(x[:, x.shape[1] - num_queries :], weight[:dim], bias[:dim])
            key, value = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return self._heads(query), self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, -1).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm (eps 1e-6) and added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, num_queries: int | None = None, drop_path: DropPath | None = None) -> Tensor:
        """(B, N, D) to (B, N, D).

        With `num_queries` only the last tokens are computed, (B, num_queries, D): the same values, at less cost,
        where a block's other outputs are not needed. `drop_path` adds the branches; None adds them as they are.
        """
        add = torch.add if drop_path is None else drop_path
        attended = self.attn(self.norm1(x), num_queries)
        if num_queries is not None:
            x = x[:, x.shape[1] - num_queries :]
        x = add(x, attended)
        out: Tensor = add(x, self.mlp(self.norm2(x)))
        return out
