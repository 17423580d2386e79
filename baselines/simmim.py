"""SimMIM: masked image modelling with a linear head (Xie et al. 2021, arXiv 2111.09886)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._beit_vit import ViTEncoder, ViTOptions
from baselines._masked_pixels import MaskedPixelMethod, PixelStatsName
from baselines._swin import SwinEncoder, SwinOptions
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import DataSpec, MethodConfig, StepOutput
from lmd_bench.nn.classifier import ImageClassifier, Pool, class_token_obstacle, require
from lmd_bench.nn.masking import pixel_mask, random_ids, take_tokens, token_mask
from lmd_bench.nn.official import count_of, load_exactly, reading_sizes, refuse_encoder_alone, tensor_of

Backbone = Annotated[SwinOptions | ViTOptions, Field(discriminator="kind")]


class SimMIMConfig(MethodConfig):
    """Options of SimMIM; the defaults are Swin-B as published, for images of 192 px."""

    backbone: Backbone = SwinOptions()
    """The encoder, `kind: swin` or `kind: vit`, and its sizes; those left out are the published Swin-B's or ViT-B's."""
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of mask units that are hidden, rounded up to whole units."""
    mask_unit_px: int = Field(default=32, ge=1)
    """Side of the squares that training masks hide, px; a multiple of the patch size."""
    pixel_stats: PixelStatsName = "imagenet"
    """Mean and deviation that pixels are normalised by: ImageNet's, or 0.5 and 0.5 (to [-1, 1])."""

    def sizes_text(self) -> str:
        """The network's sizes in words."""
        return f"{self.backbone.sizes_text()}, a linear head"


class UnitMasks(nn.Module):
    """Random masks over square units, as masks over patches and as ids of the encoder's output tokens."""

    unit_of_patch: Tensor
    """(L,) int64, the unit that each patch lies in."""
    tokens_of_unit: Tensor
    """(U, n) int64, the n output tokens of each unit; only where units cover whole ones."""

    def __init__(self, config: SimMIMConfig, image_size: int) -> None:
        super().__init__()
        unit, stride, side = config.mask_unit_px, config.backbone.stride, image_size // config.mask_unit_px
        self.unit_px, self.num_units = unit, side**2
        self.num_hidden = num_hidden_units(config, image_size)
        units = torch.arange(side**2).view(side, side)
        of_patch = _enlarged(units, unit // config.backbone.patch_size).flatten()
        self.register_buffer("unit_of_patch", of_patch, persistent=False)
        # units smaller than an output token hide parts of it, so none can be left out
        self.covers_tokens = unit % stride == 0
        if self.covers_tokens:
            of_token = _enlarged(units, unit // stride).flatten()
            self.register_buffer("tokens_of_unit", of_token.argsort(stable=True).view(side**2, -1), persistent=False)

    def draw(self, batch_size: int, device: torch.device) -> Tensor:
        """Ids (B, k) of the units that each sample hides."""
        return random_ids(batch_size, self.num_units, device)[:, : self.num_hidden]

    def unit_mask(self, ids: Tensor) -> Tensor:
        """(B, U) bool, True = hidden, for ids (B, k) of hidden units."""
        nothing_hidden = torch.zeros(len(ids), self.num_units, dtype=torch.bool, device=ids.device)
        return nothing_hidden.scatter(1, ids, True)

    def hidden_patches(self, ids: Tensor) -> Tensor:
        """(B, L) bool, in raster order of the patches."""
        return self.unit_mask(ids).index_select(1, self.unit_of_patch)

    def hidden_tokens(self, ids: Tensor) -> Tensor | None:
        """Ids (B, n) of the output tokens that the units hide, None where units hide only parts of them."""
        return self.tokens_of_unit[ids].flatten(1) if self.covers_tokens else None

    def hidden_pixels(self, ids: Tensor, image_size: int) -> Tensor:
        """(B, 1, S, S) bool."""
        side = image_size // self.unit_px
        return pixel_mask(self.unit_mask(ids).view(-1, side, side), image_size)


class SimMIMModel(nn.Module):
    """Encoder on visible patches and mask tokens, and one linear layer that predicts the pixels of every token."""

    def __init__(self, backbone: SwinOptions | ViTOptions, image_size: int) -> None:
        super().__init__()
        self.stride = backbone.stride
        self.encoder: SwinEncoder | ViTEncoder = backbone.build(image_size)
        # the authors' convolution and pixel shuffle: the shuffle has no weights, and is `from_cells` here
        self.decoder = nn.Sequential(nn.Conv2d(backbone.width, 3 * self.stride**2, 1))

    def forward(self, images: Tensor, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Pixels predicted for normalised images (B, 3, S, S) of which the patches `hidden` (B, L) bool are not seen.

        (B, N, 3 s^2), one row for each output token of s x s pixels, or for those `wanted` (B, n).
        """
        head: Any = self.decoder[0]
        predicted: Tensor = F.linear(self.encoder(images, hidden, wanted), head.weight.flatten(1), head.bias)
        return predicted

    def loss(self, images: Tensor, masks: UnitMasks, ids: Tensor) -> Tensor:
        """Mean absolute error over the pixels that the units `ids` (B, k) hide, in normalised units."""
        wanted = masks.hidden_tokens(ids)
        predicted = self(images, masks.hidden_patches(ids), wanted)
        targets = to_cells(images, self.stride)
        if wanted is not None:
            errors = (predicted - take_tokens(targets, wanted)).abs()
        else:
            hidden_pixels = masks.hidden_pixels(ids, images.shape[-1]).expand_as(images)
            errors = (predicted - targets).abs() * to_cells(hidden_pixels, self.stride)
        # the authors count pixels, not values, and keep the count from being 0
        loss: Tensor = errors.sum() / (ids.numel() * masks.unit_px**2 + 1e-5) / 3
        return loss


class SimMIM(MaskedPixelMethod):
    """SimMIM: large units are hidden, the encoder sees mask tokens in their place, a linear head predicts pixels."""

    Config: ClassVar[type[MethodConfig]] = SimMIMConfig
    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.masks = UnitMasks(config, data.image_size)
        self.num_units = self.masks.num_units
        self.num_visible = self.num_units - self.masks.num_hidden
        self.model = SimMIMModel(config.backbone, data.image_size)

    @classmethod
    def check(cls, config: SimMIMConfig, data: DataSpec) -> None:
        """Raise ConfigError unless patches, windows and mask units fit the images and a unit stays visible."""
        config.backbone.check(data.image_size)
        unit, patch = config.mask_unit_px, config.backbone.patch_size
        if data.image_size % unit or unit % patch:
            possible = [px for px in range(patch, data.image_size, patch) if data.image_size % px == 0]
            raise ConfigError(
                f"mask_unit_px: {unit} does not cut images of {data.image_size} px into units of whole patches of "
                f"{patch} px; possible: {', '.join(map(str, possible))}"
            )
        units = (data.image_size // unit) ** 2
        if num_hidden_units(config, data.image_size) >= units:
            raise ConfigError(
                f"mask_ratio: {config.mask_ratio} hides all of {units} units of {unit} px; give at most "
                f"{(units - 1) / units:.4g}, or smaller units"
            )

    @classmethod
    def token_px(cls, config: SimMIMConfig, data: DataSpec) -> int:
        """The encoder can hide any patch."""
        return config.backbone.patch_size

    @classmethod
    def mask_unit_px(cls, config: SimMIMConfig, data: DataSpec) -> int:
        """The option of that name."""
        return config.mask_unit_px

    @classmethod
    def plan_text(cls, config: SimMIMConfig, data: DataSpec) -> str:
        """How many units training masks hide."""
        hidden, units = num_hidden_units(config, data.image_size), (data.image_size // config.mask_unit_px) ** 2
        return f"masks hide {hidden} of {units} units of {config.mask_unit_px} px ({hidden / units:.1%})"

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        """Loss on images (B, 3, S, S) in [0, 1] under a fresh random mask for each."""
        ids = self.masks.draw(len(inputs), inputs.device)
        loss = self.model.loss(self.pixels.normalize(inputs), self.masks, ids)
        return self.step_output(loss, step, total_steps)

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """All patches, hidden or not; a class token is not counted."""
        return self.model.encoder.num_tokens

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """The authors' rule: beside biases and 1-D parameters, Swin's mask token and bias tables are not decayed, and
        of a ViT the class token, while its mask token and bias table are."""
        return super().is_decayed(name, parameter) and self.model.encoder.is_decayed(name)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch that touches a hidden unit; the others are returned as they came."""
        size, patch = self.data.image_size, self.config.backbone.patch_size
        hidden = token_mask(pixel_mask(mask, size), patch)
        predicted = from_cells(self.model(self.pixels.normalize(images), hidden), self.model.stride)
        hidden_pixels = pixel_mask(hidden.view(-1, size // patch, size // patch), size)
        return torch.where(hidden_pixels, self.pixels.to_images(predicted), images)

    @classmethod
    def classifier_obstacle(cls, config: SimMIMConfig, pool: Pool = "mean") -> str | None:
        """Swin has no class token; the ViT has one."""
        return None if isinstance(config.backbone, ViTOptions) else class_token_obstacle(pool)

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """The encoder, which it shares, with a fresh head."""
        require(self.classifier_obstacle(self.config, pool))
        encoder = self.model.encoder
        if isinstance(encoder, ViTEncoder):
            return encoder.classifier(self.pixels, num_classes, pool, drop_path)
        return encoder.classifier(self.pixels, num_classes, drop_path)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> SimMIM:
        """SimMIM with the weights of an authors' pre-training checkpoint (its "model" entry), Swin or ViT.

        Sizes are read off the tensors. `options` are those of `SimMIMConfig`; what is given in `backbone` wins over
        what is read. Raises WeightsError where the tensors are not SimMIM's, naming keys that do not fit, and for
        tables (`relative_position_index`, `attn_mask`) that are not those of windows of these sizes.
        """
        refuse_encoder_alone(state_dict, encoder=("encoder.layers.0.", "encoder.blocks.0.", "layers.0.", "blocks.0."))
        if "encoder.mask_token" not in state_dict:
            raise WeightsError("checkpoint: no key encoder.mask_token: not a pre-training checkpoint of SimMIM")
        read = _read_vit if "encoder.cls_token" in state_dict else _read_swin
        sizes, image_size = read(state_dict)
        with reading_sizes():
            config = SimMIMConfig(**{**options, "backbone": {**sizes, **_as_dict(options.get("backbone", {}))}})
            method = cls(config, DataSpec(image_size))
        _require_tables(state_dict, method.model)
        load_exactly(method.model, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout; `from_official` of them is this model bit for bit."""
        return dict(self.model.state_dict())


def num_hidden_units(config: SimMIMConfig, image_size: int) -> int:
    """Units that a training mask hides: the ratio's share, rounded up."""
    return math.ceil((image_size // config.mask_unit_px) ** 2 * config.mask_ratio)


def to_cells(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) as square cells in raster order, (B, N, 3 side^2); channels first within a cell."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_cells(cells: Tensor, side: int) -> Tensor:
    """The inverse of `to_cells` for square images: what a pixel shuffle makes of a linear layer's output."""
    grid = math.isqrt(cells.shape[1])
    cut = cells.reshape(len(cells), grid, grid, -1, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(cells), -1, grid * side, grid * side)


def _enlarged(units: Tensor, factor: int) -> Tensor:
    """A grid (u, u) with every entry repeated over factor x factor places."""
    return units.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)


# -- sizes of a checkpoint --------------------------------------------------------------------------------------------

_LAYOUT = (
    "expected SimMIM's pre-training layout (encoder.mask_token, encoder.layers.0... or encoder.blocks.0..., "
    "decoder.0.weight)"
)


def _read_swin(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Options of a Swin encoder, and the image size."""
    weight = _shape(state, "encoder.patch_embed.proj.weight", 4)
    stages = range(count_of(state, "encoder.layers.N.", layout=_LAYOUT))
    depths = tuple(count_of(state, f"encoder.layers.{stage}.blocks.N.", layout=_LAYOUT) for stage in stages)
    tables = [
        _shape(state, f"encoder.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in stages
    ]
    windows = [(math.isqrt(rows) + 1) // 2 for rows, _ in tables]
    sizes = {
        "kind": "swin",
        "patch_size": weight[-1],
        "window_size": max(windows),
        "embed_dim": weight[0],
        "depths": depths,
        "num_heads": tuple(heads for _, heads in tables),
        "mlp_ratio": _shape(state, "encoder.layers.0.blocks.0.mlp.fc1.weight", 2)[0] / weight[0],
    }
    return sizes, _swin_grid(state, depths, windows) * weight[-1]


def _swin_grid(state: Mapping[str, Tensor], depths: tuple[int, ...], windows: list[int]) -> int:
    """Side of the first stage's grid. Only shift masks tell it: they have an entry for each window, and a stage
    whose second block has none is a single window."""
    for stage, (depth, window) in enumerate(zip(depths, windows, strict=True)):
        if depth > 1:
            mask = state.get(f"encoder.layers.{stage}.blocks.1.attn_mask")
            return window * (1 if mask is None else math.isqrt(len(mask))) << stage
    raise WeightsError("checkpoint: no stage of this Swin has a second block, so nothing tells the size of its images")


def _read_vit(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Options of a ViT encoder, and the image size."""
    weight = _shape(state, "encoder.patch_embed.proj.weight", 4)
    rows, heads = _shape(state, "encoder.rel_pos_bias.relative_position_bias_table", 2)
    grid = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    sizes = {
        "kind": "vit",
        "patch_size": weight[-1],
        "embed_dim": weight[0],
        "depth": count_of(state, "encoder.blocks.N.", layout=_LAYOUT),
        "num_heads": heads,
        "mlp_ratio": _shape(state, "encoder.blocks.0.mlp.fc1.weight", 2)[0] / weight[0],
    }
    return sizes, grid * weight[-1]


def _require_tables(state: Mapping[str, Tensor], model: SimMIMModel) -> None:
    """Raise WeightsError for a table of positions or windows that is not the one the model has built itself."""
    for key, table in model.named_buffers():
        found = state.get(key)
        if found is not None and found.shape == table.shape and not torch.equal(found.to(table), table):
            raise WeightsError(f"checkpoint: {key} is not that of windows of its size: another model's?")


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size:
    return tensor_of(state, key, ndim=ndim, layout=_LAYOUT).shape


def _as_dict(backbone: Any) -> dict[str, Any]:
    """Options of a backbone that were given, whether as a mapping or as checked values."""
    return dict(backbone) if isinstance(backbone, Mapping) else backbone.model_dump(exclude_unset=True)
