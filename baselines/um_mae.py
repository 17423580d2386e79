"""UM-MAE, masked autoencoding that pyramids can do too, by uniform masking (Li et al. 2022, arXiv 2205.10063)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._masked_pixels import MaskedPixelMethod, PixelStatsName
from baselines._um_mae_classifier import PyramidClassifier
from baselines._um_mae_pyramid import PyramidAutoencoder
from baselines._um_mae_shape import (
    PATCHES_PER_TOKEN_SIDE,
    PyramidShape,
    check_pyramid,
    pyramid_shape_of_checkpoint,
)
from baselines._um_mae_vit import UMViT
from baselines._uniform_sampling import MASK_RATIO, draw_random, draw_uniform, one_of_every_cell, visible_first
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.lmd.mask_schedule import check_leaves_tokens
from lmd_bench.method import DataSpec, MethodConfig, StepOutput
from lmd_bench.nn.classifier import (
    ImageClassifier,
    MaskedAutoencoderClassifier,
    Pool,
    class_token_obstacle,
    require,
)
from lmd_bench.nn.config import AutoencoderConfig, sizes_of
from lmd_bench.nn.masking import pixel_mask, take_tokens, token_mask
from lmd_bench.nn.official import load_exactly, reading_sizes, refuse_encoder_alone, shape_of_checkpoint
from lmd_bench.nn.patches import normalised, patchify, unpatchify

Backbone = Literal["vit", "pvt", "swin"]
_OF_VIT = ("encoder_width", "encoder_depth", "encoder_heads", "mlp_ratio")
_OF_PYRAMIDS = ("stage_widths", "stage_depths", "stage_heads", "stage_mlp_ratios")
_PUBLISHED: dict[str, Literal["pvt_small", "swin_tiny"]] = {"pvt": "pvt_small", "swin": "swin_tiny"}
_SAMPLING_SEED = 0
"""Of the fixed masks under which a pyramid is measured."""


class UMMAEConfig(AutoencoderConfig):
    """Options of UM-MAE; the defaults are the authors' ViT-B/16 with a decoder of 2 blocks, but for plain targets.

    `encoder_*` and `mlp_ratio` are the ViT's. A pyramid has the sizes of PVT-S or Swin-T unless `stage_*` say
    otherwise. The authors' Swin-L: `backbone` swin, `stage_widths` 192, 384, 768, 1536, `stage_depths` 2, 2, 18, 2,
    `stage_heads` 6, 12, 24, 48, `bias_hidden` 64, `decoder_depth` 8.
    """

    backbone: Backbone = "vit"
    """What encodes: a ViT on the visible tokens, or a pyramid on the compact map of one token of every 2 x 2."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a token, px; a pyramid's own patches are a quarter of it."""
    decoder_depth: int = Field(default=2, ge=1)
    """Blocks of the decoder."""
    mask_ratio: float = Field(default=MASK_RATIO)
    """Share of tokens hidden: one of every 2 x 2 stays visible, so 0.75 and nothing else."""
    regular: bool = True
    """Uniform sampling, one visible token of every 2 x 2; False hides int(0.75 L) tokens anywhere (ViT only)."""
    secondary_ratio: float = Field(default=0.25, gt=0, lt=1)
    """Share of the visible tokens replaced by a learned one; int(n * (1 - ratio)) are left alone."""
    pixel_stats: PixelStatsName = "imagenet"
    """Mean and deviation that pixels are normalised by: ImageNet's, or 0.5 and 0.5 (to [-1, 1])."""
    stage_widths: tuple[int, ...] | None = None
    """Channels of a pyramid's stages; None: the published ones."""
    stage_depths: tuple[int, ...] | None = None
    """Blocks of a pyramid's stages; None: the published ones."""
    stage_heads: tuple[int, ...] | None = None
    """Attention heads of a pyramid's stages; None: the published ones."""
    stage_mlp_ratios: tuple[float, ...] | None = None
    """Hidden widths of the MLPs of a pyramid's stages as multiples of the width; None: the published ones."""
    bias_hidden: int = Field(default=32, ge=1)
    """Hidden width of Swin's MLP for position biases."""
    official_order: bool = False
    """Whether a pyramid's decoder has the release's fault: visible tokens leave the encoder cell by cell, and their
    positions are looked up in raster order. False gives each token its own position. The authors' checkpoints of
    pyramids were trained with it. The ViT has no such fault."""

    @model_validator(mode="after")
    def _consistent(self) -> UMMAEConfig:
        if self.mask_ratio != MASK_RATIO:
            raise ValueError(f"mask_ratio must be 0.75, one visible token of every 2 x 2, got {self.mask_ratio:g}")
        if self.backbone == "vit":
            _refuse(self, (*_OF_PYRAMIDS, "official_order"), "of pvt and swin")
        else:
            _refuse(self, _OF_VIT, "of the vit")
            _refuse(self, ("regular",), "of the vit: a pyramid's compact map needs one visible token of every 2 x 2")
        if self.backbone != "swin":
            _refuse(self, ("bias_hidden",), "of swin")
        return self

    def sizes_text(self) -> str:
        """The network's sizes in words."""
        if self.backbone == "vit":
            return super().sizes_text()
        shape = self.pyramid_shape(image_size=0)
        stages = [f"{name} {list(getattr(shape, f'stage_{name}'))}" for name in ("widths", "depths", "heads")]
        decoder = f"decoder of width {self.decoder_width}, {self.decoder_depth} blocks and {self.decoder_heads} heads"
        order = " in the order of the release" if self.official_order else ""
        return f"{self.backbone} with stages of {', '.join(stages)}, {decoder}{order}"

    def pyramid_shape(self, image_size: int) -> PyramidShape:
        """A pyramid's sizes on images of this side, px; not checked yet."""
        same = (*_OF_PYRAMIDS, "bias_hidden", "secondary_ratio", "decoder_width", "decoder_depth", "decoder_heads")
        given = {name: getattr(self, name) for name in (*same, "official_order")}
        changes = {name: value for name, value in given.items() if value is not None}
        return PyramidShape.published(_PUBLISHED[self.backbone], image_size, token_px=self.patch_size, **changes)


def _refuse(config: UMMAEConfig, names: tuple[str, ...], whose: str) -> None:
    """Raise ValueError for one of these options that is not left at its default."""
    for name in names:
        if getattr(config, name) != UMMAEConfig.model_fields[name].default:
            raise ValueError(f"{name} is an option {whose}; leave it out with backbone {config.backbone}")


class UMMAE(MaskedPixelMethod):
    """Masked autoencoder under uniform masks, some of whose visible tokens are replaced as well.

    Masks are drawn on the device in the step, not in a data worker as in the release: the same distribution.
    """

    Config: ClassVar[type[MethodConfig]] = UMMAEConfig
    config: UMMAEConfig

    def __init__(self, config: UMMAEConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.model: UMViT | PyramidAutoencoder
        if config.backbone == "vit":
            self.model = UMViT(config.shape(data.image_size, in_channels=3), secondary_ratio=config.secondary_ratio)
        else:
            self.model = PyramidAutoencoder(config.pyramid_shape(data.image_size))
        self.grid_size = data.image_size // config.patch_size
        self.num_units = self.grid_size**2
        self.num_visible = self.num_units - int(MASK_RATIO * self.num_units)

    @classmethod
    def check(cls, config: UMMAEConfig, data: DataSpec) -> None:
        """Raise ConfigError unless tokens cut the images, pair up for uniform masks, and leave some unreplaced."""
        config.check_patch(data.image_size, "images")
        grid_size = data.image_size // config.patch_size
        if config.regular and grid_size % 2:
            raise ConfigError(
                f"patch_size: tokens of {config.patch_size} px are {grid_size} x {grid_size} on images of "
                f"{data.image_size} px, and uniform masks need an even number: take images or tokens of another size"
            )
        check_leaves_tokens(grid_size**2 // 4, config.secondary_ratio, "secondary_ratio")
        if config.backbone != "vit":
            check_pyramid(config.pyramid_shape(data.image_size))

    @classmethod
    def token_px(cls, config: UMMAEConfig, data: DataSpec) -> int | None:
        """A ViT's token is a patch; None for pyramids, which are measured under masks of their own."""
        return config.patch_size if config.backbone == "vit" else None

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Loss on images (B, 3, S, S) in [0, 1] under a fresh mask."""
        pixels = self.pixels.normalize(inputs)
        visible = self._draw_visible(len(inputs), inputs.device)
        noise = torch.rand(len(inputs), self.num_visible, device=inputs.device)
        return self.step_output(self.loss(pixels, visible, noise), step, total_steps)

    def loss(self, pixels: Tensor, visible: Tensor, secondary_noise: Tensor) -> Tensor:
        """() mean squared error on the hidden tokens of normalised images (B, 3, S, S).

        `visible` (B, L) bool leaves n tokens visible in every sample; `secondary_noise` (B, n) says which of them are
        replaced. All samples hide the same number, so the plain mean is the published sum(loss * mask) / sum(mask).
        """
        predicted: Tensor = self.model(pixels, visible, secondary_noise)
        ids_hidden = visible_first(visible)[:, secondary_noise.shape[1] :]
        targets = take_tokens(patchify(pixels, self.config.patch_size), ids_hidden)
        return F.mse_loss(predicted, normalised(targets) if self.config.normalize_targets else targets)

    def _draw_visible(self, batch_size: int, device: torch.device) -> Tensor:
        if self.config.regular:
            return draw_uniform(batch_size, self.grid_size, device)
        return draw_random(batch_size, self.grid_size**2, device)

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """What the encoder computes of the visible tokens, replaced ones among them: a ViT the tokens, its class token
        not counted, a pyramid the 4 x 4 patches of each."""
        return self.num_visible * (1 if self.config.backbone == "vit" else PATCHES_PER_TOKEN_SIDE**2)

    # -- the yardstick --------------------------------------------------------------------------------------------

    @property
    def mask_pattern(self) -> str | None:
        """A pyramid's compact map needs one visible token of every 2 x 2; a ViT takes any mask."""
        return None if self.config.backbone == "vit" else f"one of every 2 x 2 tokens of {self.config.patch_size} px"

    def own_masks(self, masks: Tensor) -> Tensor:
        """The yardstick's masks for a ViT; uniform ones over tokens, always the same, for a pyramid."""
        if self.mask_pattern is None:
            return masks
        generator = torch.Generator().manual_seed(_SAMPLING_SEED)
        visible = draw_uniform(len(masks), self.grid_size, torch.device("cpu"), generator)
        return ~visible.view(-1, self.grid_size, self.grid_size).to(masks.device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every token that touches a hidden unit; the others are returned as they came.

        No visible token is replaced. Raises DataError for a mask that a pyramid cannot take.
        """
        self.refuse_normalized_targets()
        pixels = self.pixels.normalize(images)
        hidden = token_mask(pixel_mask(mask, self.data.image_size), self.config.patch_size)
        complete = self.model.complete if isinstance(self.model, UMViT) else self._complete
        return self.pixels.to_images(complete(pixels, hidden))

    def _complete(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        if not bool(one_of_every_cell(~hidden).all()):
            raise DataError(
                f"mask: {self.config.backbone} takes masks that leave one of every 2 x 2 tokens of "
                f"{self.config.patch_size} px visible, and no others: use backbone vit for free masks"
            )
        predicted: Tensor = self.model(pixels, ~hidden, None)
        patches = patchify(pixels, self.config.patch_size)
        ids = visible_first(~hidden)[:, self.num_visible :].unsqueeze(-1).expand_as(predicted)
        return unpatchify(patches.scatter(1, ids, predicted.to(patches.dtype)), self.config.patch_size, 3)

    # -- the encoder and the weights --------------------------------------------------------------------------------

    @classmethod
    def classifier_obstacle(cls, config: UMMAEConfig, pool: Pool = "mean") -> str | None:
        """Pyramids have no class token; the ViT has one."""
        return None if config.backbone == "vit" else class_token_obstacle(pool)

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """The encoder, which it shares, on whole images with a fresh head."""
        require(self.classifier_obstacle(self.config, pool))
        if isinstance(self.model, UMViT):
            return MaskedAutoencoderClassifier(self.model, self.pixels, num_classes, pool, drop_path)
        return PyramidClassifier(self.model, self.pixels, num_classes, drop_path)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> UMMAE:
        """UM-MAE with the weights of an authors' pre-training checkpoint (its "model" entry).

        The backbone is recognised by its keys, sizes are read off the tensors, `options` of `UMMAEConfig` win. Heads
        cannot be read off: left out, they are those of the published models of these widths. `official_order` of a
        pyramid is True if left out, for the authors' were trained so. Raises WeightsError for other widths, for
        checkpoints of another method, and naming keys that do not fit.
        """
        backbone = _backbone_of(state_dict)
        if options.get("backbone", backbone) != backbone:
            raise WeightsError(f"checkpoint: its keys are those of {backbone}, not of {options['backbone']}")
        read_sizes = _vit_sizes if backbone == "vit" else _pyramid_sizes
        sizes, image_size = read_sizes(state_dict, options)
        with reading_sizes():
            method = cls(UMMAEConfig(**{"backbone": backbone, **sizes, **options}), DataSpec(image_size))
        load_exactly(method.model, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout; `from_official` of them, in this `official_order`, is this model bit for
        bit."""
        weights = self.model.state_dict()
        return {"vis_mask_token": weights.pop("vis_mask_token"), **weights}


def _vit_sizes(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A ViT's sizes as options, and the side of its images, from its weights."""
    heads = {name: options.get(name) for name in ("encoder_heads", "decoder_heads")}
    shape = shape_of_checkpoint(state_dict, **heads)
    return sizes_of(shape), shape.input_size


def _pyramid_sizes(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The same for a pyramid."""
    heads = {name: options.get(name) for name in ("stage_heads", "decoder_heads")}
    shape = pyramid_shape_of_checkpoint(state_dict, **heads)
    names = (*_OF_PYRAMIDS, "bias_hidden", "decoder_width", "decoder_depth", "decoder_heads", "official_order")
    return {"patch_size": shape.token_px, **{name: getattr(shape, name) for name in names}}, shape.image_size


def _backbone_of(state_dict: Mapping[str, Tensor]) -> Backbone:
    """Which backbone a checkpoint is of, told by the one key that each has alone. Raises WeightsError for none."""
    refuse_encoder_alone(state_dict, encoder=("blocks.0.",))
    if "vis_mask_token" not in state_dict:
        raise WeightsError("checkpoint: no key vis_mask_token: not a pre-training checkpoint of UM-MAE")
    for key, backbone in _KEY_OF.items():
        if key in state_dict:
            return backbone
    raise WeightsError(f"checkpoint: none of the keys {', '.join(_KEY_OF)}: no backbone of UM-MAE")


_KEY_OF: dict[str, Backbone] = {
    "cls_token": "vit",
    "blocks.0.attn.posmlp.0.weight": "swin",
    "blocks.0.attn.sr.weight": "pvt",
}
