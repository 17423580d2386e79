"""Any diffusers VQModel (VQGAN) in a local folder: LMD's projector as its paper describes it."""

from __future__ import annotations

from diffusers import VQModel
from torch import Tensor

from lmd_bench.projector.base import NetworkProjector
from lmd_bench.projector.losses import quantise


class VQProjector(NetworkProjector):
    """VQModel on images in [-1, 1]; latents lie behind `quant_conv`, before the codebook, times `scale`.

    LMD works on the continuous latents and hands its own to the decoder as they are (eq. 1); latent diffusion
    quantises before decoding. `decode(quantize=...)` chooses.
    """

    model_class = VQModel
    model: VQModel

    def __init__(self, model: VQModel, *, name: str, scale: float = 1.0) -> None:
        factor = 2 ** (len(model.config["block_out_channels"]) - 1)
        channels = model.quantize.embedding.weight.shape[1]
        super().__init__(model, name=name, factor=factor, latent_channels=channels, scale=scale)

    @property
    def codebook(self) -> Tensor:
        """Codebook vectors float32 (K, latent_channels), in the units of `encode`'s latents."""
        weight: Tensor = self.model.quantize.embedding.weight
        return weight.float() * self.scale

    def _to_latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(pixels).latents
        return latents

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        # Here and in float32, not by the network's own layer, which would look for neighbours in its number format
        # and hold the distances of all positions to all vectors at once.
        return super()._decode(quantise(latents, self.codebook).latents if quantize else latents, quantize=False)

    def _to_pixels(self, latents: Tensor) -> Tensor:
        # Not `model.decode`: with `lookup_from_codebook` in its config.json it takes latents for indices.
        inner = self.model.post_quant_conv(latents)
        pixels: Tensor = self.model.decoder(inner, latents if self.model.config["norm_type"] == "spatial" else None)
        return pixels
