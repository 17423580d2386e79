"""What diffusion methods share: the training step's skeleton, sampling, and filling hidden parts of images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._gaussian import GaussianDiffusion, Sampler
from baselines._unet import UNetOptions
from lmd_bench.method import DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.masking import pixel_mask

_LINEAR_NEEDS_MORE_THAN = 20
"""Timesteps: the last of the linear betas is 20 / T."""


class DiffusionConfig(UNetOptions):
    """Options of every diffusion method: the U-Net's, and how long the process is."""

    num_train_timesteps: int = Field(default=1000, ge=2)
    """T, the length of the diffusion."""
    noise_schedule: Literal["linear", "cosine", "scaled_linear"] = "linear"
    """How the noise grows along it (`_gaussian.noise_schedule`); a method narrows the choice to its own."""
    num_inference_steps: int = Field(default=50, ge=2)
    """Reverse steps when reconstructing or sampling; T at most. A single one would begin at timestep 0 in the authors'
    spacings, where noise is taken for an almost clean image."""

    @model_validator(mode="after")
    def _betas_fit(self) -> DiffusionConfig:
        if self.noise_schedule == "linear" and self.num_train_timesteps <= _LINEAR_NEEDS_MORE_THAN:
            raise ValueError(
                f"num_train_timesteps: {self.num_train_timesteps} gives linear betas up to "
                f"{20 / self.num_train_timesteps:g}, not below 1; use more than {_LINEAR_NEEDS_MORE_THAN}"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> DiffusionConfig:
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be at most num_train_timesteps {self.num_train_timesteps}, "
                f"got {self.num_inference_steps}"
            )
        return self


class DiffusionMethod(Method):
    """A network that predicts the noise in an image, at a noise level drawn anew for every image of a batch.

    A subclass makes `unet`, `diffusion` (the trained process) and `sampler` (how it is walked back) in `__init__`.
    Methods in a latent space override `clean_inputs`, `known_part`, `to_images` and `space_shape`.
    """

    config: Any
    unet: UNet2DModel
    diffusion: GaussianDiffusion
    sampler: Sampler

    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.check(config, data)
        self.config = config

    @classmethod
    def check(cls, config: Any, data: DataSpec) -> None:
        """Raise ConfigError unless the images can be halved as often as there are levels."""
        config.check_side(data.image_size, "image size")

    # -- what methods differ in -----------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network's raw output for x_t (B, C, h, w) at `timesteps` (B,) int64: the noise, and what is beyond."""
        output: Tensor = self.unet(x_t, timesteps, return_dict=False)[0]
        return output

    def loss(
        self,
        output: Tensor,
        noise: Tensor,
        *,
        clean: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The scalar loss of one step from the network's raw output and all that went into it.

        `weights` (B,) are those of the images' losses, as `draw_timesteps` gave them. Default: the mean squared error
        of the predicted noise (DDPM, eq. 14).
        """
        if weights is None:
            return F.mse_loss(output, noise)
        return (F.mse_loss(output, noise, reduction="none").flatten(1).mean(dim=1) * weights).mean()

    def draw_timesteps(self, num: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Timesteps (num,) int64 in [0, T), and the weights (num,) that their losses get, None where all are 1.

        Default: uniform and independent.
        """
        return torch.randint(self.diffusion.num_timesteps, (num,), device=device), None

    def clean_inputs(self, inputs: Tensor) -> Tensor:
        """x_0 from what `prepare` returned; default: images (B, 3, S, S) in [0, 1] to [-1, 1]."""
        return self.to_space(inputs)

    def to_space(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to the space the process runs in; default: pixels in [-1, 1]."""
        return images * 2 - 1

    def to_images(self, x: Tensor) -> Tensor:
        """The inverse of `to_space`, float32, cut to [0, 1]."""
        return (x.float() / 2 + 0.5).clamp(0.0, 1.0)

    def known_part(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is known of images whose `hidden` (B, 1, S, S) bool pixels are not, and where it is not known.

        Both in the space of the process: x_0 (B, C, h, w), independent of hidden pixels, and (B, 1, h, w) bool.
        """
        return self.to_space(images).masked_fill(hidden, 0.0), hidden

    @property
    def space_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the space the process runs in; default: that of the images."""
        return (3, self.data.image_size, self.data.image_size)

    # -- what they share ------------------------------------------------------------------------------------------

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Loss at one random timestep per image. Draws the noise first, the timesteps second."""
        clean = self.clean_inputs(inputs)
        noise = torch.randn_like(clean)
        timesteps, weights = self.draw_timesteps(len(clean), clean.device)
        x_t = self.diffusion.q_sample(clean, noise, timesteps)
        output = self.predict(x_t, timesteps)
        loss = self.loss(output, noise, clean=clean, x_t=x_t, timesteps=timesteps, weights=weights)
        return StepOutput(loss)

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Always: the authors of all four decay biases and norms too, where they decay anything."""
        return True

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Denoise the hidden parts while the visible ones are set, at every step, to the image at that noise level.

        The conditioning of Lugmayr et al. 2022 (RePaint, eq. 8) without its resampling. Draws from torch's global
        generator (start, then per step the noise of the known part and that of the step): reseed for equal results.
        """
        return self.complete(*self.known_part(images, pixel_mask(mask, self.data.image_size)))

    @torch.no_grad()
    def complete(self, known: Tensor, hidden: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] from what `known_part` returned; see `reconstruct`."""
        x = torch.randn_like(known)
        for index in reversed(range(len(self.sampler))):
            at_level = self.sampler.at_level(index, known, torch.randn_like(known))
            x = self._denoise(torch.where(hidden, x, at_level), index)
        return self.to_images(torch.where(hidden, x, known))

    @torch.no_grad()
    def sample(self, num_images: int) -> Tensor:
        """Generate (num_images, 3, S, S) images in [0, 1] from noise, walking the sampler once."""
        x = torch.randn(num_images, *self.space_shape, device=self.diffusion.signal.device)
        for index in reversed(range(len(self.sampler))):
            x = self._denoise(x, index)
        return self.to_images(x)

    @property
    def num_function_evaluations(self) -> int:
        """One pass of the network per step of the sampler."""
        return len(self.sampler)

    def _denoise(self, x: Tensor, index: int) -> Tensor:
        """x after step `index` of the sampler, float32 whatever precision the network ran in."""
        timesteps = torch.full((len(x),), self.sampler.timesteps[index], device=x.device, dtype=torch.int64)
        output = self.predict(x, timesteps).float()
        return self.sampler.step(index, x, output, torch.randn_like(x) if self.sampler.adds_noise(index) else None)


def steps_text(steps: int, asked: int) -> str | None:
    """The true number of reverse steps of a spacing, for the plan; None where it is the one `asked` for."""
    return None if steps == asked else f"{steps} reverse steps for num_inference_steps {asked}, as the authors count"
