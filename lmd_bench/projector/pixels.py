"""No projection: the latents are the pixels (the ablation "w/o LSP" of LMD's Table 5)."""

from __future__ import annotations

from torch import Tensor

from lmd_bench.projector.base import LatentProjector


class PixelProjector(LatentProjector):
    """Pixels from [0, 1] to [-1, 1], times `scale`, and back: factor 1, 3 channels, no weights."""

    def __init__(self, *, name: str = "pixels", scale: float = 1.0) -> None:
        super().__init__(name=name, factor=1, latent_channels=3)
        self.scale = scale
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        return (images * 2.0 - 1.0) * self.scale

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        return latents / self.scale * 0.5 + 0.5
