"""Tiny methods with known behaviour, for tests of the harness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput


class TinyConfig(MethodConfig):
    """Options of the tiny method."""

    width: int = 8
    nan_at: int | None = None
    """Step whose loss is not a number."""
    mask_ratio: float = 0.5


class Tiny(Method):
    """Predicts every pixel from the mean of the visible ones, through a small network; random at each step."""

    Config = TinyConfig

    def __init__(self, config: TinyConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.config = config
        self.network = nn.Sequential(nn.Linear(3, config.width), nn.GELU(), nn.Linear(config.width, 3))

    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        means = inputs.mean(dim=(2, 3))
        noise = 0.01 * torch.rand_like(means)
        loss = (self.network(means + noise) - means).square().mean()
        if step == self.config.nan_at:
            loss = loss * float("nan")
        ratio = self.mask_ratio_at(step, total_steps)
        return StepOutput(loss, {"mask_ratio": ratio, "tokens": self.num_tokens_at(step, total_steps)})

    def mask_ratio_at(self, step: int, total_steps: int) -> float:
        return self.config.mask_ratio * step / total_steps

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        return 10 - int(10 * self.mask_ratio_at(step, total_steps))

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        visible = (~mask).repeat_interleave(images.shape[-1] // mask.shape[-1], 1)
        visible = visible.repeat_interleave(images.shape[-1] // mask.shape[-1], 2)[:, None].float()
        means = (images * visible).sum((2, 3)) / visible.sum((2, 3))
        return self.network(means).clamp(0, 1)[:, :, None, None].expand_as(images)


class Collating(Tiny):
    """Has its noise drawn ahead of the step, where a data worker could."""

    def collate(self, samples: list[tuple[Tensor, int | None]], generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.rand(len(samples), 3, generator=generator)}

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, batch.extra["noise"]

    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        images, noise = inputs
        means = images.mean(dim=(2, 3))
        return StepOutput((self.network(means + 0.01 * noise) - means).square().mean())
