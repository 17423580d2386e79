"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): whole branches are left out for some samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Adds a branch to the stream, or drops it for a sample at a rate and scales the others up (timm's DropPath)."""

    def __init__(self, rate: float) -> None:
        """`rate` in [0, 1); 0 adds every branch as it is."""
        super().__init__()
        self.rate = rate

    @property
    def drops(self) -> bool:
        """Whether anything is dropped: in training mode, at a rate above 0."""
        return self.training and self.rate > 0

    def forward(self, x: Tensor, branch: Tensor, gain: Tensor | None = None) -> Tensor:
        """x + branch, or x + gain * branch with a gain that fits: (B, ...)."""
        if self.drops:
            kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate).div_(1 - self.rate)
            gain = kept if gain is None else kept * gain
        return x + branch if gain is None else torch.addcmul(x, gain, branch)


def rising_rates(rate: float, depth: int) -> list[float]:
    """The rate of each of `depth` blocks, from 0 at the first linearly to `rate` at the last."""
    rates: list[float] = torch.linspace(0, rate, depth, device="cpu").tolist()
    return rates


def drop_paths(rate: float, depth: int) -> nn.ModuleList:
    """A `DropPath` for each of `depth` blocks, their rates rising to `rate`."""
    return nn.ModuleList(DropPath(value) for value in rising_rates(rate, depth))


def drop_paths_of_stages(rate: float, depths: list[int]) -> nn.ModuleList:
    """The same for the blocks of stages, a list for each; rates rise over all of them."""
    rates = iter(rising_rates(rate, sum(depths)))
    return nn.ModuleList(nn.ModuleList(DropPath(next(rates)) for _ in range(depth)) for depth in depths)
