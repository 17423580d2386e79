"""The network of the ablation "w/o MAE" (LMD's Table 5): a U-Net over the masked latent map.

The paper names no sizes and the authors released no code for it. It is sized here by parameters: the defaults come
within 0.1 % of the ViT-B they replace (110,913,224 on latents of 4 channels beside 110,817,856).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import ConfigError
from lmd_bench.method import MethodConfig
from lmd_bench.nn.masking import take_tokens
from lmd_bench.nn.patches import normalised, patchify, unpatchify

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class UNetConfig(MethodConfig):
    """Sizes of the U-Net."""

    block_out_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(192, 384, 640), min_length=1)
    """Channels of each resolution, finest first; each further one halves the side."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Resolutions with self-attention, as indices into `block_out_channels`; the middle always has it."""
    attention_head_dim: int = Field(default=64, ge=1)
    """Channels per attention head."""
    layers_per_block: int = Field(default=2, ge=1)
    norm_num_groups: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels must be in 0..{levels - 1}, got {list(self.attention_levels)}")
        attends = {*self.attention_levels, levels - 1}
        for index, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels.{index}: {channels} is not divisible by norm_num_groups")
            if index in attends and channels % self.attention_head_dim:
                raise ValueError(f"block_out_channels.{index}: {channels} is not divisible by attention_head_dim")
        return self

    def check_map(self, input_size: int) -> None:
        """Raise ConfigError unless a map of this side can be halved as often as there are levels."""
        factor = 2 ** (len(self.block_out_channels) - 1)
        if input_size % factor:
            raise ConfigError(
                f"unet.block_out_channels: {len(self.block_out_channels)} levels need a latent map of a side divisible "
                f"by {factor}, got {input_size}"
            )


@dataclass(frozen=True)
class MaskedUNetShape:
    """The map that a masked U-Net works on and the tokens it is cut into."""

    input_size: int
    """Side of the square map, in latent positions."""
    patch_size: int
    """Side of the squares that are hidden or visible as a whole."""
    in_channels: int

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole map."""
        return self.grid_size**2


class MaskedUNet(nn.Module):
    """diffusers' UNet2DModel from a map with holes, and the mask as one more channel, to the whole map.

    It stands in for `MaskedAutoencoder` and answers to the same calls: loss, prediction and completion of tokens.
    Hidden positions hold a learned value per channel before the network sees them. There is no diffusion time here:
    the network's timestep is a constant 0. Unlike the ViT it always computes every position, however many are hidden.
    """

    def __init__(self, shape: MaskedUNetShape, config: UNetConfig, *, normalize_targets: bool = False) -> None:
        """`normalize_targets` predicts patches normalised by their own mean and unbiased variance."""
        super().__init__()
        self.shape = shape
        self.normalize_targets = normalize_targets
        self.mask_token = nn.Parameter(torch.empty(1, shape.in_channels, 1, 1))
        nn.init.normal_(self.mask_token, std=0.02)
        self.unet = _unet(shape, config)

    def forward(
        self, inputs: Tensor, ids: Tensor, num_kept: int, *, completed: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """() mean squared error on the hidden tokens of `inputs` (B, C, H, W).

        `ids` (B, L) is a permutation of the tokens whose first `num_kept` are visible (see `nn.masking`). With
        `completed` also `inputs` with its hidden tokens replaced by their prediction, (B, C, H, W), in the graph.
        """
        hidden_ids = ids[:, num_kept:]
        hidden = self._position_mask(torch.zeros_like(ids, dtype=torch.bool).scatter(1, hidden_ids, True))
        predicted = self._predict(inputs, hidden)
        patches, wanted = (
            take_tokens(patchify(maps, self.shape.patch_size), hidden_ids) for maps in (predicted, inputs)
        )
        loss = F.mse_loss(patches, self.targets(wanted))
        return (loss, torch.where(hidden, predicted.to(inputs.dtype), inputs)) if completed else loss

    def targets(self, patches: Tensor) -> Tensor:
        """What is predicted for `patches` (B, n, P): themselves, or normalised with eps 1e-6."""
        return normalised(patches) if self.normalize_targets else patches

    def complete(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """`inputs` (B, C, H, W) with the tokens where `hidden` (B, L) bool is True replaced by their prediction.

        Samples may hide different numbers of tokens. Values under hidden tokens are not looked at.
        """
        positions = self._position_mask(hidden)
        return torch.where(positions, self._predict(inputs, positions).to(inputs.dtype), inputs)

    def _position_mask(self, hidden: Tensor) -> Tensor:
        """Hidden tokens (B, L) bool as a map (B, 1, H, W) bool."""
        patches = hidden.unsqueeze(-1).expand(-1, -1, self.shape.patch_size**2)
        return unpatchify(patches, self.shape.patch_size, 1)

    def _predict(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """The whole map (B, C, H, W) from what is visible; `hidden` (B, 1, H, W) bool."""
        seen = torch.where(hidden, self.mask_token.to(inputs.dtype), inputs)
        timestep = torch.zeros((), dtype=torch.int64, device=inputs.device)
        out: Tensor = self.unet(torch.cat([seen, hidden.to(inputs.dtype)], dim=1), timestep, return_dict=False)[0]
        return out


def _unet(shape: MaskedUNetShape, config: UNetConfig) -> UNet2DModel:
    from diffusers import UNet2DModel  # here: it takes seconds to import, and the ViT does not need it

    attends = [level in config.attention_levels for level in range(len(config.block_out_channels))]
    sizes: dict[str, Any] = config.model_dump(exclude={"attention_levels"})
    return UNet2DModel(
        sample_size=shape.input_size,
        in_channels=shape.in_channels + 1,
        out_channels=shape.in_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        **sizes,
    )
