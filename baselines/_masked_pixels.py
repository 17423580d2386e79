"""What masked autoencoders on pixels share: how pixels are normalised, and what stands in the yardstick's way."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmd_bench.errors import ConfigError
from lmd_bench.method import DataSpec, Method, MethodConfig, StepOutput

PixelStatsName = Literal["imagenet", "half"]
_PIXEL_STATS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class PixelStats(nn.Module):
    """Mean and deviation that pixels are normalised by: ImageNet's, or 0.5 and 0.5 (to [-1, 1]). Nothing to save."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: PixelStatsName) -> None:
        super().__init__()
        for part, values in zip(("mean", "std"), _PIXEL_STATS[name], strict=True):
            self.register_buffer(part, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to zero mean and unit deviation over the statistics."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """`normalize`, so that the statistics can be a part of a larger module."""
        return self.normalize(images)

    def to_images(self, normalized: Tensor) -> Tensor:
        """The inverse, float32, cut to [0, 1]."""
        return (normalized.float() * self.std + self.mean).clamp(0.0, 1.0)


class MaskedPixelMethod(Method):
    """Base of methods that hide a constant share of an image and predict its pixels.

    The config has `pixel_stats`, and `normalize_targets` where targets may be normalised per patch. A subclass says in
    its constructor how many of how many tokens, or larger units, a training mask leaves visible.
    """

    config: Any
    num_units: int
    """What a training mask hides or leaves visible as a whole: a token, or several."""
    num_visible: int
    """Those of them that every training mask leaves visible."""

    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.check(config, data)
        self.config = config
        self.pixels = PixelStats(self.config.pixel_stats)

    @classmethod
    def yardstick_obstacle(cls, config: Any) -> str | None:
        """Normalised targets cannot be turned back into pixels without the hidden patch's own statistics."""
        return "normalised targets" if getattr(config, "normalize_targets", False) else None

    def mask_ratio_at(self, step: int, total_steps: int) -> float:
        """The share that every training mask hides: the option's, rounded to whole units."""
        return (self.num_units - self.num_visible) / self.num_units

    @abstractmethod
    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """Length of the encoder's input, the same at every step."""

    def step_output(self, loss: Tensor, step: int, total_steps: int) -> StepOutput:
        """A step's loss with its figures for the record."""
        ratio, tokens = self.mask_ratio_at(step, total_steps), self.num_tokens_at(step, total_steps)
        return StepOutput(loss, {"mask_ratio": ratio, "tokens": float(tokens)})

    def refuse_normalized_targets(self) -> None:
        """Raise ConfigError where predictions cannot be turned into pixels."""
        if self.yardstick_obstacle(self.config) is not None:
            raise ConfigError("normalize_targets: a model of normalised targets cannot reconstruct pixels")
