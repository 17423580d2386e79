"""GreenMIM, masked image modelling with hierarchical encoders on visible patches only (Huang et al. 2022,
arXiv 2205.13515), with Swin. The release's other encoder, Twins-L, is not built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._group_window import (
    Grouping,
    GroupSwin,
    SwinShape,
    group_stages,
    nested_patches,
    pack_groupings,
    unpack_groupings,
)
from baselines._masked_pixels import MaskedPixelMethod, PixelStatsName
from baselines._relative_position import relative_position_index
from baselines._swin import StagedClassifier, swin_text
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.lmd.mask_schedule import check_leaves_tokens, num_kept
from lmd_bench.method import Batch, DataSpec, MethodConfig, StepOutput
from lmd_bench.nn.classifier import ImageClassifier, Pool, class_token_obstacle, require
from lmd_bench.nn.masking import pixel_mask, token_mask
from lmd_bench.nn.official import (
    DECODER_HEADS,
    count_of,
    heads_of,
    load_exactly,
    reading_sizes,
    refuse_encoder_alone,
    tensor_of,
)
from lmd_bench.nn.patches import normalised, patchify, unpatchify
from lmd_bench.nn.pos_embed import frozen_pos_embed
from lmd_bench.nn.vit import NORM_EPS, Block


class GreenMIMConfig(MethodConfig):
    """Options of GreenMIM; the defaults are Swin-B, window 7, as published, but for plain targets and for the fault of
    the release that `official_order` tells of."""

    patch_size: int = Field(default=4, ge=1)
    """Side of a token of the first stage, px. What is masked are units, the tokens of the last stage:
    patch_size * 2^(stages - 1), 32 px as published."""
    embed_dim: int = Field(default=128, ge=1)
    """Width of the first stage; each further one has twice the width of the one before."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks of each stage. Every second block has its windows shifted by half a window."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    window_size: int = Field(default=7, ge=2)
    """Side of a window, tokens; a stage whose grid is not larger is one window."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs as a multiple of the width."""
    decoder_width: int = Field(default=512, ge=4)
    """Channels of the decoder's tokens, divisible by 4 (position table) and by its heads."""
    decoder_depth: int = Field(default=1, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder; they divide its width."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of units hidden; int(L * (1 - mask_ratio)) of L stay visible, the same ones throughout a batch."""
    normalize_targets: bool = False
    """Predict units normalised by their own mean and variance. Such targets cannot be turned back into pixels."""
    official_order: bool = False
    """Train as the release does, whose decoder receives the visible tokens at each other's places: they come in raster
    order and are laid out in the random order in which the mask was drawn. False lays each where it belongs. The
    authors' checkpoints were trained so."""
    pixel_stats: PixelStatsName = "imagenet"
    """Mean and deviation that pixels are normalised by: ImageNet's, or 0.5 and 0.5 (to [-1, 1])."""

    @model_validator(mode="after")
    def _fitting(self) -> GreenMIMConfig:
        if not self.depths or len(self.depths) != len(self.num_heads) or min(self.depths + self.num_heads) < 1:
            raise ValueError(
                f"depths and num_heads need one positive number for each stage, got {self.depths}, {self.num_heads}"
            )
        for stage, heads in enumerate(self.num_heads):
            if (self.embed_dim << stage) % heads:
                raise ValueError(f"num_heads: {heads} heads do not divide the width {self.embed_dim << stage}")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width must be divisible by 4 (position table) and by decoder_heads, "
                f"got {self.decoder_width}, {self.decoder_heads}"
            )
        return self

    def sizes_text(self) -> str:
        """The network's sizes in words, and the decoder's order where it is the release's."""
        encoder = swin_text(self.embed_dim, self.depths, self.num_heads, self.window_size)
        decoder = f"decoder of width {self.decoder_width}, {self.decoder_depth} blocks and {self.decoder_heads} heads"
        return f"{encoder}, {decoder}{' in the order of the release' if self.official_order else ''}"

    def shape(self, image_size: int) -> SwinShape:
        """The encoder's sizes for square images of this side."""
        return SwinShape(
            image_size,
            self.patch_size,
            self.embed_dim,
            self.depths,
            self.num_heads,
            self.window_size,
            self.mlp_ratio,
        )


@dataclass(frozen=True)
class UnitMask:
    """One mask for a batch, and all that the model needs to know of it."""

    visible: Tensor
    """(n,) int64, the visible units in raster order."""
    hidden: Tensor
    """(L - n,) int64, the others, in raster order."""
    places: Tensor
    """(n,) int64, where the decoder lays the visible units: `visible`, but for `official_order`."""
    groupings: list[tuple[Grouping, ...]]
    """Of each encoder stage."""

    @classmethod
    def of(cls, order: Tensor, num_visible: int, shape: SwinShape, *, official_order: bool = False) -> UnitMask:
        """From a permutation of the units (L,), on the CPU, whose first `num_visible` stay visible."""
        visible, hidden = order[:num_visible].sort().values, order[num_visible:].sort().values
        places = order[:num_visible] if official_order else visible
        return cls(visible, hidden, places, group_stages(visible.numpy(), shape.stages))

    def pack(self) -> dict[str, Tensor]:
        """As named tensors."""
        units = {"visible": self.visible, "hidden": self.hidden, "places": self.places}
        return {**units, **pack_groupings(self.groupings)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], shape: SwinShape) -> UnitMask:
        """The inverse of `pack`."""
        groupings = unpack_groupings(tensors, shape.stages)
        return cls(tensors["visible"], tensors["hidden"], tensors["places"], groupings)

    def to(self, device: torch.device, shape: SwinShape) -> UnitMask:
        """The same on another device."""
        return self.unpack({name: tensor.to(device) for name, tensor in self.pack().items()}, shape)


@dataclass(frozen=True)
class MaskedImages:
    """What a training step gets where a data worker has made the mask."""

    images: Tensor
    """(B, 3, S, S) in [0, 1]."""
    mask: UnitMask
    """Of all of them."""


class GreenMaskedAutoencoder(nn.Module):
    """Swin on the visible units, a ViT decoder of MAE's kind that predicts the hidden ones."""

    def __init__(self, shape: SwinShape, config: GreenMIMConfig) -> None:
        super().__init__()
        self.shape = shape
        self.normalize_targets = config.normalize_targets
        width = config.decoder_width
        self.grid_size = shape.image_size // shape.unit_px
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = frozen_pos_embed(width, self.grid_size, class_row=False)  # there is no class token
        self.encoder = GroupSwin(shape)
        self.decoder_embed = nn.Linear(shape.width, width)
        self.decoder_blocks = nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, 3 * shape.unit_px**2)
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: UnitMask) -> Tensor:
        """() mean squared error on the hidden units of normalised images (B, 3, S, S)."""
        units = patchify(images, self.shape.unit_px)
        predicted = self.decode(self.encode(units.index_select(1, mask.visible), mask), mask)
        hidden = units.index_select(1, mask.hidden)
        return F.mse_loss(predicted, normalised(hidden) if self.normalize_targets else hidden)

    def encode(self, visible: Tensor, mask: UnitMask) -> Tensor:
        """Features (B, n, D) of the visible units (B, n, P)."""
        out: Tensor = self.encoder.norm(self.encoder(visible, mask.groupings))
        return out

    def decode(self, features: Tensor, mask: UnitMask, *, all_units: bool = False) -> Tensor:
        """Predicted hidden units (B, L - n, P) in raster order, from features (B, n, D).

        With `all_units` the visible ones are predicted too and stand first, in the order of `mask.places`: (B, L, P).
        """
        embedded = self.decoder_embed(features)
        num_hidden = len(mask.hidden)
        hidden = self.mask_token.expand(len(embedded), num_hidden, -1)
        x = torch.cat([embedded, hidden], dim=1)
        x = x + self.decoder_pos_embed.index_select(1, torch.cat([mask.places, mask.hidden]))
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, None if all_units else num_hidden)
        out: Tensor = self.decoder_pred(self.decoder_norm(x))
        return out


def _initialise(module: nn.Module) -> None:
    """The release's start, Xavier throughout: it overrides what Swin itself would do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class GreenMIM(MaskedPixelMethod):
    """Masked autoencoder with a Swin encoder that computes visible patches only; one mask for the whole batch."""

    Config: ClassVar[type[MethodConfig]] = GreenMIMConfig
    config: GreenMIMConfig

    def __init__(self, config: GreenMIMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.shape = config.shape(data.image_size)
        self.model = GreenMaskedAutoencoder(self.shape, config)
        self.num_units = self.model.grid_size**2
        self.num_visible = num_kept(self.num_units, config.mask_ratio)

    @classmethod
    def check(cls, config: GreenMIMConfig, data: DataSpec) -> None:
        """Raise ConfigError unless units cut the images, windows the stages, and a unit stays visible."""
        shape = config.shape(data.image_size)
        if data.image_size % shape.unit_px or data.image_size < 2 * shape.unit_px:
            raise ConfigError(
                f"patch_size: with {len(config.depths)} stages a patch of {config.patch_size} px makes masked units of "
                f"{shape.unit_px} px, which do not cut images of {data.image_size} x {data.image_size} in four or "
                f"more; wanted: image_size a multiple of {shape.unit_px}, at least {2 * shape.unit_px}"
            )
        for number, stage in enumerate(shape.stages):
            if stage.grid_size % stage.window:
                raise ConfigError(
                    f"window_size: {config.window_size} does not cut the {stage.grid_size} x {stage.grid_size} tokens "
                    f"of stage {number + 1}; possible: {', '.join(map(str, _fitting_windows(shape)))} or more"
                )
        check_leaves_tokens((data.image_size // shape.unit_px) ** 2, config.mask_ratio, "mask_ratio")

    @classmethod
    def plan_text(cls, config: GreenMIMConfig, data: DataSpec) -> str:
        """The units in a few words, such as "12 of 49 units of 32 px visible, the same ones throughout a batch"."""
        unit = cls.token_px(config, data)
        num_units = (data.image_size // unit) ** 2
        kept = num_kept(num_units, config.mask_ratio)
        return f"{kept} of {num_units} units of {unit} px visible, the same ones throughout a batch"

    @classmethod
    def token_px(cls, config: GreenMIMConfig, data: DataSpec) -> int:
        """What is visible or hidden as a whole: a unit."""
        return config.shape(data.image_size).unit_px

    @classmethod
    def compile_obstacle(cls, config: GreenMIMConfig) -> str:
        """Every mask has groups of other numbers and sizes, which a compiled network would be compiled for anew."""
        return "each mask packs visible tokens into groups of other numbers and sizes"

    # -- training -------------------------------------------------------------------------------------------------

    def collate(self, samples: list[tuple[Tensor, int | None]], generator: torch.Generator) -> Mapping[str, Tensor]:
        """The batch's mask with its groupings: a millisecond or two for Swin-B, once per batch."""
        return self._drawn_mask(generator).pack()

    def _drawn_mask(self, generator: torch.Generator | None = None) -> UnitMask:
        order = torch.rand(self.num_units, generator=generator, device="cpu").argsort()
        return UnitMask.of(order, self.num_visible, self.shape, official_order=self.config.official_order)

    def prepare(self, batch: Batch) -> Tensor | MaskedImages:
        """Images with the mask that `collate` made; images alone where it was not called."""
        return MaskedImages(batch.images, UnitMask.unpack(batch.extra, self.shape)) if batch.extra else batch.images

    def training_step(self, inputs: Tensor | MaskedImages, *, step: int, total_steps: int) -> StepOutput:
        """Loss on images (B, 3, S, S) in [0, 1] under the mask they bring, or under one made now."""
        if isinstance(inputs, Tensor):
            inputs = MaskedImages(inputs, self._drawn_mask().to(inputs.device, self.shape))
        loss = self.model(self.pixels.normalize(inputs.images), inputs.mask)
        return self.step_output(loss, step, total_steps)

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """Visible patches of the first stage."""
        return self.num_visible * (self.shape.unit_px // self.shape.patch_size) ** 2

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Not 1-D tensors, biases, tables of relative positions and the mask token, as in the release."""
        return parameter.ndim > 1 and not any(part in name for part in ("bias", "token"))

    # -- the yardstick and the encoder -----------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every unit that touches a hidden one; the others are returned as they came.

        Images that hide the same units go through the model together, others one after another. Every visible unit is
        laid where it belongs, under `official_order` too: a given mask has no order in which it was drawn.
        """
        self.refuse_normalized_targets()
        size, unit = self.data.image_size, self.shape.unit_px
        masks, which = token_mask(pixel_mask(mask, size), unit).cpu().unique(dim=0, return_inverse=True)
        units = patchify(self.pixels.normalize(images), unit).clone()
        for number, hidden in enumerate(masks):
            if hidden.any():
                rows = (which == number).nonzero().flatten().to(images.device)
                units[rows] = self._completed(units[rows], hidden)
        return self.pixels.to_images(unpatchify(units, unit, 3))

    def _completed(self, units: Tensor, hidden: Tensor) -> Tensor:
        """Units (B, L, P) with those predicted that `hidden` (L,) bool names."""
        order = hidden.to(torch.uint8).argsort(stable=True)
        mask = UnitMask.of(order, int((~hidden).sum()), self.shape).to(units.device, self.shape)
        predicted = self.model.decode(self.model.encode(units.index_select(1, mask.visible), mask), mask)
        return units.index_copy(1, mask.hidden, predicted.to(units.dtype))

    @classmethod
    def classifier_obstacle(cls, config: GreenMIMConfig, pool: Pool = "mean") -> str | None:
        """Swin has no class token."""
        return class_token_obstacle(pool)

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """The encoder, which it shares, as a plain Swin over all patches, with mean pooling and a fresh head."""
        require(self.classifier_obstacle(self.config, pool))
        return GroupSwinClassifier(self.model.encoder, self.pixels, num_classes, drop_path)

    # -- the authors' checkpoints ----------------------------------------------------------------------------------

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> GreenMIM:
        """GreenMIM with the weights of an authors' pre-training checkpoint (its "model" entry).

        Sizes are read off the tensors. `options` are those of `GreenMIMConfig`; `decoder_heads` cannot be read off:
        left out, it is that of the published decoder, 16 at a width of 512. `official_order` is True if left out, for
        the authors' models were trained so: it counts where training goes on, while `reconstruct` lays every unit where
        it belongs either way. `relative_position_index`, a constant of each block that follows from its window, is
        compared and not kept. Raises WeightsError for another layout and for other sizes.
        """
        sizes, image_size = _sizes_of(state_dict, options.get("decoder_heads"))
        with reading_sizes():
            method = cls(GreenMIMConfig(**{"official_order": True, **sizes, **options}), DataSpec(image_size))
        constants = _position_indices(method.shape)
        load_exactly(method.model, {key: value for key, value in state_dict.items() if key not in constants})
        for key, index in constants.items():
            if key in state_dict and not torch.equal(state_dict[key].cpu(), index):
                raise WeightsError(f"checkpoint: {key} is not that of windows of its size: another model's?")
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout; `from_official` of them, in this `official_order`, is this model bit for
        bit."""
        constants = _position_indices(self.shape)
        official: dict[str, Tensor] = {}
        for key, tensor in self.model.state_dict().items():
            official[key] = tensor
            index_key = key.replace("relative_position_bias_table", "relative_position_index")
            if index_key in constants:
                official[index_key] = constants[index_key].to(tensor.device)
        return official


class GroupSwinClassifier(StagedClassifier):
    """The encoder of GreenMIM on whole images."""

    def __init__(self, encoder: GroupSwin, to_map: nn.Module, num_classes: int, drop_path: float) -> None:
        super().__init__(encoder.patch_embed, encoder.layers, encoder.norm, to_map, num_classes, drop_path)
        self.shape = encoder.shape
        num_units = (self.shape.image_size // self.shape.unit_px) ** 2
        for name, tensor in pack_groupings(group_stages(np.arange(num_units), self.shape.stages)).items():
            self.register_buffer(name, tensor.to(encoder.norm.weight.device), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        groupings = unpack_groupings(dict(self.named_buffers(recurse=False)), self.shape.stages)
        units = patchify(self.to_map(images), self.shape.unit_px)
        x: Tensor = self.patch_embed(nested_patches(units, self.shape.patch_size))
        for stage, of_stage, paths in zip(self.layers, groupings, self.drop_paths, strict=True):
            x = stage(x, of_stage, paths)
        return x


def _fitting_windows(shape: SwinShape) -> list[int]:
    """Sides of windows, from 2 to the first stage's grid, that cut the grid of every stage that is larger."""
    sides = [stage.grid_size for stage in shape.stages]
    return [window for window in range(2, sides[0] + 1) if not any(side % min(window, side) for side in sides)]


# -- the authors' layout ----------------------------------------------------------------------------------------------

_LAYOUT = "expected GreenMIM's layout (decoder_pos_embed, encoder.layers.0.blocks.0..., decoder_blocks.0...)"
_TABLE = "encoder.layers.{}.blocks.0.attn.relative_position_bias_table"


def _position_indices(shape: SwinShape) -> dict[str, Tensor]:
    """The constants `relative_position_index` of all blocks, int64, which the release keeps and pre-training does not
    use."""
    return {
        f"encoder.layers.{number}.blocks.{block}.attn.relative_position_index": relative_position_index(stage.window)
        for number, (stage, depth) in enumerate(zip(shape.stages, shape.depths, strict=True))
        for block in range(depth)
    }


def _sizes_of(state_dict: Mapping[str, Tensor], decoder_heads: int | None) -> tuple[dict[str, Any], int]:
    """Options that give a checkpoint its sizes, and the side of its images; WeightsError where a tensor that tells one
    is missing or no such tensor."""
    refuse_encoder_alone(state_dict, encoder=("encoder.layers.0.", "layers.0."))
    patches = _tensor(state_dict, "encoder.patch_embed.proj.weight", 4)
    decoder_table = _tensor(state_dict, "decoder_pos_embed", 3)
    stages = range(count_of(state_dict, "encoder.layers.N.", layout=_LAYOUT))
    depths = tuple(count_of(state_dict, f"encoder.layers.{stage}.blocks.N.", layout=_LAYOUT) for stage in stages)
    tables = [_tensor(state_dict, _TABLE.format(stage), 2) for stage in stages]
    embed_dim, patch_size, decoder_width = patches.shape[0], patches.shape[-1], decoder_table.shape[2]
    grid = _side("tokens of decoder_pos_embed", decoder_table.shape[1])
    sizes = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (_side("rows of relative_position_bias_table", tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": _tensor(state_dict, "encoder.layers.0.blocks.0.mlp.fc1.weight", 2).shape[0] / embed_dim,
        "decoder_width": decoder_width,
        "decoder_depth": count_of(state_dict, "decoder_blocks.N.", layout=_LAYOUT),
        "decoder_heads": heads_of("decoder", decoder_width, decoder_heads, DECODER_HEADS),
    }
    return sizes, grid * (patch_size << (len(depths) - 1))


def _tensor(state_dict: Mapping[str, Tensor], key: str, ndim: int) -> Tensor:
    return tensor_of(state_dict, key, ndim=ndim, layout=_LAYOUT)


def _side(what: str, count: int) -> int:
    side = math.isqrt(count)
    if side**2 != count:
        raise WeightsError(f"checkpoint: {count} {what} are no square number")
    return side
