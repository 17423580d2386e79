"""Checkpoints in the authors' layout (MAE's names, which LMD's code kept) and the sizes that can be read off them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoderShape

_NAMED_IN_ERRORS = 6
_ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width -> attention heads: ViT-Ti and S (Touvron et al. 2021, table 1), ViT-B, L and H (Dosovitskiy et al. 2020,
table 1)."""
_DECODER_HEADS = {512: 16}
"""MAE's decoder, which LMD's code kept."""


def shape_of_checkpoint(
    state_dict: Mapping[str, Tensor], *, encoder_heads: int | None = None, decoder_heads: int | None = None
) -> MaskedAutoencoderShape:
    """The sizes of a masked autoencoder from its weights.

    Numbers of heads leave no trace there, and weights load and predict nonsense under a wrong one: None stands for
    the published model of that width. Raises WeightsError where there is none, and where a tensor that tells a size
    is missing or is no such tensor.
    """
    weight = _tensor(state_dict, "patch_embed.proj.weight", ndim=4)
    table = _tensor(state_dict, "pos_embed", ndim=3)
    grid = round((table.shape[1] - 1) ** 0.5)
    if 1 + grid**2 != table.shape[1]:
        raise WeightsError(f"pos_embed: {table.shape[1]} rows are not 1 + a square number of tokens")
    width, decoder_width = weight.shape[0], _tensor(state_dict, "mask_token", ndim=3).shape[-1]
    hidden = _tensor(state_dict, "blocks.0.mlp.fc1.weight", ndim=2).shape[0]
    return MaskedAutoencoderShape(
        input_size=grid * weight.shape[-1],
        patch_size=weight.shape[-1],
        in_channels=weight.shape[1],
        encoder_width=width,
        encoder_depth=_depth(state_dict, "blocks"),
        encoder_heads=_heads("encoder", width, encoder_heads, _ENCODER_HEADS),
        decoder_width=decoder_width,
        decoder_depth=_depth(state_dict, "decoder_blocks"),
        decoder_heads=_heads("decoder", decoder_width, decoder_heads, _DECODER_HEADS),
        mlp_ratio=hidden / width,
    )


def load_exactly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights where every key and every shape must fit.

    Raises WeightsError naming missing keys, unexpected keys and wrong shapes, before anything is loaded.
    """
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    problems = misfits(shapes, state_dict, extra="unexpected")
    found = [f"{len(keys)} {what}: {listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"checkpoint does not fit the model: {'; '.join(found)}")
    module.load_state_dict(dict(state_dict))


def misfits(wanted: Mapping[str, torch.Size], state_dict: Mapping[str, Tensor], *, extra: str) -> dict[str, list[str]]:
    """What keeps a checkpoint from a layout of these names and shapes: keys missing, too many (called `extra`), of
    another shape; empty lists where nothing does."""
    return {
        "missing": [key for key in wanted if key not in state_dict],
        extra: [key for key in state_dict if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(shape)}"
            for key, shape in wanted.items()
            if key in state_dict and state_dict[key].shape != shape
        ],
    }


def _tensor(state_dict: Mapping[str, Tensor], key: str, *, ndim: int) -> Tensor:
    tensor = state_dict.get(key)
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        found = "missing" if tensor is None else f"not a tensor of {ndim} dimensions"
        raise WeightsError(
            f"checkpoint: {key} is {found}; expected MAE's layout (cls_token, pos_embed, blocks.0...): "
            f"give the mapping of tensors itself, often found under the key 'model'"
        )
    return tensor


def _heads(part: str, width: int, given: int | None, known: Mapping[int, int]) -> int:
    heads = known.get(width) if given is None else given
    if heads is None:
        widths = ", ".join(f"{own} ({count})" for own, count in known.items())
        raise WeightsError(
            f"checkpoint: no published {part} has the width {width}, and weights do not tell its attention heads; "
            f"known widths (heads): {widths}; give {part}_heads (--set {part}_heads=N)"
        )
    if heads < 1 or width % heads:
        raise WeightsError(f"checkpoint: {part}_heads: {heads} heads do not divide the {part}'s width {width}")
    return heads


def _depth(state_dict: Mapping[str, Tensor], name: str) -> int:
    pattern = re.compile(rf"{name}\.(\d+)\.")
    numbers = [int(match.group(1)) for match in map(pattern.match, state_dict) if match]
    if not numbers:
        raise WeightsError(f"checkpoint: no keys {name}.N.*; expected MAE's layout")
    return max(numbers) + 1


def listed(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
