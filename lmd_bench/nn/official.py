"""Checkpoints in the authors' layout (MAE's names, which LMD's code kept) and the sizes that can be read off them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoderShape

_NAMED_IN_ERRORS = 6


def shape_of_checkpoint(
    state_dict: Mapping[str, Tensor], *, encoder_heads: int, decoder_heads: int
) -> MaskedAutoencoderShape:
    """The sizes of a masked autoencoder from its weights. Head counts leave no trace there and are given.

    Raises WeightsError where a tensor that tells a size is missing or is no such tensor.
    """
    weight = _tensor(state_dict, "patch_embed.proj.weight", ndim=4)
    table = _tensor(state_dict, "pos_embed", ndim=3)
    grid = round((table.shape[1] - 1) ** 0.5)
    if 1 + grid**2 != table.shape[1]:
        raise WeightsError(f"pos_embed: {table.shape[1]} rows are not 1 + a square number of tokens")
    width = weight.shape[0]
    hidden = _tensor(state_dict, "blocks.0.mlp.fc1.weight", ndim=2).shape[0]
    return MaskedAutoencoderShape(
        input_size=grid * weight.shape[-1],
        patch_size=weight.shape[-1],
        in_channels=weight.shape[1],
        encoder_width=width,
        encoder_depth=_depth(state_dict, "blocks"),
        encoder_heads=encoder_heads,
        decoder_width=_tensor(state_dict, "mask_token", ndim=3).shape[-1],
        decoder_depth=_depth(state_dict, "decoder_blocks"),
        decoder_heads=decoder_heads,
        mlp_ratio=hidden / width,
    )


def load_exactly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights where every key and every shape must fit.

    Raises WeightsError naming missing keys, unexpected keys and wrong shapes, before anything is loaded.
    """
    own = module.state_dict()
    shared = [key for key in own if key in state_dict]
    problems = {
        "missing": [key for key in own if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
            for key in shared
            if state_dict[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"checkpoint does not fit the model: {'; '.join(found)}")
    module.load_state_dict(dict(state_dict))


def _tensor(state_dict: Mapping[str, Tensor], key: str, *, ndim: int) -> Tensor:
    tensor = state_dict.get(key)
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        found = "missing" if tensor is None else f"not a tensor of {ndim} dimensions"
        raise WeightsError(
            f"checkpoint: {key} is {found}; expected MAE's layout (cls_token, pos_embed, blocks.0...): "
            f"give the mapping of tensors itself, often found under the key 'model'"
        )
    return tensor


def _depth(state_dict: Mapping[str, Tensor], name: str) -> int:
    pattern = re.compile(rf"{name}\.(\d+)\.")
    numbers = [int(match.group(1)) for match in map(pattern.match, state_dict) if match]
    if not numbers:
        raise WeightsError(f"checkpoint: no keys {name}.N.*; expected MAE's layout")
    return max(numbers) + 1


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
