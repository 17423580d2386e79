"""Stable Diffusion v1 (Rombach et al. 2021, arXiv 2112.10752) as published, filling the hidden parts of images.

By diffusers' StableDiffusionInpaintPipeline, which takes a plain text-to-image U-Net too: at every step the latents of
the visible part are set to those of the image at that noise level, as in RePaint (arXiv 2201.09865, eq. 8).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from pydantic import Field
from torch import Tensor

from baselines._pipeline_folder import TEXT_ENCODER, PipelineFolder
from baselines._text_to_image import TextToImage, TextToImageConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import DataSpec, MethodConfig

_LATENT_CHANNELS = 4


class StableDiffusionConfig(TextToImageConfig):
    """Options of Stable Diffusion; steps and guidance are the defaults of its release."""

    num_inference_steps: int = Field(default=50, ge=1)
    """Steps of the folder's scheduler; PNDM, which v1.4 comes with, takes one network pass more."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Weight of the caption's prediction against that of an empty one; 1 is without."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of DDIM's sampler; for folders whose scheduler is DDIM."""


class StableDiffusion(TextToImage):
    """A latent U-Net under a caption, from a local folder with safetensors.

    The safety checker is left out: it blackens whole pictures, which would count as bad fillings, and nothing is shown
    to the public here.
    """

    Config: ClassVar[type[MethodConfig]] = StableDiffusionConfig
    config: StableDiffusionConfig
    models: ClassVar[dict[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        TEXT_ENCODER: "CLIPTextModel",
    }
    autoencoder = "vae"
    network = "unet"

    def __init__(self, config: StableDiffusionConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.unet = self.folder.load("unet")
        self.vae = self.folder.load("vae")
        self.vae.enable_slicing()  # one image at a time: large maps, and no picture depends on its batch
        self._scheduler = self.folder.load_scheduler()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of schedulers' values of old, which it puts right
            self._pipeline = diffusers.StableDiffusionInpaintPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.unet,
                scheduler=self._scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        self._pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def check_models(cls, config: Any, folder: PipelineFolder) -> None:
        """A text-to-image U-Net on 4 latent channels, as wide as its text encoder, with a scheduler of that kind."""
        channels = folder.count("unet", "in_channels")
        if channels != _LATENT_CHANNELS:
            kind = "an inpainting model" if channels == 9 else "another model"
            raise WeightsError(
                f"{folder.path}/unet: {channels} input channels: {kind}; give a text-to-image model (4), such as v1.4"
            )
        if folder.count("vae", "latent_channels") != _LATENT_CHANNELS:
            raise WeightsError(f"{folder.path}/vae: not 4 latent channels, as the U-Net has; give the pipeline's own")
        wide, given = folder.count(TEXT_ENCODER, "hidden_size"), folder.config("unet").get("cross_attention_dim")
        if given != wide:
            raise WeightsError(
                f"{folder.path}: the U-Net reads text {given} wide, the text encoder's is {wide}: parts of two models"
            )
        scheduler = folder.scheduler_class()
        if scheduler not in KarrasDiffusionSchedulers.__members__:
            raise WeightsError(f"{folder.path}/scheduler: {scheduler} does not fit; the release's is PNDMScheduler")
        if config.eta and "eta" not in inspect.signature(getattr(diffusers, scheduler).step).parameters:
            raise ConfigError(
                f"eta {config.eta}: {scheduler} has none; leave it 0, or give a folder with DDIMScheduler"
            )

    @classmethod
    def halvings(cls, folder: PipelineFolder) -> int:
        """The U-Net halves the map between its resolutions."""
        return folder.factor("unet")

    @property
    def num_function_evaluations(self) -> int:
        """Passes of the U-Net in one `reconstruct`; with captions each is over a batch twice as large (guidance)."""
        self._scheduler.set_timesteps(self.config.num_inference_steps)
        return len(self._scheduler.timesteps)

    def generator_device(self, images: Tensor) -> torch.device:
        """The CPU: the same noise on every machine."""
        return torch.device("cpu")

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents (B, 4, n, n), scaled: drawn from the posterior as the pipeline does, or its mode."""
        posterior = self.vae.encode(images * 2 - 1).latent_dist
        latents = posterior.mode() if generators is None else posterior.sample(list(generators))
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, N, N) in [0, 1]."""
        images: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0.0, 1.0)

    def paint(
        self, images: Tensor, hidden: Tensor, captions: Sequence[str] | None, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Denoise the hidden latents over all steps of the scheduler."""
        latents = self.encode(images, generators).float()
        # the pipeline reads a mask of pixels, and of each latent position the first pixel
        factor = self.native_size // self.cells
        mask = hidden.unsqueeze(1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        empty = [""] * len(images)
        painted: Tensor = self._pipeline(
            prompt_embeds=self._text(captions or empty),
            negative_prompt_embeds=None if captions is None else self._text(empty),
            image=latents,
            masked_image_latents=latents,  # read by inpainting U-Nets only; given, so that nothing is encoded again
            mask_image=mask.float(),
            height=self.native_size,
            width=self.native_size,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=1.0 if captions is None else self.config.guidance_scale,
            eta=self.config.eta,
            generator=list(generators),
            output_type="pt",
            return_dict=False,
        )[0]
        return painted

    def _text(self, captions: Sequence[str]) -> Tensor:
        """The text encoder's last states (B, L, D)."""
        states: Tensor = self.text_encoder(self.token_ids(captions))[0]
        return states
