"""The checkpoint layout of improved-diffusion's UNetModel, which latent-diffusion's shares, on diffusers' UNet2DModel.

The authors number all blocks of a way through, each with its layers by position (`input_blocks.4.1.qkv.weight`), and
keep queries, keys and values of an attention in one 1x1 convolution whose rows go head by head: the queries of the
first head, its keys, its values, the queries of the second ... Here they are three linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.nn.official import require_fit, tensor_of

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class OpenAISizes:
    """What the tensors of a checkpoint tell about its U-Net; heads of attention and image size leave no trace."""

    block_out_channels: tuple[int, ...]
    attention_levels: tuple[int, ...]
    layers_per_block: int
    in_channels: int
    out_channels: int
    scale_shift: bool


def sizes_from_openai(state_dict: Mapping[str, Tensor]) -> OpenAISizes:
    """Sizes of the U-Net that a checkpoint in the authors' layout holds.

    Raises WeightsError for a model of class labels, where a tensor that tells a size is missing or is no such tensor,
    and for blocks that no UNetModel of theirs has.
    """
    if "label_emb.weight" in state_dict:
        raise WeightsError(
            "checkpoint: a class-conditional model (label_emb.weight); only unconditional ones are supported"
        )
    stem, head = (_tensor(state_dict, f"{name}.weight", ndim=4) for name in ("input_blocks.0.0", "out.2"))
    levels = _levels(state_dict)
    widths = [
        [_tensor(state_dict, f"{block}.out_layers.3.weight", ndim=4).shape[0] for block in level] for level in levels
    ]
    if any(len(set(level)) != 1 or len(level) != len(widths[0]) for level in widths):
        raise WeightsError(f"checkpoint: input_blocks: levels of unequal blocks, channels {widths}; {_EXPECTED}")
    first = levels[0][0]
    return OpenAISizes(
        block_out_channels=tuple(level[0] for level in widths),
        attention_levels=tuple(
            index for index, level in enumerate(levels) if f"{level[0][:-1]}1.qkv.weight" in state_dict
        ),
        layers_per_block=len(widths[0]),
        in_channels=stem.shape[1],
        out_channels=head.shape[0],
        scale_shift=_tensor(state_dict, f"{first}.emb_layers.1.weight", ndim=2).shape[0] == 2 * widths[0][0],
    )


def load_openai(unet: UNet2DModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of the authors' layout into `unet`, made by `build_unet`; every key and every shape must fit.

    Raises WeightsError naming missing keys, unexpected keys and wrong shapes, before anything is loaded.
    """
    require_fit(_official_shapes(unet), state_dict)
    with torch.no_grad():
        for prefix, layer in _layers(unet):
            for kind in ("weight", "bias"):
                tensor = state_dict[f"{prefix}.{kind}"]
                if isinstance(layer, _Attention):
                    for own, part in zip(layer.projections, _split(tensor, layer.heads), strict=True):
                        getattr(own, kind).copy_(part.view_as(getattr(own, kind)))
                else:
                    own = getattr(layer, kind)
                    own.copy_(tensor.view_as(own))


def to_openai(unet: UNet2DModel) -> dict[str, Tensor]:
    """The weights of `unet`, made by `build_unet`, in the authors' layout and order; detached copies or views."""
    official = {}
    for prefix, layer in _layers(unet):
        for kind in ("weight", "bias"):
            if isinstance(layer, _Attention):
                tensor = _join([getattr(own, kind).detach() for own in layer.projections], layer.heads)
            else:
                tensor = getattr(layer, kind).detach()
            if _is_convolution(prefix, kind):
                tensor = tensor.unsqueeze(-1)
            official[f"{prefix}.{kind}"] = tensor.contiguous()
    return official


def _official_shapes(unet: UNet2DModel) -> dict[str, torch.Size]:
    """Those of `to_openai`, without copies of the weights."""
    shapes = {}
    for prefix, layer in _layers(unet):
        for kind in ("weight", "bias"):
            if isinstance(layer, _Attention):
                width, *others = getattr(layer.projections[0], kind).shape
                shape = [width * len(layer.projections), *others]
            else:
                shape = list(getattr(layer, kind).shape)
            shapes[f"{prefix}.{kind}"] = torch.Size([*shape, 1] if _is_convolution(prefix, kind) else shape)
    return shapes


def _is_convolution(prefix: str, kind: str) -> bool:
    """Whether a linear layer's weight is that of a convolution over positions there."""
    return kind == "weight" and prefix.endswith((".qkv", ".proj_out"))


# -- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """Three linear layers that are one convolution in the authors' layout."""

    projections: tuple[nn.Module, ...]
    heads: int


def _layers(unet: UNet2DModel) -> Iterator[tuple[str, nn.Module | _Attention]]:
    """Every layer with weights, by its name in the authors' layout and in its order."""
    yield "time_embed.0", unet.time_embedding.linear_1
    yield "time_embed.2", unet.time_embedding.linear_2
    yield "input_blocks.0.0", unet.conv_in
    number = 1
    for block in unet.down_blocks:
        for parts in _steps(block):
            yield from _numbered(f"input_blocks.{number}", parts)
            number += 1
        for downsampler in block.downsamplers or ():
            yield f"input_blocks.{number}.0.op", downsampler.conv
            number += 1
    middle = unet.mid_block
    yield from _numbered("middle_block", [middle.resnets[0], middle.attentions[0], middle.resnets[1]])
    number = 0
    for block in unet.up_blocks:
        steps = _steps(block)
        steps[-1] += list(block.upsamplers or ())
        for parts in steps:
            yield from _numbered(f"output_blocks.{number}", parts)
            number += 1
    yield "out.0", unet.conv_norm_out
    yield "out.2", unet.conv_out


def _steps(block: Any) -> list[list[Any]]:
    """The residual blocks of a level, each with the attention behind it where there is one."""
    attentions = [[attention] for attention in getattr(block, "attentions", ())] or [[] for _ in block.resnets]
    return [[resnet, *behind] for resnet, behind in zip(block.resnets, attentions, strict=True)]


def _numbered(prefix: str, parts: list[Any]) -> Iterator[tuple[str, nn.Module | _Attention]]:
    for position, part in enumerate(parts):
        yield from _part(f"{prefix}.{position}", part)


def _part(prefix: str, part: Any) -> Iterator[tuple[str, nn.Module | _Attention]]:
    """Layers of a residual block, an attention or an upsampler."""
    if hasattr(part, "conv1"):
        for official, own in _RESIDUAL.items():
            if getattr(part, own) is not None:
                yield f"{prefix}.{official}", getattr(part, own)
    elif hasattr(part, "to_q"):
        yield f"{prefix}.norm", part.group_norm
        yield f"{prefix}.qkv", _Attention(tuple(getattr(part, name) for name in _PROJECTIONS), part.heads)
        yield f"{prefix}.proj_out", part.to_out[0]
    else:
        yield f"{prefix}.conv", part.conv


# -- queries, keys and values -----------------------------------------------------------------------------------------


def _split(joint: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Rows (3 C, ...) that go head by head to those of queries, keys and values, (C, ...) each."""
    by_head = joint.unflatten(0, (heads, 3, -1))
    return tuple(by_head[:, part].flatten(0, 1) for part in range(3))


def _join(parts: list[Tensor], heads: int) -> Tensor:
    """The inverse of `_split`."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


# -- reading sizes ----------------------------------------------------------------------------------------------------

_EXPECTED = (
    "expected improved-diffusion's layout (time_embed, input_blocks.0.0, middle_block, output_blocks, out): "
    "give the mapping of tensors itself"
)


def _levels(state_dict: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the residual blocks on the way down, those of one resolution together."""
    numbers = {int(match[1]) for key in state_dict if (match := re.match(r"input_blocks\.(\d+)\.", key))}
    levels: list[list[str]] = [[]]
    for number in sorted(numbers - {0}):
        if f"input_blocks.{number}.0.op.weight" in state_dict:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{number}.0")
    if not all(levels):
        raise WeightsError(f"checkpoint: input_blocks: a resolution without residual blocks; {_EXPECTED}")
    return levels


def _tensor(state_dict: Mapping[str, Tensor], key: str, *, ndim: int) -> Tensor:
    return tensor_of(state_dict, key, ndim=ndim, layout=_EXPECTED)
