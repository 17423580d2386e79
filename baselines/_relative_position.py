"""What Swin and BEiT's ViT share: a learned bias for each relative position, and attention with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a square window, (w * w, w * w) int64.

    Entry (i, j) is that of the offset from token j to token i, both in raster order; the table has (2 w - 1)^2 rows,
    ordered by vertical, then horizontal offset, each from -(w - 1) to w - 1 (Liu et al. 2021, eq. 4).
    """
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
    vertical, horizontal = (axis[:, None] - axis[None, :] + window - 1 for axis in (rows, columns))
    return vertical * (2 * window - 1) + horizontal


def relative_position_index_with_class_token(window: int) -> Tensor:
    """As `relative_position_index`, with a class token in front: (1 + w * w, 1 + w * w) int64.

    Three more rows of the table stand at its end: class token to patch, patch to class token, class token to itself
    (BEiT, Bao et al. 2021).
    """
    num_offsets = (2 * window - 1) ** 2
    index = F.pad(relative_position_index(window), (1, 0, 1, 0), value=num_offsets)
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """Bias (heads, n, n) for pairs of tokens, from a table (rows, heads) and an index (n, n) of its rows."""
    return table[index].permute(2, 0, 1)


def biased_attention(qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Softmax attention within windows, with a bias added to the scaled products.

    `qkv` (B, W, n, 3 D): queries, keys and values side by side for W windows of n tokens; `bias` (W or 1, heads, n, n).
    Returns (B, W, n, D).
    """
    batch, windows, length, width = qkv.shape
    split = qkv.view(batch, windows, length, 3, num_heads, width // (3 * num_heads))
    query, key, value = split.permute(3, 0, 1, 4, 2, 5)
    if qkv.is_cuda:
        # windows and heads are folded into one axis, so that the kernel takes one mask for every sample
        query, key, value = (part.flatten(1, 2) for part in (query, key, value))
        mask = bias.expand(windows, -1, -1, -1).flatten(0, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.unflatten(1, (windows, num_heads))
    else:
        # no fused CPU kernel gives a gradient to its mask, and SDPA without one copies queries and keys once more
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        attended = scores.add_(bias).softmax(dim=-1) @ value
    merged: Tensor = attended.transpose(2, 3).flatten(3)
    return merged
