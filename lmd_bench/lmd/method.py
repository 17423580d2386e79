"""LMD as a method of the benchmark: frozen projector, masked latent model, growing mask ratio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.lmd.mask_schedule import MaskScheduleName, mask_ratio, num_kept
from lmd_bench.lmd.model import SUBTRACTED
from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.config import AutoencoderConfig, sizes_of
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask, random_ids, token_mask
from lmd_bench.nn.official import load_exactly, shape_of_checkpoint
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, check_projector
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.pixels import PixelProjector


class LMDConfig(AutoencoderConfig):
    """Options of LMD; the sizes default to ViT-B with a decoder of 512 x 8 (the "discriminant" shape)."""

    projector: ProjectorConfig
    """The frozen latent space projector. `kind: pixels` with `patch_size: 16` is the ablation without one."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a token, in latent positions."""
    mask_schedule: MaskScheduleName = "cosine"
    """How the mask ratio grows; `constant` (at `mask_ratio_end`) is the ablation without a scheduler."""
    mask_ratio_start: float = Field(default=0.15, ge=0, lt=1)
    mask_ratio_mid: float = Field(default=0.40, ge=0, lt=1)
    """Plateau of the piecewise schedule; the others pass it by."""
    mask_ratio_end: float = Field(default=0.75, ge=0, lt=1)
    decoder_pos_sign: int = SUBTRACTED
    """-1 subtracts the decoder's position table (paper and code), +1 adds it as MAE does."""

    @model_validator(mode="after")
    def _ordered(self) -> LMDConfig:
        start, mid, end = self.mask_ratio_start, self.mask_ratio_mid, self.mask_ratio_end
        if not start <= mid <= end:
            raise ValueError(
                f"mask ratios out of order: mask_ratio_start <= mask_ratio_mid <= mask_ratio_end, "
                f"got {start}, {mid}, {end}"
            )
        if self.decoder_pos_sign not in (-1, 1):
            raise ValueError(f"decoder_pos_sign must be -1 or 1, got {self.decoder_pos_sign}")
        return self


class LMD(Method):
    """Masked autoencoder on the latents of a frozen projector, its mask ratio rising over training."""

    Config: ClassVar[type[MethodConfig]] = LMDConfig
    projector: LatentProjector

    def __init__(self, config: LMDConfig, data: DataSpec, *, projector: LatentProjector | None = None) -> None:
        """Open the configured projector, or take the one that is given, and build the model."""
        super().__init__(config, data)
        self.config = config
        opened = open_projector(config.projector) if projector is None else projector
        latent_size = _latent_size(config, data.image_size, opened.factor)
        self.model = MaskedAutoencoder(
            config.shape(latent_size, opened.latent_channels),
            decoder_pos_sign=config.decoder_pos_sign,
            normalize_targets=config.normalize_targets,
        )
        self.projector = opened

    @classmethod
    def check(cls, config: LMDConfig, data: DataSpec) -> None:
        """Raise ConfigError unless projector, patch and image size fit; WeightsError where weights are missing."""
        info = check_projector(config.projector, data.image_size)
        _latent_size(config, data.image_size, info.factor)

    @classmethod
    def token_px(cls, config: LMDConfig, data: DataSpec) -> int:
        """A latent patch stands for patch_size x factor pixels."""
        return config.patch_size * check_projector(config.projector, data.image_size).factor

    @classmethod
    def yardstick_obstacle(cls, config: LMDConfig) -> str | None:
        """A latent predicted up to its patch's own mean and variance cannot be decoded."""
        return "normalised targets" if config.normalize_targets else None

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Tensor:
        """Latents (B, C, S/f, S/f) of the whole images, as published: masking comes after."""
        return self.projector.encode(batch.images)

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Loss on latents under a fresh random mask of this step's ratio, the same for the whole batch."""
        ratio = self.mask_ratio_at(step, total_steps)
        kept = num_kept(self.model.shape.num_tokens, ratio)
        ids = random_ids(len(inputs), self.model.shape.num_tokens, inputs.device)
        return StepOutput(self.model(inputs, ids, kept), {"mask_ratio": ratio, "tokens": float(kept)})

    def mask_ratio_at(self, step: int, total_steps: int) -> float:
        """The scheduler's ratio at a step."""
        config = self.config
        return mask_ratio(
            config.mask_schedule,
            step,
            total_steps,
            start=config.mask_ratio_start,
            mid=config.mask_ratio_mid,
            end=config.mask_ratio_end,
        )

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """Visible tokens, the class token not counted."""
        return num_kept(self.model.shape.num_tokens, self.mask_ratio_at(step, total_steps))

    # -- the yardstick --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every token that touches a hidden unit from latents of images without their hidden pixels.

        A latent sees its neighbours through the projector, so hidden pixels are overwritten by the mean colour of
        the visible ones before encoding.
        """
        hidden = pixel_mask(mask, self.data.image_size)
        return self._complete(fill_with_visible_mean(images, hidden), hidden)

    @torch.no_grad()
    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor | None:
        """The same with latents of the whole images; None in pixel space, where nothing leaks."""
        if self.projector_name is None:
            return None
        return self._complete(images, pixel_mask(mask, self.data.image_size))

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> Tensor | None:
        """Images encoded and decoded; None in pixel space."""
        if self.projector_name is None:
            return None
        return self.projector.decode(self.projector.encode(images))

    def _complete(self, images: Tensor, hidden_pixels: Tensor) -> Tensor:
        if self.config.normalize_targets:
            raise ConfigError("normalize_targets: a model of normalised targets cannot reconstruct pixels")
        tokens = token_mask(hidden_pixels, self.data.image_size // self.model.shape.grid_size)
        latents = self.model.complete(self.projector.encode(images), tokens)
        return self.projector.decode(latents)

    @property
    def projector_name(self) -> str | None:
        """Name of the projector, None in pixel space."""
        return None if isinstance(self.projector, PixelProjector) else self.projector.name

    # -- the authors' checkpoints ------------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        projector: LatentProjector | None = None,
        image_size: int | None = None,
        **options: Any,
    ) -> LMD:
        """LMD with the weights of the authors' pre-training checkpoint (its "model" entry).

        Sizes are read off the tensors; `options` are those of `LMDConfig`, of which `encoder_heads` (default 12) and
        `decoder_heads` (default 16) cannot be read off. The checkpoint holds no projector: give one, or name one in
        `options`. Without either the method takes latents of a factor 8, and encoding images raises WeightsError.
        `image_size` defaults to the latents' side times the projector's factor. Raises WeightsError naming keys that
        do not fit.
        """
        heads = {name: options.get(name, LMDConfig.model_fields[name].default) for name in _HEADS}
        shape = shape_of_checkpoint(state_dict, **heads)
        if projector is None and "projector" not in options:
            projector = _NoProjector(shape.in_channels)
        named = {"projector": ProjectorConfig(kind="pixels"), **sizes_of(shape), **options}
        config = LMDConfig(**named)
        projector = projector or open_projector(config.projector)
        method = cls(config, DataSpec(image_size or shape.input_size * projector.factor), projector=projector)
        load_exactly(method.model, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The masked model's weights in the authors' layout; `from_official` of them is this model bit for bit."""
        return dict(self.model.state_dict())


class _NoProjector(LatentProjector):
    """Stands where a checkpoint was loaded without its projector: the model trains on latents that are given."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__(name="none", factor=8, latent_channels=latent_channels)

    def _encode(self, images: Tensor) -> Tensor:
        raise WeightsError("LMD was loaded without a projector: give from_official one to encode images")

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        raise WeightsError("LMD was loaded without a projector: give from_official one to decode latents")


_HEADS = ("encoder_heads", "decoder_heads")


def _latent_size(config: LMDConfig, image_size: int, factor: int) -> int:
    """Side of the latent map. Raises ConfigError where the projector or the patch do not cut it evenly."""
    if image_size % factor:
        raise ConfigError(
            f"image_size: {image_size} px is not divisible by {factor}, the projector's down-scaling factor"
        )
    config.check_patch(image_size // factor, "latents" if factor > 1 else "images")
    return image_size // factor
