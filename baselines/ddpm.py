"""DDPM, denoising diffusion on pixels (Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

from typing import ClassVar, Literal

from baselines._ddim_layout import PortedUNetMethod
from baselines._diffusion import DiffusionConfig
from baselines._gaussian import AncestralSampler, GaussianDiffusion, evenly_spaced, noise_schedule
from lmd_bench.method import DataSpec, MethodConfig


class DDPMConfig(DiffusionConfig):
    """Options of DDPM; the defaults are the LSUN 256 x 256 model, 113,673,219 parameters.

    The published code is for TensorFlow; the U-Net is that of its port, github.com/ermongroup/ddim.
    """

    noise_schedule: Literal["linear"] = "linear"
    """Betas evenly spaced from 1e-4 to 0.02."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Variance of the reverse steps: the posterior's, or beta."""


class DDPM(PortedUNetMethod):
    """A U-Net that predicts the noise in an image, walked back by draws from the reverse steps' Gaussians.

    Fewer than T steps are spaced evenly from T - 1 to 0 and use the respaced process (iDDPM, section 4), the estimate
    of the clean image cut to [-1, 1] in each.
    """

    Config: ClassVar[type[MethodConfig]] = DDPMConfig
    config: DDPMConfig

    def __init__(self, config: DDPMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.diffusion = GaussianDiffusion(noise_schedule(config.noise_schedule, config.num_train_timesteps))
        self.sampler = AncestralSampler(
            self.diffusion.alphas_cumprod,
            evenly_spaced(config.num_train_timesteps, config.num_inference_steps),
            variance=config.variance,
        )
