"""Sizes of UM-MAE's pyramids (Li et al. 2022, arXiv 2205.10063): which can be built, and what a checkpoint tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.nn.official import DECODER_HEADS, count_of, heads_of, numbers_in, tensor_of

PyramidBackbone = Literal["pvt", "swin"]

NUM_STAGES = 4
PATCHES_PER_TOKEN_SIDE = 4
WINDOW = 8
"""Side of Swin's windows on the compact map, patches."""


@dataclass(frozen=True)
class PyramidShape:
    """Sizes of a masked autoencoder with a pyramid of four stages; `published` gives the authors' models."""

    backbone: PyramidBackbone
    """Which kind of pyramid."""
    image_size: int
    """Side of the images, px."""
    stage_widths: tuple[int, ...]
    """Channels of each stage."""
    stage_depths: tuple[int, ...]
    """Blocks of each stage."""
    stage_heads: tuple[int, ...]
    """Attention heads of each stage."""
    stage_mlp_ratios: tuple[float, ...]
    """Hidden widths of the MLPs as multiples of the width."""
    token_px: int = 16
    """Side of what is hidden or visible as a whole, px: 4 x 4 of the encoder's patches."""
    bias_hidden: int = 32
    """Hidden width of Swin's MLP for position biases; PVT has none."""
    secondary_ratio: float = 0.25
    """Share of the visible tokens replaced by a learned one; int(n * (1 - ratio)) are left alone."""
    decoder_width: int = 512
    decoder_depth: int = 2
    """Blocks."""
    decoder_heads: int = 16
    official_order: bool = False
    """Whether visible tokens get the decoder positions that the release gives them, in part other tokens'."""

    @classmethod
    def published(cls, name: Literal["pvt_small", "swin_tiny"], image_size: int = 256, **changes: Any) -> PyramidShape:
        """The sizes of a model that the authors trained, and what is to be different."""
        return replace(cls(image_size=image_size, **_PUBLISHED[name]), **changes)

    @property
    def patch_size(self) -> int:
        """Side of the encoder's patches, px."""
        return self.token_px // PATCHES_PER_TOKEN_SIDE

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.token_px

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole image."""
        return self.grid_size**2

    @property
    def patch_dim(self) -> int:
        """Pixel values that a token stands for."""
        return self.token_px**2 * 3

    def stage_sides(self, *, dense: bool = False) -> tuple[int, ...]:
        """Side of the map in every stage, patches: of the compact map, or of the whole image's where `dense`."""
        side = self.image_size // self.patch_size // (1 if dense else 2)
        return tuple(side >> stage for stage in range(NUM_STAGES))


_PUBLISHED: dict[str, dict[str, Any]] = {
    "pvt_small": {
        "backbone": "pvt",
        "stage_widths": (64, 128, 320, 512),
        "stage_depths": (3, 4, 6, 3),
        "stage_heads": (1, 2, 5, 8),
        "stage_mlp_ratios": (8.0, 8.0, 4.0, 4.0),
    },
    "swin_tiny": {
        "backbone": "swin",
        "stage_widths": (96, 192, 384, 768),
        "stage_depths": (2, 2, 6, 2),
        "stage_heads": (3, 6, 12, 24),
        "stage_mlp_ratios": (4.0, 4.0, 4.0, 4.0),
    },
}


def check_pyramid(shape: PyramidShape) -> None:
    """Raise ConfigError unless stages are complete, heads and position tables fit the widths, and maps can be cut.

    An image must be cut by four tokens (64 px at tokens of 16), so that the compact map can be halved three times,
    and Swin's map must fit into one window of 8 patches or be cut by it in every stage: 64, 128, 256, 512, 1024 ... px.
    """
    _check_stages(shape)
    unit = 4 * shape.token_px
    if shape.token_px % PATCHES_PER_TOKEN_SIDE:
        raise ConfigError(f"patch_size: a pyramid's tokens are 4 x 4 patches, got {shape.token_px} px: take a multiple")
    if shape.image_size % unit or shape.image_size < unit:
        raise ConfigError(
            f"image_size: {shape.image_size} px are not a multiple of {unit}, 4 tokens of {shape.token_px} px, which "
            f"{shape.backbone}'s three halvings of the compact map need"
        )
    uncut = [side for side in shape.stage_sides() if side > WINDOW and side % WINDOW]
    if shape.backbone == "swin" and uncut:
        raise ConfigError(
            f"image_size: {shape.image_size} px give swin compact maps of {shape.stage_sides()} patches a side, and "
            f"{uncut[0]} is not cut by its window of {WINDOW}: take {unit} times 1, 2, 4 or a multiple of 8"
        )


def _check_stages(shape: PyramidShape) -> None:
    for name in ("stage_widths", "stage_depths", "stage_heads", "stage_mlp_ratios"):
        values = getattr(shape, name)
        if len(values) != NUM_STAGES or min(values) <= 0:
            raise ConfigError(f"{name}: {values} are not the {NUM_STAGES} positive values of a pyramid's stages")
    for width, heads in zip(shape.stage_widths, shape.stage_heads, strict=True):
        if width % heads:
            raise ConfigError(f"stage_heads: {heads} heads do not divide a stage's width {width}")
    if shape.stage_widths[0] % 4:
        raise ConfigError(f"stage_widths: the first must be divisible by 4, got {shape.stage_widths[0]}")
    if shape.decoder_width % 4 or shape.decoder_width % shape.decoder_heads:
        raise ConfigError(
            f"decoder_width must be divisible by 4 (position table) and by decoder_heads, got "
            f"{shape.decoder_width}, {shape.decoder_heads}"
        )


def pyramid_shape_of_checkpoint(
    state_dict: Mapping[str, Tensor],
    *,
    stage_heads: tuple[int, ...] | None = None,
    decoder_heads: int | None = None,
) -> PyramidShape:
    """The sizes of a pyramid autoencoder from its weights in the authors' layout, in the order of the release.

    PVT's heads and the decoder's leave no trace, and weights load and predict nonsense under a wrong number: None
    stands for the published ones, of 64 channels each in PVT and 16 in a decoder of width 512. Raises WeightsError
    where other widths make that unknown, where a tensor that tells a size is missing, and where the sizes make no
    pyramid.
    """
    backbone: PyramidBackbone = "swin" if _BIAS_KEY in state_dict else "pvt"
    first_blocks = [0, *numbers_in(state_dict, "blocks.N.downsample.proj.weight")]
    widths = tuple(_shape(state_dict, f"blocks.{index}.norm1.weight", 1)[0] for index in first_blocks)
    hidden = [_shape(state_dict, f"blocks.{index}.mlp.fc1.weight", 2)[0] for index in first_blocks]
    ends = [*first_blocks[1:], count_of(state_dict, "blocks.N.norm1.weight", layout=_LAYOUT)]
    if backbone == "swin":
        heads = tuple(_shape(state_dict, f"blocks.{index}.attn.posmlp.2.weight", 4)[0] for index in first_blocks)
    else:
        heads = stage_heads or _pvt_heads(widths)
    decoder_width = _shape(state_dict, "mask_token", 3)[-1]
    token_px = PATCHES_PER_TOKEN_SIDE * _shape(state_dict, "patch_embed.proj.weight", 4)[-1]
    shape = PyramidShape(
        backbone=backbone,
        image_size=round(_shape(state_dict, "decoder_pos_embed", 3)[1] ** 0.5) * token_px,
        stage_widths=widths,
        stage_depths=tuple(end - start for start, end in zip(first_blocks, ends, strict=True)),
        stage_heads=heads,
        stage_mlp_ratios=tuple(own / width for own, width in zip(hidden, widths, strict=True)),
        token_px=token_px,
        bias_hidden=_shape(state_dict, _BIAS_KEY, 4)[0] if backbone == "swin" else PyramidShape.bias_hidden,
        decoder_width=decoder_width,
        decoder_depth=count_of(state_dict, "decoder_blocks.N.", layout=_LAYOUT),
        decoder_heads=heads_of("decoder", decoder_width, decoder_heads, DECODER_HEADS),
        official_order=True,
    )
    try:
        check_pyramid(shape)
    except ConfigError as error:
        raise WeightsError(f"checkpoint: no pyramid of UM-MAE: {error}") from error
    return shape


_BIAS_KEY = "blocks.0.attn.posmlp.0.weight"
_LAYOUT = (
    "expected the layout of UM-MAE's pyramids (vis_mask_token, patch_embed.proj, blocks.0..., decoder_blocks.0...)"
)


def _shape(state_dict: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size:
    return tensor_of(state_dict, key, ndim=ndim, layout=_LAYOUT).shape


def _pvt_heads(widths: tuple[int, ...]) -> tuple[int, ...]:
    if any(width % 64 for width in widths):
        raise WeightsError(
            f"checkpoint: a PVT with stages of widths {widths} was not published, and weights do not tell its "
            f"attention heads; published ones have 64 channels a head: give stage_heads"
        )
    return tuple(width // 64 for width in widths)
