"""What masked autoencoders on pixels share: how pixels are normalised, and what stands in the yardstick's way."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmd_bench.errors import ConfigError
from lmd_bench.method import DataSpec, Method, MethodConfig

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

    def to_images(self, normalized: Tensor) -> Tensor:
        """The inverse, float32, cut to [0, 1]."""
        return (normalized.float() * self.std + self.mean).clamp(0.0, 1.0)


class MaskedPixelMethod(Method):
    """Base of methods that hide a constant share of an image and predict its pixels.

    The config has `pixel_stats` and `mask_ratio`, and `normalize_targets` where targets may be normalised per patch.
    """

    config: Any

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
        """The constant mask ratio."""
        ratio: float = self.config.mask_ratio
        return ratio

    def refuse_normalized_targets(self) -> None:
        """Raise ConfigError where predictions cannot be turned into pixels."""
        if self.yardstick_obstacle(self.config) is not None:
            raise ConfigError("normalize_targets: a model of normalised targets cannot reconstruct pixels")
