"""DDIM, denoising diffusion implicit models (Song et al. 2020, arXiv 2010.02502), as in github.com/ermongroup/ddim."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from baselines._ddim_layout import PortedUNetMethod
from baselines._diffusion import DiffusionConfig, steps_text
from baselines._gaussian import (
    AncestralSampler,
    DDIMSampler,
    GaussianDiffusion,
    Sampler,
    ddim_quadratic,
    ddim_uniform,
    noise_schedule,
)
from lmd_bench.method import DataSpec, MethodConfig

_SPACINGS = {"uniform": ddim_uniform, "quadratic": ddim_quadratic}


class DDIMConfig(DiffusionConfig):
    """Options of DDIM; the defaults are the LSUN bedroom model of 256 x 256, 113,673,219 parameters.

    That of CIFAR-10, 35,746,307 parameters: `block_out_channels` 128, 256, 256, 256, `attention_levels` 1, `dropout`
    0.1.
    """

    noise_schedule: Literal["linear"] = "linear"
    """Betas evenly spaced from 1e-4 to 0.02, in float32 as in the authors' code."""
    loss_reduction: Literal["mean", "sum"] = "sum"
    """How the squared errors of an image become its loss; "sum" as published, which counts where gradients are
    clipped."""
    sampler: Literal["generalized", "ddpm_noisy"] = "generalized"
    """DDIM's own, or DDPM's over the same timesteps with the variance beta and clean estimates cut to [-1, 1]."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Noise of the generalized sampler: 0 deterministic, 1 as DDPM's."""
    spacing: Literal["uniform", "quadratic"] = "uniform"
    """Which timesteps `num_inference_steps` visits: every (T // n)-th, which are more than n where n does not divide T,
    or squares of evenly spaced numbers up to 0.8 T."""

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> DDIMConfig:
        if self.sampler == "ddpm_noisy" and self.eta:
            raise ValueError(
                f"eta: {self.eta:g} is noise of the generalized sampler, ddpm_noisy has its own; leave one of them out"
            )
        return self


class DDIM(PortedUNetMethod):
    """A U-Net trained as DDPM's, on antithetic timesteps, and sampled without the Markov chain."""

    Config: ClassVar[type[MethodConfig]] = DDIMConfig
    config: DDIMConfig

    def __init__(self, config: DDIMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        betas = noise_schedule(config.noise_schedule, config.num_train_timesteps)
        self.diffusion = GaussianDiffusion(betas, precision="float32")
        self.sampler = self._make_sampler()

    @classmethod
    def plan_text(cls, config: DDIMConfig, data: DataSpec) -> str | None:
        """The true number of reverse steps where it is not the one asked for."""
        steps = len(_SPACINGS[config.spacing](config.num_train_timesteps, config.num_inference_steps))
        return steps_text(steps, config.num_inference_steps)

    def draw_timesteps(self, num: int, device: torch.device) -> tuple[Tensor, None]:
        """Antithetic: num // 2 + 1 are drawn, their mirror images in 0..T-1 follow, and `num` of them are kept."""
        last = self.diffusion.num_timesteps - 1
        drawn = torch.randint(last + 1, (num // 2 + 1,), device=device)
        return torch.cat([drawn, last - drawn])[:num], None

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
        """Squared error of the predicted noise, summed or averaged over an image, and averaged over the batch."""
        mean = super().loss(output, noise, clean=clean, x_t=x_t, timesteps=timesteps, weights=weights)
        return mean if self.config.loss_reduction == "mean" else mean * noise[0].numel()

    def _make_sampler(self) -> Sampler:
        config, alphas = self.config, self.diffusion.alphas_cumprod
        timesteps = _SPACINGS[config.spacing](config.num_train_timesteps, config.num_inference_steps)
        if config.sampler == "ddpm_noisy":
            return AncestralSampler(alphas, timesteps, variance="fixed_large")
        return DDIMSampler(alphas, timesteps, eta=config.eta)
