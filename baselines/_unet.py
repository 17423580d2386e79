"""The U-Nets of the diffusion baselines, on diffusers' UNet2DModel in the flavours of the authors' repositories."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from diffusers import UNet2DModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import ConfigError
from lmd_bench.method import MethodConfig

UNetFlavour = Literal["ddim", "openai"]
_SHORTEST_CHANNELS_LAST = 16
"""Side of feature maps, in positions: weights of smaller ones cost more to rearrange than the layout brings."""
_LARGEST_CHANNELS_LAST = 2**31 - 1
"""Elements that torch's nearest-neighbour kernel for channels-last maps on GPUs can make (pytorch issue 141831)."""


class UNetOptions(MethodConfig):
    """Size of a U-Net; the defaults are the LSUN 256 x 256 model, 113,673,219 parameters with three outputs."""

    block_out_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(128, 128, 256, 256, 512, 512), min_length=1
    )
    """Channels of each resolution, finest first; each further one halves the side."""
    attention_levels: tuple[int, ...] = (4,)
    """Resolutions with self-attention, as indices into `block_out_channels`; the middle always has it."""
    attention_head_dim: int | None = Field(default=None, ge=1)
    """Channels per attention head, whatever the width; None: `num_heads` says."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of every attention, whatever its width; None: `attention_head_dim` says, or a single head without it."""
    layers_per_block: int = Field(default=2, ge=1)
    """Residual blocks per resolution on the way down; one more on the way up."""
    norm_num_groups: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of features dropped before the second convolution of every residual block."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> UNetOptions:
        if self.attention_head_dim is not None and self.num_heads is not None:
            raise ValueError("give attention_head_dim or num_heads, not both: set the other to null")
        levels = len(self.block_out_channels)
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels must be in 0..{levels - 1}, got {list(self.attention_levels)}")
        attends = {*self.attention_levels, levels - 1}
        for index, channels in enumerate(self.block_out_channels):
            for name in ("norm_num_groups", *(("attention_head_dim", "num_heads") if index in attends else ())):
                if channels % (getattr(self, name) or 1):
                    raise ValueError(f"block_out_channels.{index}: {channels} is not divisible by {name}")
        return self

    def sizes_text(self) -> str:
        """The network's sizes in words, among them the heads, on which an authors' checkpoint is silent."""
        levels = sorted(set(self.attention_levels))
        heads = [self.heads_at(self.block_out_channels[level]) for level in (*levels, -1)]
        return (
            f"U-Net of channels {list(self.block_out_channels)}, {self.layers_per_block} blocks a level, attention on "
            f"levels {levels} and in the middle with {heads} heads"
        )

    def heads_at(self, channels: int) -> int:
        """Heads of an attention over so many channels."""
        return self.num_heads or (channels // self.attention_head_dim if self.attention_head_dim else 1)

    def check_side(self, side: int, what: str) -> None:
        """Raise ConfigError unless `what` ("image size") of this side can be halved as often as there are levels."""
        factor = 2 ** (len(self.block_out_channels) - 1)
        if side % factor:
            raise ConfigError(
                f"block_out_channels: {len(self.block_out_channels)} levels need an {what} divisible by "
                f"{factor}, got {side}"
            )


def build_unet(
    options: UNetOptions,
    *,
    image_size: int,
    in_channels: int = 3,
    out_channels: int = 3,
    flavour: UNetFlavour = "ddim",
    scale_shift: bool = False,
) -> UNet2DModel:
    """A fresh U-Net: x_t (B, in_channels, S, S) and timesteps (B,) to (B, out_channels, S, S).

    "ddim" (github.com/ermongroup/ddim, the port of DDPM's U-Net): group norms of eps 1e-6, stride-2 convolutions padded
    on one side only, sine before cosine in the time embedding. "openai" (improved-diffusion, and from it
    latent-diffusion): eps 1e-5, padding on all sides, cosine before sine over other frequencies; the last layer of
    every residual and attention block and of the network starts at zero. `scale_shift`: the time embedding scales and
    shifts the second group norm of a residual block, instead of being added before it.

    Feature maps and the weights of their convolutions lie channels last where a side is longer than
    `_SHORTEST_CHANNELS_LAST`, channels first where it is not: on a CPU each is the faster one there.
    """
    levels = range(len(options.block_out_channels))
    attends = [level in options.attention_levels for level in levels]
    unet = UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=options.block_out_channels,
        layers_per_block=options.layers_per_block,
        attention_head_dim=None,  # here it makes a single head; how channels fall to heads is up to _SelfAttention
        norm_num_groups=options.norm_num_groups,
        attn_norm_num_groups=options.norm_num_groups,  # else scale_shift leaves the middle's attention without a norm
        dropout=options.dropout,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        **_flavour(flavour),
    )
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        _lighten(block, options)
    if flavour == "openai":
        _zero_last_layers(unet)
    unet.to(memory_format=torch.channels_last)
    sides = [image_size >> level for level in levels]
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    for block, side in zip(blocks, (*sides, sides[-1], *reversed(sides)), strict=True):
        if side < _SHORTEST_CHANNELS_LAST:
            for resnet in block.resnets:
                resnet.lay_channels_first()
    return unet


def _flavour(flavour: UNetFlavour) -> dict[str, Any]:
    if flavour == "openai":
        return {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
    return {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}


def _zero_last_layers(unet: UNet2DModel) -> None:
    layers = [unet.conv_out]
    layers += [module.conv2 for module in unet.modules() if isinstance(module, _ResidualBlock)]
    layers += [module.to_out[0] for module in unet.modules() if isinstance(module, _SelfAttention)]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


# -- leaner forward passes over the same weights ----------------------------------------------------------------------


def _lighten(block: Any, options: UNetOptions) -> None:
    block.resnets = nn.ModuleList(_ResidualBlock(resnet) for resnet in block.resnets)
    if hasattr(block, "attentions"):
        block.attentions = nn.ModuleList(
            _SelfAttention(attention, options.heads_at(attention.query_dim)) for attention in block.attentions
        )
    if getattr(block, "upsamplers", None) is not None:
        block.upsamplers = nn.ModuleList(_Upsampler(upsampler) for upsampler in block.upsamplers)


class _ResidualBlock(nn.Module):
    """The layers of diffusers' ResnetBlock2D under the same names.

    Its own pass divides every output by a factor that is 1 here, copies feature maps that are channels last before
    the shortcut, and multiplies and adds the time embedding in three passes over memory.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.scale_shift: bool = block.time_embedding_norm == "scale_shift"
        self.norm1, self.conv1, self.time_emb_proj = block.norm1, block.conv1, block.time_emb_proj
        self.norm2, self.dropout, self.conv2 = block.norm2, block.dropout, block.conv2
        self.conv_shortcut: nn.Module | None = block.conv_shortcut
        self.memory_format = torch.channels_last

    def lay_channels_first(self) -> None:
        """Compute on feature maps that are channels first, with weights that are so too."""
        self.memory_format = torch.contiguous_format
        for parameter in self.parameters():
            parameter.data = parameter.data.contiguous()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Feature maps (B, C, H, W) and the time embedding (B, D) to feature maps (B, C', H, W)."""
        x = x.contiguous(memory_format=self.memory_format)
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(F.silu(temb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class _Upsampler(nn.Module):
    """The layers of diffusers' Upsample2D under the same names.

    Its own pass copies batches of 64 and more to channels first, for the sake of kernels of older versions of torch.
    """

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.conv = upsampler.conv

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Feature maps (B, C, H, W) to (B, C, 2 H, 2 W); `size` is what a block hands over, always None here."""
        if 4 * x.numel() > _LARGEST_CHANNELS_LAST:
            x = x.contiguous()
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _SelfAttention(nn.Module):
    """The layers of diffusers' Attention under the same names, with any number of heads.

    Its own pass copies the tokens for each projection and divides the output by a factor that is 1 here.
    """

    def __init__(self, attention: Any, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = attention.group_norm
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Feature maps (B, C, H, W) to the same shape; `temb` is what the middle block hands over, unused."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)
        return out
