"""MAE, the masked autoencoder on pixels (He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from baselines._masked_pixels import MaskedPixelMethod, PixelStatsName
from lmd_bench.errors import WeightsError
from lmd_bench.lmd.mask_schedule import check_leaves_tokens, num_kept
from lmd_bench.method import DataSpec, MethodConfig, StepOutput
from lmd_bench.nn.classifier import ImageClassifier, MaskedAutoencoderClassifier, Pool
from lmd_bench.nn.config import AutoencoderConfig, sizes_of
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.nn.masking import pixel_mask, random_ids, token_mask
from lmd_bench.nn.official import load_exactly, reading_sizes, shape_of_checkpoint

MAESize = Literal["base", "large", "huge"]
_SIZES: dict[MAESize, dict[str, int]] = {
    "base": {"patch_size": 16, "encoder_width": 768, "encoder_depth": 12, "encoder_heads": 12},
    "large": {"patch_size": 16, "encoder_width": 1024, "encoder_depth": 24, "encoder_heads": 16},
    "huge": {"patch_size": 14, "encoder_width": 1280, "encoder_depth": 32, "encoder_heads": 16},
}
"""The published encoders (He et al. 2021, sec. 4); all have the same decoder."""


class MAEConfig(AutoencoderConfig):
    """Options of MAE; the defaults are ViT-B/16 as published, but for plain targets."""

    size: MAESize | None = "base"
    """One of the published encoders, ViT-B/16, ViT-L/16 or ViT-H/14. Sizes that are given themselves win. None: those
    that are given make an encoder of their own, as an imported checkpoint's may be."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a token, px."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of tokens hidden; int(L * (1 - mask_ratio)) stay visible."""
    pixel_stats: PixelStatsName = "imagenet"
    """Mean and deviation that pixels are normalised by: ImageNet's, or 0.5 and 0.5 (to [-1, 1])."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The sizes of the published encoder."""
        size = values.get("size", "base") if isinstance(values, dict) else None
        return {**_SIZES[size], **values} if isinstance(size, str) and size in _SIZES else values


class MAE(MaskedPixelMethod):
    """Masked autoencoder: a ViT encoder on the visible quarter of the patches, a small decoder for the rest."""

    Config: ClassVar[type[MethodConfig]] = MAEConfig
    config: MAEConfig

    def __init__(self, config: MAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.model = MaskedAutoencoder(
            config.shape(data.image_size, in_channels=3), normalize_targets=config.normalize_targets
        )
        self.num_units = self.model.shape.num_tokens
        self.num_visible = num_kept(self.num_units, config.mask_ratio)

    @classmethod
    def check(cls, config: MAEConfig, data: DataSpec) -> None:
        """Raise ConfigError unless the patch size cuts the images and the mask ratio leaves a patch visible."""
        config.check_patch(data.image_size, "images")
        check_leaves_tokens((data.image_size // config.patch_size) ** 2, config.mask_ratio, "mask_ratio")

    @classmethod
    def token_px(cls, config: MAEConfig, data: DataSpec) -> int:
        """A token is a patch."""
        return config.patch_size

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Loss on images (B, 3, S, S) in [0, 1] under a fresh random mask."""
        ids = random_ids(len(inputs), self.num_units, inputs.device)
        loss = self.model(self.pixels.normalize(inputs), ids, self.num_visible)
        return self.step_output(loss, step, total_steps)

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """Visible patches, the class token not counted."""
        return self.num_visible

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch that touches a hidden unit; the others are returned as they came."""
        self.refuse_normalized_targets()
        size = self.data.image_size
        hidden = token_mask(pixel_mask(mask, size), self.config.patch_size)
        completed = self.model.complete(self.pixels.normalize(images), hidden)
        return self.pixels.to_images(completed)

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """The encoder, which it shares, with a fresh head, as in MAE's fine-tuning."""
        return MaskedAutoencoderClassifier(self.model, self.pixels, num_classes, pool, drop_path)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> MAE:
        """MAE with the weights of an authors' pre-training checkpoint (its "model" entry).

        Sizes are read off the tensors. `options` are those of `MAEConfig`; `encoder_heads` and `decoder_heads` cannot
        be read off: left out, they are those of the published models of these widths. Raises WeightsError for other
        widths, for a `size` that is not the encoder's, and naming keys that do not fit.
        """
        shape = shape_of_checkpoint(state_dict, **{name: options.get(name) for name in _HEADS})
        sizes, size = sizes_of(shape), _published_size(shape)
        if options.get("size") not in (None, size):
            raise WeightsError(
                f"checkpoint: size: its encoder is not {options['size']}, but {shape.encoder_width} wide with "
                f"{shape.encoder_depth} blocks and {shape.encoder_heads} heads on patches of {shape.patch_size} px; "
                "leave size out"
            )
        with reading_sizes():
            method = cls(MAEConfig(**{**sizes, "size": size, **options}), DataSpec(shape.input_size))
        load_exactly(method.model, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout; `from_official` of them is this model bit for bit."""
        return dict(self.model.state_dict())


_HEADS = ("encoder_heads", "decoder_heads")


def _published_size(shape: MaskedAutoencoderShape) -> MAESize | None:
    """Which published encoder has all of these sizes, None where none has."""
    names = (name for name, sizes in _SIZES.items() if all(getattr(shape, key) == sizes[key] for key in sizes))
    return next(names, None)
