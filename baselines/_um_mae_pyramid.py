"""UM-MAE on pyramids, PVT and Swin (Li et al. 2022, arXiv 2205.10063): uniform masks make a dense map of a quarter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baselines._um_mae_grid import constant, quadtree_order, raster_ranks
from baselines._um_mae_pvt import PvtBlock
from baselines._um_mae_shape import NUM_STAGES, PATCHES_PER_TOKEN_SIDE, WINDOW, PyramidShape, check_pyramid
from baselines._um_mae_swin import SwinBlock, Windows
from baselines._uniform_sampling import num_unreplaced, visible_first
from lmd_bench.nn.masked_autoencoder import PatchEmbed
from lmd_bench.nn.pos_embed import frozen_pos_embed
from lmd_bench.nn.vit import NORM_EPS, Block

_REDUCTIONS = (4, 2, 1, 1)
"""Patches per side of what PVT's attention pools."""


class PyramidAutoencoder(nn.Module):
    """A pyramid on the visible quarter of an image as a dense map, a ViT decoder that predicts the rest.

    One token of every 2 x 2 is visible; put together they are a map of half the side, the compact map, on which PVT
    and Swin run as on any image. Only visible tokens are embedded. Within, maps are in quadtree order
    (`_um_mae_grid`); the decoder runs its last block on the hidden tokens alone. All of it gives the numbers of the
    authors' forward pass (tests/parity), whose parameter names it has.

    The release gives the visible tokens, cell by cell, the decoder positions of the visible tokens in raster order;
    `shape.official_order` keeps this, otherwise each token gets its own position.
    """

    decoder_pos_embed: Tensor
    cells: Tensor
    cell_ranks: Tensor
    patches_of_tokens: Tensor

    def __init__(self, shape: PyramidShape) -> None:
        """Raises ConfigError for sizes that do not fit (`check_pyramid`)."""
        super().__init__()
        check_pyramid(shape)
        self.shape = shape
        first, last = shape.stage_widths[0], shape.stage_widths[-1]
        self.vis_mask_token = nn.Parameter(torch.empty(1, 1, first))
        if shape.backbone == "pvt":
            self.pos_embed = frozen_pos_embed(first, shape.grid_size * PATCHES_PER_TOKEN_SIDE, class_row=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, shape.decoder_width))
        self.decoder_pos_embed = frozen_pos_embed(shape.decoder_width, shape.grid_size, class_row=False)
        self.patch_embed = PyramidPatchEmbed(shape.patch_size, first, normed=shape.backbone == "swin")
        self.blocks = nn.ModuleList(_blocks(shape))
        self.norm = nn.LayerNorm(last, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(last, 4 * shape.decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(shape.decoder_width, shape.decoder_heads) for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(shape.decoder_width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(shape.decoder_width, shape.patch_dim)
        self._make_tables()
        self._initialise()

    def _make_tables(self) -> None:
        """Everything about positions that does not depend on the mask; nothing of it is saved."""
        shape = self.shape
        side = shape.grid_size // 2
        self.register_buffer("cells", constant(quadtree_order(side)), persistent=False)
        self.register_buffer("cell_ranks", constant(raster_ranks(side)), persistent=False)
        self.route: PooledMaps | WindowedMaps
        if shape.backbone == "swin":
            self.route = WindowedMaps(shape)
        else:
            self.route = PooledMaps(shape, _REDUCTIONS)
            patches = _patches_of_tokens(shape.grid_size)
            self.register_buffer("patches_of_tokens", constant(patches), persistent=False)

    def _initialise(self) -> None:
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.vis_mask_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, images: Tensor, visible: Tensor, secondary_noise: Tensor | None, *, all_tokens: bool = False
    ) -> Tensor:
        """Predicted tokens (B, L - n, P) of the hidden part, in raster order; P values in `patchify`'s order.

        `images` (B, 3, S, S) are normalised. `visible` (B, L) bool leaves one token of every 2 x 2 visible: n = L / 4;
        this is not checked. `secondary_noise` (B, n), uniform in [0, 1), one number for every 2 x 2 cell in raster
        order, says whose visible tokens are replaced: those with the largest; None replaces none. With `all_tokens`
        the visible tokens' predictions stand in front, cell by cell: (B, L, P).
        """
        replaced = None if secondary_noise is None else self.replaced_cells(secondary_noise)
        return self.decode(self.encode(images, visible, replaced), visible, all_tokens=all_tokens)

    def replaced_cells(self, noise: Tensor) -> Tensor:
        """Where the visible token is replaced, (B, n) bool from `noise` (B, n): the largest int(n * ratio) or so."""
        ranks = noise.argsort(dim=1).argsort(dim=1)
        return ranks >= num_unreplaced(noise.shape[1], self.shape.secondary_ratio)

    def encode(self, images: Tensor, visible: Tensor, replaced: Tensor | None = None) -> Tensor:
        """Features (B, L / 16, D) after the last norm, in quadtree order, from the visible tokens of `images`.

        `replaced` (B, n) bool, cells in raster order: whose visible token is not shown either.
        """
        rows, columns = self._visible_positions(visible)
        x = self.patch_embed(token_patches(images, rows, columns, self.shape.token_px))
        if replaced is not None:
            x = torch.where(replaced[:, self.cells, None, None], self.vis_mask_token.unsqueeze(1), x)
        x = self.patch_embed.norm(x)
        if self.shape.backbone == "pvt":
            patches = self.patches_of_tokens[rows * self.shape.grid_size + columns]
            x = x + self.pos_embed[0][patches]
        x = self.route(self.blocks, x.flatten(1, 2), rows, columns)
        out: Tensor = self.norm(x)
        return out

    def decode(self, features: Tensor, visible: Tensor, *, all_tokens: bool = False) -> Tensor:
        """Predicted tokens (B, L - n, P) of the hidden part, or all (B, L, P), from `encode`'s features."""
        batch, length, _ = features.shape
        embedded = self.decoder_embed(features).view(batch, length, -1, 4).transpose(2, 3).flatten(1, 2)
        num_visible = embedded.shape[1]
        ids_visible, ids_hidden = visible_first(visible).split([num_visible, 3 * num_visible], dim=1)
        table = self.decoder_pos_embed[0]
        hidden = self.mask_token + table[ids_hidden]
        x = torch.cat([embedded + table[self._decoder_ids(visible, ids_visible)], hidden], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, None if all_tokens else 3 * num_visible)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(x))
        if not all_tokens:
            return predicted
        return torch.cat([predicted[:, self.cell_ranks], predicted[:, num_visible:]], dim=1)

    def _visible_positions(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (B, n) of every cell's visible token, cells in quadtree order."""
        side = self.shape.grid_size // 2
        slots = visible.view(-1, side, 2, side, 2).transpose(2, 3).reshape(-1, side**2, 4)
        slot = slots.to(torch.uint8).argmax(dim=2)[:, self.cells]
        return 2 * (self.cells // side) + slot // 2, 2 * (self.cells % side) + slot % 2

    def _decoder_ids(self, visible: Tensor, ids_visible: Tensor) -> Tensor:
        """The tokens whose decoder positions the visible ones get, (B, n) in quadtree order of the cells."""
        if self.shape.official_order:
            return ids_visible[:, self.cells]
        rows, columns = self._visible_positions(visible)
        return rows * self.shape.grid_size + columns


class PyramidPatchEmbed(PatchEmbed):
    """Linear embedding of patches; Swin's has a norm, which comes after some were replaced (`norm`)."""

    def __init__(self, patch_size: int, width: int, *, normed: bool) -> None:
        super().__init__(3, patch_size, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if normed else nn.Identity()


Blocks = Iterable[Callable[..., Tensor]]
"""A pyramid's blocks of all stages, or what stands for them."""


class PooledMaps(nn.Module):
    """PVT's way through its blocks: how much each stage pools what its attention looks at."""

    def __init__(self, shape: PyramidShape, reductions: tuple[int, ...]) -> None:
        super().__init__()
        self.reductions = [reductions[stage] for stage, depth in enumerate(shape.stage_depths) for _ in range(depth)]

    def forward(self, blocks: Blocks, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, N, D) to the last stage's (B, N / 64, D'); positions are in the patches already."""
        for block, reduction in zip(blocks, self.reductions, strict=True):
            x = block(x, reduction)
        return x


class WindowedMaps(nn.Module):
    """Swin's way through its blocks: windows of each stage, every second block's shifted where there are several.

    Windows are of 8 patches on the compact map, whose units are visible tokens at irregular places, and of 16 on the
    whole map (`dense`), whose units are patches.
    """

    def __init__(self, shape: PyramidShape, *, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.stages = nn.ModuleList()
        for stage, (side, depth) in enumerate(zip(shape.stage_sides(dense=dense), shape.stage_depths, strict=True)):
            window = min(side, 2 * WINDOW if dense else WINDOW)
            self.stages.append(WindowedStage(side, window, depth, {} if dense else _unit_of_stage(stage)))

    def forward(self, blocks: Blocks, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, N, D) to the last stage's (B, N / 64, D').

        `rows` and `columns` (B, n) are the positions of the first stage's units, in quadtree order: visible tokens,
        counted in tokens, or patches, counted in patches.
        """
        remaining = iter(blocks)
        for index, stage in enumerate(self.stages):
            if index and (self.dense or index == NUM_STAGES - 1):
                rows, columns = rows[:, ::4], columns[:, ::4]
            if index and self.dense:
                rows, columns = rows // 2, columns // 2
            x = stage(remaining, x, rows, columns)
        return x


class WindowedStage(nn.Module):
    """The windows of one of Swin's stages."""

    def __init__(self, side: int, window: int, depth: int, units: Mapping[str, Any]) -> None:
        """`units` as `Windows` takes them."""
        super().__init__()
        self.depth = depth
        self.plain = Windows(side, window, **units)
        self.shifted = Windows(side, window, shifted=True, **units) if window < side and depth > 1 else self.plain

    def forward(self, blocks: Iterator[Callable[..., Tensor]], x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, N, D) through the next `depth` of the blocks."""
        ways = [(windows, windows.offsets(rows, columns)) for windows in dict.fromkeys((self.plain, self.shifted))]
        for index in range(self.depth):
            x = next(blocks)(x, *ways[index % len(ways)])
        return x


def _unit_of_stage(stage: int) -> dict[str, Any]:
    """How the compact map's units stand: tokens of 4 x 4, 2 x 2, 1 x 1 patches, then patches of 2 x 2 tokens each.

    Tokens of neighbouring cells are 2 steps of the token grid apart, one more or less; of those 2 x 2, the top left
    one's position counts. A step is 4 of the first stage's coordinates, which every stage halves.
    """
    spacing = PATCHES_PER_TOKEN_SIDE / 2**stage
    return {"unit": max(1, int(spacing)), "stride": 2 if spacing >= 1 else 4, "jitter": 1, "spacing": spacing}


def _blocks(shape: PyramidShape) -> list[nn.Module]:
    """All stages' blocks in one list, as the authors' code has them."""
    made: list[nn.Module] = []
    previous: int | None = None
    for width, depth, heads, mlp_ratio in zip(
        shape.stage_widths, shape.stage_depths, shape.stage_heads, shape.stage_mlp_ratios, strict=True
    ):
        for index in range(depth):
            before = None if index else previous
            if shape.backbone == "swin":
                made.append(SwinBlock(width, heads, mlp_ratio, shape.bias_hidden, before))
            else:
                made.append(PvtBlock(width, heads, mlp_ratio, before))
        previous = width
    return made


def token_patches(images: Tensor, rows: Tensor, columns: Tensor, token_px: int) -> Tensor:
    """Patches (B, n, 16, p * p * 3) of the tokens at `rows` and `columns` (B, n); 16 in quadtree order."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // token_px, token_px, width // token_px, token_px)
    sample = torch.arange(batch, device=images.device).unsqueeze(1)
    tokens = cut.permute(0, 2, 4, 3, 5, 1)[sample, rows, columns]
    patch = token_px // PATCHES_PER_TOKEN_SIDE
    squares = tokens.view(batch, -1, 2, 2, patch, 2, 2, patch, channels)
    return squares.permute(0, 1, 2, 5, 3, 6, 4, 7, 8).reshape(batch, -1, 16, patch**2 * channels)


def _patches_of_tokens(grid_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Raster index among all patches of the 16 patches of every token, (L, 16): tokens in raster order, the 16 in
    quadtree order."""
    rows, columns = np.divmod(np.arange(grid_size**2)[:, None], grid_size)
    inner_rows, inner_columns = np.divmod(quadtree_order(PATCHES_PER_TOKEN_SIDE), PATCHES_PER_TOKEN_SIDE)
    side = grid_size * PATCHES_PER_TOKEN_SIDE
    own_rows = PATCHES_PER_TOKEN_SIDE * rows + inner_rows
    patches: np.ndarray[Any, np.dtype[np.int64]] = own_rows * side + PATCHES_PER_TOKEN_SIDE * columns + inner_columns
    return patches


def _initialise(module: nn.Module) -> None:
    """As the authors: Xavier for linear maps, deviation sqrt(2 / fan-out) for convolutions, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
