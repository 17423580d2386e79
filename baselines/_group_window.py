"""A Swin encoder that computes visible tokens only (GreenMIM, Huang et al. 2022, arXiv 2205.13515).

Windows of a masked image hold different numbers of visible tokens. They are packed into groups of equal size by a
knapsack, and attention runs within groups, masked so that a token sees its own window alone.

Tokens do not stand in raster order but nested: unit by unit (the area of one token of the last stage, wholly visible or
wholly hidden), within a unit quad by quad, down to the patch. Within a quad the order is that in which Swin's patch
merging concatenates, (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), so that merging is a mere view and the units come
out in the order they went in. Attention does not mind the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from baselines._relative_position import biased_attention
from baselines._swin import PatchMerging
from lmd_bench.nn.drop_path import DropPath
from lmd_bench.nn.masked_autoencoder import PatchEmbed
from lmd_bench.nn.vit import NORM_EPS, Mlp

Array = NDArray[np.int64]

_HIDDEN_PAIR = -100.0
"""Added to the attention between tokens of different windows (the release's value). Unlike minus infinity it keeps the
rows of padding, which see nothing, finite."""


# -- packing windows into groups --------------------------------------------------------------------------------------


def knapsack(capacity: int, counts: Sequence[int]) -> list[int]:
    """Indices, ascending, of the windows that together come closest to `capacity` tokens without exceeding it.

    A 0/1 knapsack whose values are its weights. Among equal sums the one that the usual trace through the table finds
    is taken: from the last window back, a window is left out wherever the rest reaches the sum without it, so that
    lower indices win. With values equal to weights a row of the table is the set of sums that can be reached, and
    a set of small numbers is an integer's bits.
    """
    within = (1 << (capacity + 1)) - 1
    reachable = [1]
    for count in counts:
        reachable.append((reachable[-1] | reachable[-1] << count) & within)
    total = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(counts) - 1, -1, -1):
        if not reachable[index] >> total & 1:
            chosen.append(index)
            total -= counts[index]
    return chosen[::-1]


def group_windows(group_size: int, counts: Sequence[int]) -> list[list[int]]:
    """Windows of `counts` tokens (each 1 to `group_size`) in groups of at most `group_size`: the fullest group that
    can be packed, then the fullest of the rest, until none is left (the release's greedy algorithm)."""
    left, groups = list(range(len(counts))), []
    while left:
        chosen = [left[index] for index in knapsack(group_size, [counts[window] for window in left])]
        groups.append(chosen)
        left = sorted(set(left).difference(chosen))
    return groups


def window_ids(coords: Array, window: int, shift: int) -> Array:
    """The window of each token, (N,), from coordinates (N, 2): a grid of `window` tokens a side, moved up and left by
    `window - shift`. Windows at the border are cut, as Swin's masks cut them."""
    rows, columns = ((coords + (window - shift) % window) // window).T
    ids: Array = rows * (int(columns.max()) + 1) + columns
    return ids


def group_slots(windows: Array, window: int) -> Array:
    """Which token stands where in which group: (G, n) indices of tokens, -1 for padding, from their windows (N,).

    So few tokens as two whole windows are one group in their own order, for there full attention is cheaper than
    moving tokens (the release's rule). Otherwise n is the fullest window's count: the release leaves the paper's search
    for the best group size open.
    """
    if len(windows) <= 2 * window**2:
        return np.arange(len(windows))[None]
    by_window = np.argsort(windows, kind="stable")
    counts = np.unique(windows, return_counts=True)[1]
    size = int(counts.max())
    groups = group_windows(size, counts.tolist())
    members = np.split(by_window, np.cumsum(counts)[:-1])
    slots = np.full((len(groups), size), -1)
    for row, group in zip(slots, groups, strict=True):
        tokens = np.concatenate([members[index] for index in group])
        row[: len(tokens)] = tokens
    return slots


def bias_rows(coords: Array, windows: Array, slots: Array, window: int) -> Array:
    """The row of the relative position bias table for each pair of tokens in a group, (G, n, n).

    Pairs that do not see each other, those of different windows and all of padding, have the row after the table's
    last, (2 * window - 1)^2.
    """
    side = 2 * window - 1
    codes = coords[:, 0] * side + coords[:, 1]
    own = np.where(slots < 0, -1, windows[slots])
    together = (own[:, :, None] == own[:, None, :]) & (slots >= 0)[:, :, None]
    rows = codes[slots][:, :, None] - codes[slots][:, None, :] + (window - 1) * (side + 1)
    return np.where(together, rows, side**2)


# -- the plan of a mask -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grouping:
    """How the tokens of one stage attend to each other in blocks of one kind, shifted or not."""

    pairs: Tensor
    """(G, n, n) int64, see `bias_rows`."""
    order: Tensor | None = None
    """(G * n,) int64, the token in each place of the groups, 0 for padding; None where the one group is in the tokens'
    own order."""
    restore: Tensor | None = None
    """(N,) int64, the place of each token; None as before."""


@dataclass(frozen=True)
class StageShape:
    """What grouping needs to know of a stage."""

    grid_size: int
    """Tokens along one side of a whole image."""
    window: int
    """Side of a window, in tokens; at most `grid_size`."""

    @property
    def shifts(self) -> tuple[int, ...]:
        """By how many tokens windows are shifted in even and odd blocks; one entry where one window covers the grid."""
        return (0,) if self.window == self.grid_size else (0, self.window // 2)


def stage_shapes(grid_size: int, num_stages: int, window: int) -> list[StageShape]:
    """The stages of a Swin of `grid_size` patches a side, halved from stage to stage."""
    sides = [grid_size >> stage for stage in range(num_stages)]
    return [StageShape(side, min(window, side)) for side in sides]


def nested_coordinates(units: Array, units_per_side: int, levels: int) -> Array:
    """Coordinates (n * 4^levels, 2), row and column, of the tokens in given units (n,), nested as the module says."""
    coords = np.stack(np.divmod(units, units_per_side), axis=1)
    quad = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
    for _ in range(levels):
        coords = (coords[:, None] * 2 + quad).reshape(-1, 2)
    return coords


def group_stages(units: Array, stages: Sequence[StageShape]) -> list[tuple[Grouping, ...]]:
    """The groupings of every stage, one for each of its shifts, where the units (n,) are visible (CPU tensors)."""
    planned = []
    for number, stage in enumerate(stages):
        coords = nested_coordinates(units, stages[-1].grid_size, len(stages) - 1 - number)
        planned.append(tuple(group_tokens(coords, stage.window, shift) for shift in stage.shifts))
    return planned


def group_tokens(coords: Array, window: int, shift: int) -> Grouping:
    """The grouping of tokens with coordinates (N, 2) for windows of one kind."""
    windows = window_ids(coords, window, shift)
    slots = group_slots(windows, window)
    pairs = torch.from_numpy(bias_rows(coords, windows, slots, window))
    if len(slots) == 1 and slots.size == len(coords):
        return Grouping(pairs)
    places = slots.ravel()
    restore = np.empty(len(coords), dtype=np.int64)
    restore[places[places >= 0]] = np.flatnonzero(places >= 0)
    return Grouping(pairs, torch.from_numpy(places.clip(0)), torch.from_numpy(restore))


def pack_groupings(stages: Sequence[Sequence[Grouping]]) -> dict[str, Tensor]:
    """Groupings as named tensors, for a trip from a data worker to a device."""
    return {
        f"stage{number}_kind{kind}_{name}": tensor
        for number, groupings in enumerate(stages)
        for kind, grouping in enumerate(groupings)
        for name, tensor in vars(grouping).items()
        if tensor is not None
    }


def unpack_groupings(tensors: Mapping[str, Tensor], stages: Sequence[StageShape]) -> list[tuple[Grouping, ...]]:
    """The inverse of `pack_groupings`, by names alone: nothing waits for a device."""

    def one(prefix: str) -> Grouping:
        return Grouping(tensors[f"{prefix}_pairs"], tensors.get(f"{prefix}_order"), tensors.get(f"{prefix}_restore"))

    return [
        tuple(one(f"stage{number}_kind{kind}") for kind in range(len(stage.shifts)))
        for number, stage in enumerate(stages)
    ]


# -- the encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwinShape:
    """Sizes of a Swin Transformer; the defaults are Swin-B, window 7, for 224 px."""

    image_size: int = 224
    """Side of the images, px."""
    patch_size: int = 4
    """Side of a token of the first stage, px."""
    embed_dim: int = 128
    """Width of the first stage, doubled by every further one."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks of each stage."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    window_size: int = 7
    """Side of a window, tokens."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs as a multiple of the width."""

    @property
    def unit_px(self) -> int:
        """Side of the area of a token of the last stage, px."""
        return self.patch_size << (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)

    @property
    def stages(self) -> list[StageShape]:
        """Grid and window of each stage."""
        return stage_shapes(self.image_size // self.patch_size, len(self.depths), self.window_size)


class GroupAttention(nn.Module):
    """Multi-head self-attention within groups; one fused projection for queries, keys and values, with bias."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D); `bias` (G, num_heads, n, n) as `group_biases` makes it from the grouping."""
        if grouping.order is not None:
            x = x.index_select(1, grouping.order)
        qkv = self.qkv(x).unflatten(1, grouping.pairs.shape[:2])
        merged = biased_attention(qkv, bias, self.num_heads).flatten(1, 2)
        if grouping.restore is not None:
            merged = merged.index_select(1, grouping.restore)
        out: Tensor = self.proj(merged)
        return out


def group_biases(tables: Sequence[Tensor], pairs: Tensor) -> tuple[Tensor, ...]:
    """What is added to the attention in blocks that share a grouping, each (G, H, n, n).

    `tables` are their relative position bias tables, ((2 * window - 1)^2, H) each. One look-up serves all blocks, and
    pairs that do not see each other find their mask in a row appended to the tables.
    """
    groups, size, _ = pairs.shape
    joined = torch.cat(list(tables), dim=1)
    joined = torch.cat([joined, joined.new_full((1, joined.shape[1]), _HIDDEN_PAIR)])
    found = joined.index_select(0, pairs.flatten()).view(groups, size, size, len(tables), -1)
    return found.permute(3, 0, 4, 1, 2).contiguous().unbind()


class GroupBlock(nn.Module):
    """Swin's block on visible tokens: group attention and MLP, each after a LayerNorm and added to its input."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = GroupAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor, drop_path: DropPath | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); `drop_path` adds the branches, None adds them as they are."""
        add = torch.add if drop_path is None else drop_path
        x = add(x, self.attn(self.norm1(x), grouping, bias))
        out: Tensor = add(x, self.mlp(self.norm2(x)))
        return out


class GroupStage(nn.Module):
    """The blocks of one resolution, and the merging that ends it (all stages but the last)."""

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, mlp_ratio: float, *, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GroupBlock(dim, num_heads, window, mlp_ratio) for _ in range(depth))
        self.downsample = PatchMerging(dim, NORM_EPS) if merge else None

    def forward(self, x: Tensor, groupings: Sequence[Grouping], drop_paths: nn.ModuleList | None = None) -> Tensor:
        """Nested tokens (B, N, D) to (B, N / 4, 2 * D), or (B, N, D) without merging.

        `drop_paths` has a `DropPath` for each block.
        """
        kinds = len(groupings)
        tables = [block.get_parameter("attn.relative_position_bias_table") for block in self.blocks]
        biases = [
            group_biases(tables[kind::kinds], grouping.pairs) for kind, grouping in enumerate(groupings[: len(tables)])
        ]
        paths = [None] * len(self.blocks) if drop_paths is None else drop_paths
        for number, (block, drop_path) in enumerate(zip(self.blocks, paths, strict=True)):
            x = block(x, groupings[number % kinds], biases[number % kinds][number // kinds], drop_path)
        out: Tensor = x if self.downsample is None else self.downsample(x)
        return out


class NormedPatchEmbed(PatchEmbed):
    """Linear embedding of patches, then a LayerNorm."""

    def __init__(self, in_channels: int, patch_size: int, embed_dim: int) -> None:
        super().__init__(in_channels, patch_size, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, p * p * 3), channel fastest, to (B, N, D)."""
        out: Tensor = self.norm(super().forward(patches))
        return out


class GroupSwin(nn.Module):
    """Swin on the visible units of images, with the parameter names of Swin's checkpoints.

    Biases of relative positions start as a normal of deviation 0.02; the rest is left to the caller.
    """

    def __init__(self, shape: SwinShape) -> None:
        super().__init__()
        self.shape = shape
        self.stage_shapes = shape.stages
        self.patch_embed = NormedPatchEmbed(3, shape.patch_size, shape.embed_dim)
        last = len(shape.depths) - 1
        self.layers = nn.ModuleList(
            GroupStage(
                shape.embed_dim << number,
                depth,
                shape.num_heads[number],
                self.stage_shapes[number].window,
                shape.mlp_ratio,
                merge=number < last,
            )
            for number, depth in enumerate(shape.depths)
        )
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, GroupAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, units: Tensor, groupings: Iterable[Sequence[Grouping]]) -> Tensor:
        """Features (B, n, D) of visible units (B, n, u * u * 3) as `patchify` cuts them, before the last norm.

        `groupings` are those of `group_stages` for these units; one mask for the whole batch.
        """
        x: Tensor = self.patch_embed(nested_patches(units, self.shape.patch_size))
        for layer, of_stage in zip(self.layers, groupings, strict=True):
            x = layer(x, of_stage)
        return x


def nested_patches(units: Tensor, patch_size: int) -> Tensor:
    """Units (B, n, u * u * C) as `patchify` cuts them to nested patches (B, n * (u / p)^2, p * p * C) of the same
    inner order; u / p is a power of two."""
    batch, count, length = units.shape
    side = math.isqrt(length // 3)
    levels = (side // patch_size).bit_length() - 1
    halves = (2,) * levels
    cut = units.view(batch, count, *halves, patch_size, *halves, patch_size, 3)
    rows, columns = range(2, 2 + levels), range(3 + levels, 3 + 2 * levels)
    nested = [dim for row, column in zip(rows, columns, strict=True) for dim in (column, row)]
    inner = (2 + levels, 3 + 2 * levels, 4 + 2 * levels)
    return cut.permute(0, 1, *nested, *inner).reshape(batch, -1, patch_size**2 * 3)
