"""Completing a latent map level by level: the masking diffusion run backwards (paper sec. 3.2.3 and fig. 6).

At every level all hidden tokens are predicted from the visible ones, as many as the level calls for are unveiled, and
what was unveiled is as good as given from then on. A masked model that minimises a squared error predicts the mean of
what could stand there and has no probability for it: sampling is deterministic but for the order of unveiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lmd_bench.errors import ConfigError
from lmd_bench.lmd.mask_schedule import num_kept

Complete = Callable[[Tensor, Tensor], Tensor]
"""`(latents (B, C, H, W), hidden (B, L) bool)` -> latents with the hidden tokens predicted; hidden values unread."""

UnveilOrder = Literal["random", "confidence"]
UNVEIL_ORDERS: tuple[UnveilOrder, ...] = get_args(UnveilOrder)


@dataclass(frozen=True)
class Unveiling:
    """How a map of `num_tokens` tokens is completed."""

    num_tokens: int
    fewest_visible: int
    """Visible tokens at the schedule's highest mask ratio: the model has seen none with fewer."""
    most_visible: int
    """Visible tokens at the schedule's lowest mask ratio: from here on everything is unveiled at once."""
    levels: int | None = 1
    """Predictions on the way. 1 is one shot; None is one for every level of the schedule that is left to walk, 29
    from 12 to 41 of 49 tokens (Table 3). More than there are tokens to unveil one by one are cut to that."""
    order: UnveilOrder = "random"
    """`random`: a permutation of each image's own. `confidence`: first the tokens whose prediction changed least
    since the level before. That stability stands in for a probability, which a regression has not. Before the first
    level it is measured against a prediction from half of the visible tokens, at the price of one more evaluation."""

    def __post_init__(self) -> None:
        if self.levels is not None and self.levels < 1:
            raise ConfigError(f"levels: {self.levels}; give at least 1 (one shot)")
        if self.order not in UNVEIL_ORDERS:
            raise ConfigError(f"order: {self.order!r}; use {' or '.join(UNVEIL_ORDERS)}")

    @classmethod
    def of_ratios(
        cls, num_tokens: int, lowest: float, highest: float, levels: int | None, order: UnveilOrder
    ) -> Unveiling:
        """The unveiling that walks back a schedule of mask ratios from `lowest` to `highest`."""
        return cls(num_tokens, num_kept(num_tokens, highest), num_kept(num_tokens, lowest), levels, order)

    def visible_counts(self, num_visible: int) -> list[int]:
        """How many tokens are visible at each prediction, strictly rising from `num_visible`.

        After the last prediction all tokens are unveiled. A map that shows fewer tokens than the schedule's highest
        mask ratio leaves (nothing, for unconditional sampling) spends its first level on getting there.
        """
        if num_visible >= self.num_tokens:
            return []
        if num_visible < self.fewest_visible and self.levels != 1:
            rest = None if self.levels is None else self.levels - 1
            return [num_visible, *self._walk(self.fewest_visible, rest)]
        return self._walk(num_visible, self.levels)

    def _walk(self, start: int, levels: int | None) -> list[int]:
        """`levels` counts spread evenly from `start` up to where the schedule ends, that end left out.

        A map past the schedule's end already is done at once, or walked on to the last token if levels are given.
        """
        end = self.most_visible
        if end <= start:
            end = start + 1 if levels is None else self.num_tokens
        steps = end - start if levels is None else min(levels, end - start)
        return [start + step * (end - start) // steps for step in range(steps)]

    def num_function_evaluations(self, num_visible: int) -> int:
        """Forward passes of the network for a map with `num_visible` visible tokens."""
        predictions = len(self.visible_counts(num_visible))
        return predictions + int(self._compares_halves(num_visible, predictions))

    def _compares_halves(self, num_visible: int, predictions: int) -> bool:
        """Whether the first level needs a prediction to be compared with. From nothing there is no half to take."""
        return self.order == "confidence" and predictions > 1 and num_visible > 0


def unveil(
    complete: Complete, latents: Tensor, hidden: Tensor, unveiling: Unveiling, seeds: Sequence[int] | None = None
) -> Tensor:
    """Latents (B, C, H, W) with the tokens where `hidden` (B, L) bool is True filled in; visible ones stay bit-equal.

    The tokens form a square grid over the map. Samples may hide different numbers of tokens, all of them included.
    What is hidden of `latents` is never read. `seeds` has one number an image, needed for more than one level; what
    becomes of an image depends on it, the image and its mask alone, not on the others of the batch.
    """
    if seeds is not None and len(seeds) != len(latents):
        raise ValueError(f"{len(seeds)} seeds for {len(latents)} images")
    plans = [unveiling.visible_counts(count) for count in (~hidden).sum(dim=1).tolist()]
    longest = max((len(plan) for plan in plans), default=0)
    if longest > 1 and seeds is None:
        raise ValueError("unveiling in several levels needs a seed for each image")
    noise = _noise(seeds or [0] * len(latents), hidden)
    filled, still_hidden = latents.clone(), hidden.clone()
    previous = _half_prediction(complete, latents, hidden, noise, unveiling, plans)
    for level in range(longest):
        rows = torch.tensor([level < len(plan) for plan in plans], device=hidden.device).nonzero().squeeze(1)
        predicted = complete(filled[rows], still_hidden[rows])
        score = _score(unveiling.order, noise[rows], predicted, None if previous is None else previous[rows])
        targets = [plan[level + 1] if level + 1 < len(plan) else hidden.shape[1] for plan in plans if level < len(plan)]
        now_hidden = _hide_all_but(score, still_hidden[rows], targets)
        shown = _as_map(still_hidden[rows] & ~now_hidden, latents)
        filled[rows] = torch.where(shown, predicted.to(filled.dtype), filled[rows])
        still_hidden[rows] = now_hidden
        if unveiling.order == "confidence":
            previous = torch.zeros_like(filled) if previous is None else previous
            previous[rows] = predicted.to(filled.dtype)
    return filled


def _noise(seeds: Sequence[int], hidden: Tensor) -> Tensor:
    """(B, L) in [0, 1), each row from its own seed, drawn on the CPU so that it is the same for every device."""
    rows = [torch.rand(hidden.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(hidden.device) if rows else torch.zeros(hidden.shape, device=hidden.device)


def _half_prediction(
    complete: Complete,
    latents: Tensor,
    hidden: Tensor,
    noise: Tensor,
    unveiling: Unveiling,
    plans: Sequence[Sequence[int]],
) -> Tensor | None:
    """Predictions from a random half of the visible tokens, for the samples whose first level needs them.

    NaN stands where there is nothing to compare with, None where no sample needs it.
    """
    counts = [plan[0] if plan else hidden.shape[1] for plan in plans]
    wanted = [unveiling._compares_halves(count, len(plan)) for count, plan in zip(counts, plans, strict=True)]
    if not any(wanted):
        return None
    rows = torch.tensor(wanted, device=hidden.device).nonzero().squeeze(1)
    halves = [count // 2 for count, want in zip(counts, wanted, strict=True) if want]
    half_hidden = ~_first(noise[rows].masked_fill(hidden[rows], torch.inf), halves)
    predictions = torch.full_like(latents, torch.nan)
    predictions[rows] = complete(latents[rows], half_hidden).to(latents.dtype)
    return predictions


def _score(order: UnveilOrder, noise: Tensor, predicted: Tensor, previous: Tensor | None) -> Tensor:
    """(B, L), low for tokens to be unveiled first: the noise, or the mean squared change since the level before."""
    if order == "random" or previous is None:
        return noise
    grid = round(noise.shape[1] ** 0.5)
    change = torch.nn.functional.adaptive_avg_pool2d((predicted.float() - previous.float()).square(), grid)
    change = change.mean(dim=1).flatten(1)
    return torch.where(change.isnan(), noise, change)


def _hide_all_but(score: Tensor, hidden: Tensor, num_visible: Sequence[int]) -> Tensor:
    """`hidden` (B, L) with so many tokens of the lowest score unveiled that `num_visible` of each row are visible."""
    ranked = score.masked_fill(~hidden, -torch.inf)  # what is visible already comes first and stays
    return ~_first(ranked, num_visible)


def _first(score: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, L) bool: the `counts` entries of lowest score in each row; ties go to the first in raster order."""
    ranks = score.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < torch.tensor(list(counts), device=score.device).unsqueeze(1)


def _as_map(tokens: Tensor, latents: Tensor) -> Tensor:
    """Tokens (B, L) bool as positions (B, 1, H, W) bool of the latent map."""
    grid = round(tokens.shape[1] ** 0.5)
    side = latents.shape[-1] // grid
    square = tokens.view(-1, 1, grid, grid)
    return square.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
