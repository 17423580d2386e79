"""Any diffusers AutoencoderKL in a local folder, used as the authors of LMD use Stable Diffusion's."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lmd_bench.errors import WeightsError
from lmd_bench.projector.base import LatentProjector


class KLProjector(LatentProjector):
    """AutoencoderKL on images in [-1, 1]; latents are the posterior's mode, times `scale`.

    scale: 1.0 is the released LMD recipe, which leaves out the 0.18215 of latent diffusion.
    The network runs in the number format its weights have; latents and images are float32 outside.
    """

    def __init__(self, model: AutoencoderKL, *, name: str, scale: float = 1.0) -> None:
        factor = 2 ** (len(model.config["block_out_channels"]) - 1)
        super().__init__(name=name, factor=factor, latent_channels=model.config["latent_channels"])
        # Channels last: convolutions of few channels run up to twice as fast on CPUs, and in bf16 on GPUs.
        self.model = model.to(memory_format=torch.channels_last)
        self.scale = scale
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        pixels = (images * 2.0 - 1.0).to(self.model.dtype, memory_format=torch.channels_last)
        latents: Tensor = self.model.encode(pixels).latent_dist.mode()
        return latents.float() * self.scale

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        scaled = (latents / self.scale).to(self.model.dtype, memory_format=torch.channels_last)
        pixels: Tensor = self.model.decode(scaled).sample
        return pixels.float() * 0.5 + 0.5


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Loads an AutoencoderKL from safetensors in a local folder as `dtype`. Raises WeightsError if that fails."""
    try:
        model, info = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        # OSError and RuntimeError cover what diffusers and torch raise for files that are damaged or of other shapes.
        raise WeightsError(
            f"projector {folder}: cannot be loaded ({_first_line(error)}); save the model again"
        ) from error
    # diffusers only warns where weights are missing, and goes on with random ones.
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise WeightsError(
            f"projector {folder}: weights and config.json are of different models ({len(wrong)} keys differ, first"
            f" {wrong[0]}); save the model again"
        )
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
