"""Any diffusers AutoencoderKL in a local folder, used as the authors of LMD use Stable Diffusion's."""

from __future__ import annotations

from diffusers import AutoencoderKL
from torch import Tensor

from lmd_bench.projector.base import NetworkProjector


class KLProjector(NetworkProjector):
    """AutoencoderKL on images in [-1, 1]; latents are the posterior's mode, times `scale`.

    scale: 1.0 is the released LMD recipe, which leaves out the 0.18215 of latent diffusion.
    """

    model_class = AutoencoderKL
    model: AutoencoderKL

    def __init__(self, model: AutoencoderKL, *, name: str, scale: float = 1.0) -> None:
        factor = 2 ** (len(model.config["block_out_channels"]) - 1)
        super().__init__(model, name=name, factor=factor, latent_channels=model.config["latent_channels"], scale=scale)

    def _to_latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(pixels).latent_dist.mode()
        return latents

    def _to_pixels(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.model.decode(latents).sample
        return pixels
