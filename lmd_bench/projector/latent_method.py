"""What methods on latents of a frozen projector have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmd_bench.errors import WeightsError
from lmd_bench.method import Batch, Method
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, weights_digest
from lmd_bench.projector.pixels import PixelProjector


class LatentMethod(Method):
    """A method that learns on latents (B, C, S/f, S/f); its options have a `projector`, it sets `projector` itself.

    Without projection (`kind: pixels`) there is no leak, no round trip and no name.
    """

    config: Any
    projector: LatentProjector

    @classmethod
    def inputs_digest(cls, config: Any) -> str | None:
        """The projector's: its weights lie in a folder of their own. None in pixel space."""
        return None if config.projector.kind == "pixels" else weights_digest(config.projector)

    def prepare(self, batch: Batch) -> Any:
        """Latents (B, C, S/f, S/f) of the images."""
        return self.projector.encode(batch.images)

    @classmethod
    def latent_cache(cls, config: Any) -> ProjectorConfig | None:
        """The projector, where it is told to read a cache."""
        projector: ProjectorConfig = config.projector
        return projector if projector.cache is not None else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, S/f, S/f)."""
        side = self.data.image_size // self.projector.factor
        return (self.projector.latent_channels, side, side)

    @property
    def cached_shape(self) -> tuple[int, ...] | None:
        """`latent_shape`, None where every step encodes."""
        return None if self.config.projector.cache is None else self.latent_shape

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of latents, as this method decodes them; default: as they are."""
        return self.projector.decode(latents)

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> Tensor | None:
        """Images encoded and decoded; None in pixel space."""
        return None if self.projector_name is None else self.decode(self.projector.encode(images))

    @property
    def projector_name(self) -> str | None:
        """Name of the projector, None in pixel space."""
        return None if isinstance(self.projector, PixelProjector) else self.projector.name


class NoProjector(LatentProjector):
    """Stands where a checkpoint was loaded without its projector: the method trains on latents that are given."""

    def __init__(self, latent_channels: int, factor: int) -> None:
        super().__init__(name="none", factor=factor, latent_channels=latent_channels)

    def _encode(self, images: Tensor) -> Tensor:
        raise WeightsError("loaded without a projector: give from_official one to encode images")

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        raise WeightsError("loaded without a projector: give from_official one to decode latents")
