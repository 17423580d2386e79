"""Any diffusers AutoencoderTiny (TAESD and its kin) in a local folder."""

from __future__ import annotations

from diffusers import AutoencoderTiny
from torch import Tensor

from lmd_bench.projector.base import NetworkProjector


class TinyProjector(NetworkProjector):
    """AutoencoderTiny on images in [-1, 1]; latents as the encoder gives them, times `scale`.

    The class itself goes to the [0, 1] that TAESD was trained on and back, and its decoder squashes latents by
    3 tanh(z / 3). TAESD was distilled from Stable Diffusion's latents after their 0.18215, so its latents are near
    unit scale where those of a `kl` projector at scale 1 are not. The 8-bit rounding of latents in the class's
    `forward` is no part of encode and decode.
    """

    model_class = AutoencoderTiny
    model: AutoencoderTiny

    def __init__(self, model: AutoencoderTiny, *, name: str, scale: float = 1.0) -> None:
        factor = 2 ** (len(model.config["num_encoder_blocks"]) - 1)
        super().__init__(model, name=name, factor=factor, latent_channels=model.config["latent_channels"], scale=scale)

    def _to_latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(pixels).latents
        return latents

    def _to_pixels(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.model.decode(latents).sample
        return pixels
