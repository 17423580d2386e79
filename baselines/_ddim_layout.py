"""The U-Net of the DDIM repository (github.com/ermongroup/ddim), the port of DDPM's, and its checkpoint layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from diffusers import UNet2DModel
from torch import Tensor

from baselines._diffusion import DiffusionConfig, DiffusionMethod
from baselines._unet import build_unet
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.nn.official import reading_sizes, require_fit

_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PUBLISHED: dict[tuple[int, ...], dict[str, Any]] = {
    (128, 256, 256, 256): {"image_size": 32, "dropout": 0.1, "variance": "fixed_large"},
    (128, 256, 256, 256, 512): {"image_size": 64, "dropout": 0.1, "variance": "fixed_large"},
    (128, 128, 256, 256, 512, 512): {"image_size": 256},
}
"""What the weights of a released model do not tell, by its channels: CIFAR-10, CelebA, LSUN (the repository's configs);
image size (px), and what differs from the defaults here."""


class PortedUNetMethod(DiffusionMethod):
    """A diffusion method on that U-Net, which takes the repository's checkpoints."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.unet = build_unet(config, image_size=data.image_size, flavour="ddim")

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], *, image_size: int | None = None, **options: Any) -> Self:
        """The method with the weights of a checkpoint of the DDIM repository.

        Channels, attention and depth are read off the tensors. `options` are those of the method's config, and win;
        with `image_size` (px), dropout and DDPM's variance leave no trace in the weights: left out, they are those of
        the released model of these channels. Raises WeightsError for other channels without `image_size`, for sizes
        that make no model, and naming keys that do not fit.
        """
        sizes = sizes_of_checkpoint(state_dict)
        released = _PUBLISHED.get(sizes["block_out_channels"], {})
        size = image_size or released.get("image_size")
        if size is None:
            channels = list(sizes["block_out_channels"])
            raise WeightsError(f"checkpoint: no published model has the channels {channels}; give image_size")
        known = {name: value for name, value in released.items() if name in cls.Config.model_fields}
        with reading_sizes():
            config: Any = cls.Config(**{**known, **sizes, **options})
            method = cls(config, DataSpec(size))
        load_checkpoint(method.unet, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout and order; `from_official` of them is this model bit for bit."""
        own = self.unet.state_dict()
        shaped = {name: own[key].view(_official_shape(name, own[key])) for name, key in _names(self.unet)}
        return {name: tensor.contiguous() for name, tensor in shaped.items()}  # convolutions lie channels last


def sizes_of_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `UNetOptions` that can be read off a checkpoint. Raises WeightsError where it has no such layout."""
    channels = _numbered(state_dict, r"down\.(\d+)\.block\.0\.conv1\.weight")
    if not channels or list(channels) != list(range(len(channels))):
        missing = next(level for level in range(len(channels) + 1) if level not in channels)
        raise WeightsError(
            f"checkpoint: down.{missing}.block.0.conv1.weight is missing; expected the layout of "
            "github.com/ermongroup/ddim: give the mapping of tensors itself, the first entry of the authors' list "
            "or, for averaged weights, the last"
        )
    return {
        "block_out_channels": tuple(tensor.shape[0] for tensor in channels.values()),
        "attention_levels": tuple(_numbered(state_dict, r"down\.(\d+)\.attn\.0\.q\.weight")),
        "layers_per_block": len(_numbered(state_dict, r"down\.0\.block\.(\d+)\.conv1\.weight")),
    }


def load_checkpoint(unet: UNet2DModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of the repository into a "ddim" U-Net, every key used.

    Raises WeightsError naming, as the repository does, missing and unexpected keys and wrong shapes, before anything is
    loaded.
    """
    own, names = unet.state_dict(), _names(unet)
    require_fit({name: _official_shape(name, own[key]) for name, key in names}, state_dict)
    unet.load_state_dict({key: state_dict[name].view(own[key].shape) for name, key in names})


def _names(unet: UNet2DModel) -> list[tuple[str, str]]:
    """Keys in the repository's layout and order, each with its key in diffusers'."""
    own = unet.state_dict().keys()
    pairs = ((f"{official}.{kind}", f"{key}.{kind}") for official, key in _layers(unet) for kind in ("weight", "bias"))
    return [(official, key) for official, key in pairs if key in own]


def _layers(unet: UNet2DModel) -> Iterator[tuple[str, str]]:
    """Every layer that a U-Net of as many levels can have, as (repository's name, diffusers' name)."""
    levels = len(unet.down_blocks)
    yield from (("temb.dense.0", "time_embedding.linear_1"), ("temb.dense.1", "time_embedding.linear_2"))
    yield "conv_in", "conv_in"
    for level in range(levels):
        yield from _level(f"down.{level}", f"down_blocks.{level}", len(unet.down_blocks[level].resnets))
        yield f"down.{level}.downsample.conv", f"down_blocks.{level}.downsamplers.0.conv"
    yield from _parts("mid.block_1", "mid_block.resnets.0", _RESNET)
    yield from _parts("mid.attn_1", "mid_block.attentions.0", _ATTENTION)
    yield from _parts("mid.block_2", "mid_block.resnets.1", _RESNET)
    for level in range(levels):  # the repository counts by resolution here too, diffusers from the bottom up
        own = levels - 1 - level
        yield from _level(f"up.{level}", f"up_blocks.{own}", len(unet.up_blocks[own].resnets))
        yield f"up.{level}.upsample.conv", f"up_blocks.{own}.upsamplers.0.conv"
    yield from (("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))


def _level(official: str, own: str, num_blocks: int) -> Iterator[tuple[str, str]]:
    for block in range(num_blocks):
        yield from _parts(f"{official}.block.{block}", f"{own}.resnets.{block}", _RESNET)
    for block in range(num_blocks):
        yield from _parts(f"{official}.attn.{block}", f"{own}.attentions.{block}", _ATTENTION)


def _parts(official: str, own: str, parts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((f"{official}.{name}", f"{own}.{part}") for name, part in parts.items())


def _official_shape(name: str, tensor: Tensor) -> Any:
    """The repository's attention projections are 1 x 1 convolutions where diffusers has linear layers."""
    projection = re.search(r"attn[._]\d+\.(q|k|v|proj_out)\.weight$", name)
    return tensor[..., None, None].shape if projection else tensor.shape


def _numbered(state_dict: Mapping[str, Tensor], pattern: str) -> dict[int, Tensor]:
    """Tensors whose key matches, by the number in it, ascending."""
    found = {int(m.group(1)): t for key, t in state_dict.items() if (m := re.fullmatch(pattern, key))}
    return dict(sorted(found.items()))
