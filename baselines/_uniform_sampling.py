"""UM-MAE's masks (Li et al. 2022, arXiv 2205.10063, section 3): uniform sampling, then secondary masking.

A mask is `visible` (B, L) bool over the tokens of a square grid in raster order, True = visible. The grid falls into
cells of 2 x 2 tokens, in raster order too, with the slots top left, top right, bottom left, bottom right = 0 to 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_RATIO = 0.75
"""Share of tokens hidden where one of every 2 x 2 stays visible."""


def draw_uniform(
    batch_size: int, grid_size: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """`visible` (B, L) for a grid of even side: one token of every 2 x 2, the four slots in balance.

    As in the authors' loader, the slots 0 to 3 are dealt in turn until there are at least twice as many as cells,
    shuffled, and the cells take the first: no slot can be drawn for much more than its share.
    """
    num_cells = (grid_size // 2) ** 2
    num_candidates = 4 * -(-num_cells // 2)
    noise = torch.rand(batch_size, num_candidates, device=device, generator=generator)
    return visible_from_slots(noise.argsort(dim=1)[:, :num_cells] % 4)


def draw_random(batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
    """`visible` (B, L) with int(0.75 L) tokens hidden anywhere: the authors' loader without its uniform rule."""
    num_visible = num_tokens - int(MASK_RATIO * num_tokens)
    ids = torch.rand(batch_size, num_tokens, device=device).argsort(dim=1)
    nothing_visible = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    return nothing_visible.scatter(1, ids[:, :num_visible], True)


def visible_from_slots(slots: Tensor) -> Tensor:
    """`visible` (B, 4 n) from the visible slot of each cell, (B, n) int64 with n a square."""
    batch, num_cells = slots.shape
    side = round(num_cells**0.5)
    chosen = slots.unsqueeze(-1) == torch.arange(4, device=slots.device)
    return chosen.view(batch, side, side, 2, 2).transpose(2, 3).reshape(batch, 4 * num_cells)


def one_of_every_cell(visible: Tensor) -> Tensor:
    """(B,) bool: whether a mask (B, L) over a grid of even side leaves exactly one token of every cell visible."""
    side = round(visible.shape[1] ** 0.5) // 2
    per_cell = visible.view(-1, side, 2, side, 2).sum(dim=(2, 4))
    return (per_cell == 1).flatten(1).all(dim=1)


def visible_first(visible: Tensor) -> Tensor:
    """`ids` (B, L): the visible tokens, then the hidden ones, both in raster order.

    Unlike `ids_from_mask` it never makes the host wait: how many tokens are visible is known from the rule.
    """
    return (~visible).to(torch.uint8).argsort(dim=1, stable=True)


def num_unreplaced(num_visible: int, secondary_ratio: float) -> int:
    """Visible tokens that secondary masking leaves alone: int(n * (1 - r))."""
    return int(num_visible * (1 - secondary_ratio))
