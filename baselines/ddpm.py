"""DDPM, denoising diffusion on pixels (Ho et al. 2020, arXiv 2006.11239), on diffusers' UNet and scheduler."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._gaussian import ForwardProcess
from lmd_bench.errors import ConfigError
from lmd_bench.method import DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.masking import pixel_mask


class DDPMConfig(MethodConfig):
    """Options of DDPM; the defaults are the LSUN 256 x 256 model, 113,673,219 parameters.

    Fixed by the published UNet: group norms of eps 1e-6, stride-2 convolutions padded on one side only, sine before
    cosine in the time embedding (the layout of the port github.com/ermongroup/ddim).
    """

    block_out_channels: tuple[int, ...] = Field(default=(128, 128, 256, 256, 512, 512), min_length=1)
    """Channels of each resolution, finest first; each further one halves the side."""
    attention_levels: tuple[int, ...] = (4,)
    """Resolutions with self-attention, as indices into `block_out_channels`; the middle always has it."""
    attention_head_dim: int | None = Field(default=None, ge=1)
    """Channels per attention head; None: a single head."""
    layers_per_block: int = Field(default=2, ge=1)
    norm_num_groups: int = Field(default=32, ge=1)
    num_train_timesteps: int = Field(default=1000, ge=2)
    """T, the length of the diffusion."""
    beta_schedule: Literal["linear"] = "linear"
    """Betas evenly spaced from 1e-4 to 0.02."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Variance of the reverse steps: the posterior's, or beta."""
    num_inference_steps: int = Field(default=50, ge=1)
    """Reverse steps when reconstructing or sampling, evenly strided over T."""

    @model_validator(mode="after")
    def _consistent(self) -> DDPMConfig:
        for index, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels.{index}: {channels} is not divisible by norm_num_groups")
            if self.attention_head_dim is not None and channels % self.attention_head_dim:
                raise ValueError(f"block_out_channels.{index}: {channels} is not divisible by attention_head_dim")
        levels = len(self.block_out_channels)
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels must be in 0..{levels - 1}, got {list(self.attention_levels)}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be at most num_train_timesteps {self.num_train_timesteps}, "
                f"got {self.num_inference_steps}"
            )
        return self


class DDPM(Method):
    """A UNet that predicts the noise in an image, at a noise level drawn anew for every image of a batch."""

    Config: ClassVar[type[MethodConfig]] = DDPMConfig

    def __init__(self, config: DDPMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.check(config, data)
        self.config = config
        self.unet = _unet(config, data.image_size)
        with torch.device("cpu"):  # the scheduler computes with its tables, wherever the model is being made
            self.scheduler = DDPMScheduler(
                num_train_timesteps=config.num_train_timesteps,
                beta_schedule=config.beta_schedule,
                variance_type=config.variance,
            )
        self.forward_process = ForwardProcess(self.scheduler.alphas_cumprod)

    @classmethod
    def check(cls, config: DDPMConfig, data: DataSpec) -> None:
        """Raise ConfigError unless the images can be halved as often as there are levels."""
        factor = 2 ** (len(config.block_out_channels) - 1)
        if data.image_size % factor:
            raise ConfigError(
                f"block_out_channels: {len(config.block_out_channels)} levels need an image size divisible by "
                f"{factor}, got {data.image_size}"
            )

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Mean squared error of the predicted noise (L_simple), one random timestep per image in [0, 1]."""
        clean = inputs * 2 - 1
        noise = torch.randn_like(clean)
        timesteps = torch.randint(self.config.num_train_timesteps, (len(clean),), device=clean.device)
        predicted = self.unet(self.forward_process(clean, noise, timesteps), timesteps, return_dict=False)[0]
        return StepOutput(F.mse_loss(predicted, noise))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Denoise the hidden pixels while the visible ones are set, at every step, to the image at that noise level.

        The conditioning of Lugmayr et al. 2022 (RePaint, eq. 8) without its resampling. Draws from torch's global
        generator: reseed for equal results.
        """
        hidden = pixel_mask(mask, self.data.image_size)
        known = (images * 2 - 1).masked_fill(hidden, 0.0)
        x = torch.randn_like(known)
        for timestep in self._timesteps():
            level = torch.full((len(x),), timestep, device=x.device, dtype=torch.int64)
            at_level = self.forward_process(known, torch.randn_like(known), level)
            x = self._denoise(torch.where(hidden, x, at_level), timestep)
        return _to_images(torch.where(hidden, x, known))

    @torch.no_grad()
    def sample(self, num_images: int) -> Tensor:
        """Generate (num_images, 3, S, S) images in [0, 1] from noise, in `num_inference_steps` reverse steps."""
        size = self.data.image_size
        x = torch.randn(num_images, 3, size, size, device=self.forward_process.signal.device)
        for timestep in self._timesteps():
            x = self._denoise(x, timestep)
        return _to_images(x)

    @property
    def num_function_evaluations(self) -> int:
        """One pass of the UNet per reverse step."""
        return self.config.num_inference_steps

    def _timesteps(self) -> list[int]:
        self.scheduler.set_timesteps(self.config.num_inference_steps)
        timesteps: list[int] = self.scheduler.timesteps.tolist()
        return timesteps

    def _denoise(self, x: Tensor, timestep: int) -> Tensor:
        """One reverse step, clipped to [-1, 1] where it estimates the clean image."""
        noise = self.unet(x, timestep, return_dict=False)[0]
        previous: Tensor = self.scheduler.step(noise.float(), timestep, x, return_dict=False)[0]
        return previous


def _to_images(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0.0, 1.0)


def _unet(config: DDPMConfig, image_size: int) -> UNet2DModel:
    levels = range(len(config.block_out_channels))
    attends = [level in config.attention_levels for level in levels]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=3,
        out_channels=3,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
