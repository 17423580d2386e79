"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030) with the parameter names of its checkpoints.

Tokens are kept in the order of the windows that attend to each other: a window is a slice, and cutting, shifting and
merging windows is one permutation between two blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._relative_position import bias_of, biased_attention, relative_position_index
from lmd_bench.errors import ConfigError
from lmd_bench.method import MethodConfig
from lmd_bench.nn.classifier import ImageClassifier
from lmd_bench.nn.drop_path import DropPath, drop_paths_of_stages, rising_rates
from lmd_bench.nn.masking import take_tokens
from lmd_bench.nn.patches import patchify
from lmd_bench.nn.vit import Mlp

NORM_EPS = 1e-5
_OTHER_REGION = -100.0
"""Added to the products of tokens that the cyclic shift has brought together: e^-100 is no attention in float32."""


class SwinOptions(MethodConfig):
    """Sizes of a Swin encoder; the defaults are Swin-B's with the windows of SimMIM's pre-training at 192 px."""

    kind: Literal["swin"] = "swin"
    """Swin, which these options are of."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a patch, px."""
    window_size: int = Field(default=6, ge=1)
    """Side of a window in tokens, in every stage; a stage whose grid is no larger has one window."""
    embed_dim: int = Field(default=128, ge=1)
    """Width of the first stage; every further stage doubles it."""
    depths: tuple[int, ...] = Field(default=(2, 2, 18, 2), min_length=1)
    """Blocks of each stage."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage; they divide its width."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs as a multiple of the width."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Rate at which the last block's branches are dropped for a sample; it rises linearly from 0 at the first."""

    @model_validator(mode="after")
    def _stages_agree(self) -> SwinOptions:
        if len(self.num_heads) != len(self.depths):
            raise ValueError(f"num_heads needs one entry for each of {len(self.depths)} stages, got {self.num_heads}")
        if min(self.depths) < 1:
            raise ValueError(f"depths: every stage needs a block, got {self.depths}")
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or self.width_of(stage) % heads:
                raise ValueError(f"num_heads: {heads} heads do not divide the width {self.width_of(stage)} of a stage")
        return self

    def sizes_text(self) -> str:
        """The network's sizes in words."""
        return swin_text(self.embed_dim, self.depths, self.num_heads, self.window_size)

    def width_of(self, stage: int) -> int:
        """Width of a stage, counted from 0."""
        return self.embed_dim << stage

    def grid_of(self, stage: int, image_size: int) -> int:
        """Side of a stage's grid for images of this side, in tokens."""
        return image_size // self.patch_size >> stage

    @property
    def width(self) -> int:
        """Width of the last stage."""
        return self.width_of(len(self.depths) - 1)

    @property
    def stride(self) -> int:
        """Side in px of the area that a token of the last stage stands for."""
        return self.patch_size << len(self.depths) - 1

    def check(self, image_size: int) -> None:
        """Raise ConfigError unless patches, mergings and windows cut images of this side."""
        if image_size % self.stride:
            raise ConfigError(
                f"backbone: {len(self.depths)} stages with patch_size {self.patch_size} need images whose side is a "
                f"multiple of {self.stride} px, got {image_size}"
            )
        grids = [self.grid_of(stage, image_size) for stage in range(len(self.depths))]
        if any(grid > self.window_size and grid % self.window_size for grid in grids):
            possible = [size for size in range(1, grids[0] + 1) if all(g <= size or g % size == 0 for g in grids)]
            raise ConfigError(
                f"backbone.window_size: {self.window_size} does not cut the grids {', '.join(map(str, grids))} of "
                f"images of {image_size} px; possible: {', '.join(map(str, possible))}"
            )

    def build(self, image_size: int) -> SwinEncoder:
        """The encoder for images of this side."""
        return SwinEncoder(self, image_size)


def swin_text(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], window_size: int) -> str:
    """A Swin's sizes in words."""
    widths = [embed_dim << stage for stage in range(len(depths))]
    return (
        f"swin with stages of widths {widths}, depths {list(depths)}, heads {list(num_heads)} and windows of "
        f"{window_size}"
    )


@dataclass(frozen=True)
class WindowOrder:
    """The order of a square grid's tokens by windows: windows in raster order, and so are the tokens in each."""

    grid: int
    """Side of the grid; the window divides it, or is no smaller and then covers it."""
    window: int
    shift: int = 0
    """Tokens by which the grid is rolled up and to the left before it is cut."""

    @property
    def is_raster(self) -> bool:
        """Whether this is the plain raster order."""
        return self.window >= self.grid and not self.shift

    def cut(self, grid: Tensor) -> Tensor:
        """Values of a grid (g, g) as (windows, tokens of a window)."""
        side = min(self.window, self.grid)
        rolled = grid.roll((-self.shift, -self.shift), dims=(0, 1))
        windows = rolled.view(self.grid // side, side, self.grid // side, side).transpose(1, 2)
        return windows.reshape(-1, side * side)

    def ids(self) -> Tensor:
        """Raster ids of the tokens in this order, (g * g,) int64."""
        return self.cut(torch.arange(self.grid**2).view(self.grid, self.grid)).flatten()

    def shift_mask(self) -> Tensor:
        """(windows, n, n): 0 between tokens that are neighbours in the image too, -100 between the others."""
        edges = torch.zeros(self.grid, dtype=torch.int64)
        edges[self.grid - self.window :] += 1
        edges[self.grid - self.shift :] += 1
        # regions of the rolled grid, so they are cut as they stand
        regions = WindowOrder(self.grid, self.window).cut(3 * edges[:, None] + edges[None, :])
        apart = regions[:, :, None] != regions[:, None, :]
        return apart.to(torch.float32) * _OTHER_REGION


class Reorder(nn.Module):
    """Tokens from one order to another; `source` and `target` (N,) hold raster ids."""

    ids: Tensor
    inverse: Tensor

    def __init__(self, source: Tensor, target: Tensor) -> None:
        super().__init__()
        ids = source.argsort()[target]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("inverse", ids.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) or (B, N) in the source's order to the same in the target's."""
        reordered: Tensor = _Permutation.apply(x, self.ids, self.inverse)  # type: ignore[no-untyped-call]
        return reordered

    def sources(self, places: Tensor) -> Tensor:
        """Where the tokens at these places of the target's order stand in the source's; both int64 of any shape."""
        return self.ids[places]


class Keep(Reorder):
    """The order as it is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def sources(self, places: Tensor) -> Tensor:
        return places


class _Permutation(torch.autograd.Function):
    """Rows along the second axis in another order. Its gradient is a permutation too: PyTorch's own for
    `index_select` adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, ids)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(1, inverse), None, None


def reorder(source: WindowOrder, target: WindowOrder) -> Reorder:
    """From one order of a grid's tokens to another, which may be the same."""
    same = source == target or (source.is_raster and target.is_raster)
    return Keep() if same else Reorder(source.ids(), target.ids())


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) in the order of the windows to (B, N, D); `mask` (windows, n, n) is added to the products."""
        bias = bias_of(self.relative_position_bias_table, self.relative_position_index).unsqueeze(0)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
        windows = self.qkv(x).unflatten(1, (-1, bias.shape[-1]))
        merged: Tensor = self.proj(biased_attention(windows, bias, self.num_heads).flatten(1, 2))
        return merged


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a LayerNorm and added to its input."""

    attn_mask: Tensor | None

    def __init__(self, dim: int, num_heads: int, order: WindowOrder, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("attn_mask", order.shift_mask() if order.shift else None)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = WindowAttention(dim, min(order.window, order.grid), num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, wanted: Tensor | None = None, drop_path: DropPath | None = None) -> Tensor:
        """(B, N, D) in the block's order to (B, N, D).

        With `wanted` (B, n), positions in that order, the MLP runs on these tokens alone: (B, n, D). `drop_path` adds
        the branches in place of the block's own.
        """
        add = self.drop_path if drop_path is None else drop_path
        x = add(x, self.attn(self.norm1(x), self.attn_mask))
        if wanted is not None:
            x = take_tokens(x, wanted)
        out: Tensor = add(x, self.mlp(self.norm2(x)))
        return out


class PatchMerging(nn.Module):
    """Four neighbours side by side, a LayerNorm and a linear layer: half the grid, twice the width."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4 M, D), the four of a quad one after another as `quad_ids` has them, to (B, M, 2 D)."""
        merged: Tensor = self.reduction(self.norm(x.reshape(len(x), -1, 4 * x.shape[-1])))
        return merged


def quad_ids(order: WindowOrder) -> Tensor:
    """Raster ids (4 g * g,) on the grid of twice the side of the tokens that merge into those of `order`, quad by quad.

    Within a quad (row, column): (0, 0), (1, 0), (0, 1), (1, 1), the order in which Swin concatenates.
    """
    rows, columns = order.ids() // order.grid, order.ids() % order.grid
    corners = [(2 * rows + down) * (2 * order.grid) + 2 * columns + right for right in (0, 1) for down in (0, 1)]
    return torch.stack(corners, dim=1).flatten()


class SwinStage(nn.Module):
    """Blocks of one grid, every second one with shifted windows, and the merging that leads to the next grid."""

    def __init__(self, options: SwinOptions, stage: int, grid: int, drop_path: list[float]) -> None:
        super().__init__()
        dim, window, is_last = options.width_of(stage), options.window_size, stage == len(options.depths) - 1
        shift = window // 2 if window < grid else 0
        orders = [WindowOrder(grid, window, shift * (number % 2)) for number in range(options.depths[stage])]
        self.blocks = nn.ModuleList(
            SwinBlock(dim, options.num_heads[stage], order, options.mlp_ratio, rate)
            for order, rate in zip(orders, drop_path, strict=True)
        )
        self.downsample = None if is_last else PatchMerging(dim)
        self.between = nn.ModuleList(reorder(*pair) for pair in pairwise(orders))
        self.leave = (
            reorder(orders[-1], WindowOrder(grid, grid))
            if is_last
            else Reorder(orders[-1].ids(), quad_ids(WindowOrder(grid // 2, window)))
        )

    def forward(self, x: Tensor, wanted: Tensor | None = None, drop_paths: nn.ModuleList | None = None) -> Tensor:
        """(B, N, D) by windows to the next stage's tokens by windows, (B, N / 4, 2 D).

        The last stage gives (B, N, D) in raster order, or of it the tokens `wanted` (B, n). `drop_paths` has a
        `DropPath` for each block, in place of the blocks' own.
        """
        *paths, last = [block.drop_path for block in self.blocks] if drop_paths is None else drop_paths
        for block, path, order in zip(self.blocks, paths, self.between, strict=False):
            x = order(block(x, drop_path=path))
        if wanted is not None:
            only: Tensor = self.blocks[-1](x, self.leave.sources(wanted), last)
            return only
        x = self.leave(self.blocks[-1](x, drop_path=last))
        return x if self.downsample is None else self.downsample(x)


class SwinPatchEmbed(nn.Module):
    """Linear embedding of patches, stored as the convolution it equals, with a LayerNorm; tokens by windows."""

    def __init__(self, patch_size: int, embed_dim: int, order: WindowOrder) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.to_windows = reorder(WindowOrder(order.grid, order.grid), order)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to tokens (B, L, D)."""
        patches = self.to_windows(patchify(images, self.patch_size))
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        tokens: Tensor = self.norm(F.linear(patches, weight, self.proj.bias))
        return tokens


class SwinEncoder(nn.Module):
    """Swin with a mask token in the place of hidden patches (SimMIM); every token is processed.

    Linear layers, bias tables and the mask token start from a normal distribution of deviation 0.02; the embedding of
    patches keeps PyTorch's own start, as in the authors' code.
    """

    def __init__(self, options: SwinOptions, image_size: int) -> None:
        super().__init__()
        grid = image_size // options.patch_size
        self.num_tokens = grid**2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, options.embed_dim))
        self.patch_embed = SwinPatchEmbed(options.patch_size, options.embed_dim, WindowOrder(grid, options.window_size))
        rates = iter(rising_rates(options.drop_path, sum(options.depths)))
        self.layers = nn.ModuleList(
            SwinStage(options, stage, options.grid_of(stage, image_size), [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(options.depths)
        )
        self.norm = nn.LayerNorm(options.width, eps=NORM_EPS)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Features of normalised images (B, 3, S, S) of which the patches `hidden` (B, L) bool are not seen.

        (B, N, D) in raster order of the last stage's grid; with `wanted` (B, n), ids on that grid, (B, n, D).
        """
        hidden = self.patch_embed.to_windows(hidden).unsqueeze(-1)
        x = torch.where(hidden, self.mask_token, self.patch_embed(images))
        *stages, last = self.layers
        for stage in stages:
            x = stage(x)
        features: Tensor = self.norm(last(x, wanted))
        return features

    def classifier(self, to_map: nn.Module, num_classes: int, drop_path: float) -> ImageClassifier:
        """The encoder, which it shares, as a classifier; `to_map` normalises images."""
        return SwinClassifier(self, to_map, num_classes, drop_path)

    @staticmethod
    def is_decayed(name: str) -> bool:
        """Whether the authors decay a parameter of this name, if it is neither a bias nor has one dimension."""
        return not name.endswith(("mask_token", "relative_position_bias_table"))


class StagedClassifier(ImageClassifier):
    """Swin's own form for fine-tuning: the encoder's last norm, the mean of the tokens, a linear head.

    Layers are those of SimMIM's fine-tuning (its optimizer.py): the blocks of all stages counted through, a merging in
    the layer of the last block before it.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        layers: nn.ModuleList,
        norm: nn.LayerNorm,
        to_map: nn.Module,
        num_classes: int,
        drop_path: float,
    ) -> None:
        """The first three are the encoder's own; `layers` are stages with `blocks`."""
        super().__init__(nn.Identity(), norm.normalized_shape[0], num_classes, norm.weight.device)
        self.to_map = to_map
        self.patch_embed, self.layers, self.norm = patch_embed, layers, norm
        self.depths = [sum(1 for _ in stage.get_submodule("blocks").children()) for stage in layers]
        self.drop_paths = drop_paths_of_stages(drop_path, self.depths)
        self.num_layers = sum(self.depths) + 1

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, N, D): the last stage's tokens, before the last norm."""

    def pooled(self, images: Tensor) -> Tensor:
        """(B, D): the mean of the tokens after the last norm."""
        normed: Tensor = self.norm(self.features(images))
        return normed.mean(dim=1)

    def layer_of(self, name: str) -> int:
        part, *rest = name.split(".")
        if part != "layers":
            return super().layer_of(name)
        stage = int(rest[0])
        if rest[1] == "downsample":
            return sum(self.depths[: stage + 1])
        return sum(self.depths[:stage]) + int(rest[2]) + 1


class SwinClassifier(StagedClassifier):
    """SimMIM's Swin on whole images."""

    def __init__(self, encoder: SwinEncoder, to_map: nn.Module, num_classes: int, drop_path: float) -> None:
        super().__init__(encoder.patch_embed, encoder.layers, encoder.norm, to_map, num_classes, drop_path)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.patch_embed(self.to_map(images))
        for stage, paths in zip(self.layers, self.drop_paths, strict=True):
            x = stage(x, drop_paths=paths)
        return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
