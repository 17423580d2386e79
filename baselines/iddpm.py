"""iDDPM, diffusion with learned variances (Nichol and Dhariwal 2021, arXiv 2102.09672), and DDPM as its code has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from baselines._diffusion import DiffusionConfig, DiffusionMethod
from baselines._gaussian import (
    AncestralSampler,
    DDIMSampler,
    GaussianDiffusion,
    LossSecondMoment,
    Sampler,
    Variance,
    evenly_spaced,
    noise_schedule,
    strided,
)
from baselines._openai_layout import OpenAISizes, load_openai, sizes_from_openai, to_openai
from baselines._unet import build_unet
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec, MethodConfig
from lmd_bench.nn.official import reading_sizes

_LSUN: dict[str, Any] = {"image_size": 256, "num_heads": 1}
_SMALL: dict[str, Any] = {
    "num_heads": 4,
    "num_train_timesteps": 4000,
    "noise_schedule": "cosine",
    "loss": "rescaled_hybrid",
    "rescale_timesteps": True,
}
_PUBLISHED: dict[tuple[int, ...], dict[str, Any]] = {
    (128, 128, 256, 256, 512, 512): _LSUN,
    (128, 256, 384, 512): {**_SMALL, "image_size": 64},
    (128, 256, 256, 256): {**_SMALL, "image_size": 32, "dropout": 0.3},
}
"""What the weights of a released model do not tell, by its channels: LSUN bedrooms, ImageNet 64, CIFAR-10."""


class IDDPMConfig(DiffusionConfig):
    """Options of iDDPM; the defaults are the LSUN bedroom 256 x 256 model, 113,676,678 parameters.

    Fixed by the authors' U-Net: group norms of eps 1e-5, stride-2 convolutions padded on all sides, cosine before sine
    in the time embedding, last layers that start at zero.
    """

    use_scale_shift_norm: bool = False
    """Whether the time embedding scales and shifts a residual block's second norm; False: it is added before it."""
    learn_sigma: bool = True
    """Whether the network also predicts the reverse steps' variances. Without it this is the authors' DDPM."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """Variance of the reverse steps where it is not learned: the posterior's, or beta."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    loss: Literal["hybrid", "rescaled_hybrid", "simple", "vlb"] = "hybrid"
    """hybrid: squared error of the noise + the variational bound's term, whose gradient reaches the variance alone.
    rescaled_hybrid: that term times T / 1000. simple: the squared error. vlb: T times the term, for mean and variance.
    Without `learn_sigma` both hybrids are `simple`, as in the authors' code."""
    timestep_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """How training draws timesteps: evenly, or in proportion to the root mean square of each one's last ten losses
    (meant for `vlb`; even until each has ten)."""
    rescale_timesteps: bool = False
    """Whether the network is told t * 1000 / T, so that its embedding means the same for every T."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """How the process is walked back: with the reverse steps' noise over `num_inference_steps` evenly spaced timesteps,
    or without noise over as many at an integer stride."""
    clip_denoised: bool = True
    """Whether a sampler cuts its estimate of x_0 to [-1, 1]."""

    @model_validator(mode="after")
    def _parts_fit(self) -> IDDPMConfig:
        if self.learn_sigma and self.loss == "simple":
            raise ValueError(
                "loss simple trains no variance: give hybrid, rescaled_hybrid or vlb, or learn_sigma false"
            )
        if self.learn_sigma and self.variance != IDDPMConfig.model_fields["variance"].default:
            raise ValueError(f"variance: {self.variance} has no effect where it is learned; give learn_sigma false too")
        if self.sampler == "ddim":
            try:
                strided(self.num_train_timesteps, self.num_inference_steps)
            except ValueError as error:
                raise ValueError(f"num_inference_steps: {error}; give a divisor of num_train_timesteps") from error
        return self


@dataclass(frozen=True)
class LossTerms:
    """The losses of a batch's images, (B,) each."""

    loss: Tensor
    """What is minimised, before any weights of importance sampling."""
    mse: Tensor | None
    """Mean squared error of the predicted noise; None where the loss has no such term."""
    vb: Tensor | None
    """The variational bound's term as it enters the loss, bits per dimension times its factor; None without it."""


@dataclass(frozen=True)
class ReverseStep:
    """A reverse step's Gaussian, p(x_{t-1} | x_t)."""

    mean: Tensor
    """(B, 3, S, S)."""
    variance: Tensor
    """(B, 3, S, S) where it is learned, else (B, 1, 1, 1)."""
    log_variance: Tensor
    """Its logarithm, at t = 0 that of the variance at 1 where the posterior's is meant."""
    clean: Tensor
    """The estimate of x_0 that the mean follows from, (B, 3, S, S)."""


class IDDPM(DiffusionMethod):
    """A U-Net that predicts the noise in an image and how much variance the step back needs, per channel and pixel."""

    Config: ClassVar[type[MethodConfig]] = IDDPMConfig

    def __init__(self, config: IDDPMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.unet = build_unet(
            config,
            image_size=data.image_size,
            out_channels=6 if config.learn_sigma else 3,
            flavour="openai",
            scale_shift=config.use_scale_shift_norm,
        )
        self.diffusion = GaussianDiffusion(noise_schedule(config.noise_schedule, config.num_train_timesteps))
        self.sampler = self._new_sampler()
        self.importance = (
            LossSecondMoment(config.num_train_timesteps) if config.timestep_sampler == "loss-second-moment" else None
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def draw_timesteps(self, num: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Uniform, or by importance with the weights that keep the expected loss what it is."""
        return super().draw_timesteps(num, device) if self.importance is None else self.importance.draw(num)

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network's raw output: the noise (B, 3, S, S), and beside it as many values for the learned variance.

        `timesteps` (B,) int64 count in the process of length T, whatever the network is told.
        """
        if self.config.rescale_timesteps:
            timesteps = timesteps.float() * (1000 / self.config.num_train_timesteps)
        return super().predict(x_t, timesteps)

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
        """() mean of `loss_terms` over the batch; with importance sampling's `weights` its history learns of them."""
        losses = self.loss_terms(output, noise, clean=clean, x_t=x_t, timesteps=timesteps).loss
        if weights is None:
            return losses.mean()
        if self.importance is not None:
            self.importance.update(timesteps, losses)
        return (losses * weights).mean()

    def loss_terms(self, output: Tensor, noise: Tensor, *, clean: Tensor, x_t: Tensor, timesteps: Tensor) -> LossTerms:
        """What the loss of each image is made of, from the network's raw output and all that went into it."""
        output, kind = output.float(), self.config.loss
        if kind == "vlb":
            bound = self._bound(output, clean, x_t, timesteps) * self.config.num_train_timesteps
            return LossTerms(loss=bound, mse=None, vb=bound)
        mse = (output[:, : noise.shape[1]] - noise).square().flatten(1).mean(dim=1)
        if not self.config.learn_sigma:
            return LossTerms(loss=mse, mse=mse, vb=None)
        predicted, values = output.chunk(2, dim=1)
        bound = self._bound(torch.cat([predicted.detach(), values], dim=1), clean, x_t, timesteps)
        if kind == "rescaled_hybrid":
            bound = bound * (self.config.num_train_timesteps / 1000)
        return LossTerms(loss=mse + bound, mse=mse, vb=bound)

    def reverse_step(self, output: Tensor, x_t: Tensor, timesteps: Tensor, *, clip: bool) -> ReverseStep:
        """The Gaussian of x_{t-1} that the network's raw `output` for x_t (B, 3, S, S) means.

        `clip` cuts the estimate of x_0, from which the mean follows, to [-1, 1].
        """
        clean = self.diffusion.predict_clean(x_t, output[:, : x_t.shape[1]], timesteps)
        if clip:
            clean = clean.clamp(-1, 1)
        mean = self.diffusion.posterior(clean, x_t, timesteps)[0]
        if self.config.learn_sigma:
            log_variance = self.diffusion.learned_log_variance(output[:, x_t.shape[1] :], timesteps)
            return ReverseStep(mean, log_variance.exp(), log_variance, clean)
        variance, log_variance = self.diffusion.fixed_variance(self.config.variance, timesteps)
        return ReverseStep(mean, variance, log_variance, clean)

    def _bound(self, output: Tensor, clean: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The variational bound's term, (B,) in bits per dimension. Training does not clip the estimate of x_0."""
        step = self.reverse_step(output, x_t, timesteps, clip=False)
        return self.diffusion.variational_bound(clean, x_t, timesteps, step.mean, step.log_variance)

    # -- the authors' checkpoints -------------------------------------------------------------------------------------

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> Self:
        """The method with the weights of a checkpoint of openai/improved-diffusion, all of whose keys are used.

        Channels, attention, depth and the way time enters are read off the tensors. `options` are those of the
        method's config, and win; with `image_size` (px), `num_heads`, the process and dropout they leave no trace in
        the weights: left out, they are those of the released model of these channels. Raises WeightsError for other
        channels without `image_size` and heads, for a model of class labels, and naming keys that do not fit.
        """
        sizes = sizes_from_openai(state_dict)
        known = {**_released(sizes, options), **options}
        image_size = known.pop("image_size")
        with reading_sizes():
            method = cls(IDDPMConfig(**known), DataSpec(image_size))
        load_openai(method.unet, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The U-Net's weights in the authors' layout and order; `from_official` of them is this model bit for bit.

        The loss histories of importance sampling are no part of the authors' checkpoints.
        """
        return to_openai(self.unet)

    def _new_sampler(self) -> Sampler:
        config, total = self.config, self.config.num_train_timesteps
        if config.sampler == "ddim":
            timesteps = strided(total, config.num_inference_steps)
            return DDIMSampler(self.diffusion.alphas_cumprod, timesteps, clip=config.clip_denoised)
        variance: Variance = "learned" if config.learn_sigma else config.variance
        timesteps = evenly_spaced(total, config.num_inference_steps)
        return AncestralSampler(self.diffusion.alphas_cumprod, timesteps, variance=variance, clip=config.clip_denoised)


def _released(sizes: OpenAISizes, options: Mapping[str, Any]) -> dict[str, Any]:
    """Image size and options of the released model of these sizes, in so far as `options` leave them open.

    Raises WeightsError where no such model says what the weights do not, and where it is no model of colour images.
    """
    if sizes.in_channels != 3 or sizes.out_channels not in (3, 6):
        raise WeightsError(
            f"checkpoint: a U-Net from {sizes.in_channels} to {sizes.out_channels} channels; expected 3 to 3, or to 6 "
            f"with learned variances"
        )
    known = dict(_PUBLISHED.get(sizes.block_out_channels, {}))
    heads = "attention_head_dim" if "attention_head_dim" in options else "num_heads"
    if heads == "attention_head_dim":
        known.pop("num_heads", None)
    missing = [name for name in ("image_size", heads) if name not in known and name not in options]
    if missing:
        raise WeightsError(
            f"checkpoint: no released model has the channels {list(sizes.block_out_channels)}, and weights do not tell "
            f"{' and '.join(missing)}: give {'it' if len(missing) == 1 else 'them'}"
        )
    return {
        **known,
        "block_out_channels": sizes.block_out_channels,
        "attention_levels": sizes.attention_levels,
        "layers_per_block": sizes.layers_per_block,
        "use_scale_shift_norm": sizes.scale_shift,
        "learn_sigma": sizes.out_channels == 6,
    }
