"""Checkpoints in the authors' layout (MAE's names, which LMD's code kept) and the sizes that can be read off them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoderShape

_NAMED_IN_ERRORS = 6
_ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width -> attention heads: ViT-Ti and S (Touvron et al. 2021, table 1), ViT-B, L and H (Dosovitskiy et al. 2020,
table 1)."""
DECODER_HEADS = {512: 16}
"""The same of MAE's decoder, which LMD, GreenMIM and UM-MAE kept."""
_LAYOUT = "expected MAE's layout (cls_token, pos_embed, blocks.0..., mask_token, decoder_blocks.0...)"


def shape_of_checkpoint(
    state_dict: Mapping[str, Tensor], *, encoder_heads: int | None = None, decoder_heads: int | None = None
) -> MaskedAutoencoderShape:
    """The sizes of a masked autoencoder from its weights.

    Numbers of heads leave no trace there, and weights load and predict nonsense under a wrong one: None stands for
    the published model of that width. Raises WeightsError where there is none, for an encoder without its decoder, and
    where a tensor that tells a size is missing or is no such tensor.
    """
    refuse_encoder_alone(state_dict, encoder=("blocks.0.",))
    weight = tensor_of(state_dict, "patch_embed.proj.weight", ndim=4, layout=_LAYOUT)
    tensor_of(state_dict, "cls_token", ndim=3, layout=_LAYOUT)  # UM-MAE's pyramids have the other three
    table = tensor_of(state_dict, "pos_embed", ndim=3, layout=_LAYOUT)
    grid = round((table.shape[1] - 1) ** 0.5)
    if 1 + grid**2 != table.shape[1]:
        raise WeightsError(f"checkpoint: {table.shape[1]} rows of pos_embed are not 1 + a square number of tokens")
    width = weight.shape[0]
    decoder_width = tensor_of(state_dict, "mask_token", ndim=3, layout=_LAYOUT).shape[-1]
    hidden = tensor_of(state_dict, "blocks.0.mlp.fc1.weight", ndim=2, layout=_LAYOUT).shape[0]
    return MaskedAutoencoderShape(
        input_size=grid * weight.shape[-1],
        patch_size=weight.shape[-1],
        in_channels=weight.shape[1],
        encoder_width=width,
        encoder_depth=count_of(state_dict, "blocks.N.", layout=_LAYOUT),
        encoder_heads=heads_of("encoder", width, encoder_heads, _ENCODER_HEADS),
        decoder_width=decoder_width,
        decoder_depth=count_of(state_dict, "decoder_blocks.N.", layout=_LAYOUT),
        decoder_heads=heads_of("decoder", decoder_width, decoder_heads, DECODER_HEADS),
        mlp_ratio=hidden / width,
    )


def load_exactly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights where every key and every shape must fit.

    Raises WeightsError naming missing keys, unexpected keys and wrong shapes, before anything is loaded.
    """
    require_fit({key: tensor.shape for key, tensor in module.state_dict().items()}, state_dict)
    module.load_state_dict(dict(state_dict))


def require_fit(wanted: Mapping[str, torch.Size], state_dict: Mapping[str, Tensor]) -> None:
    """Raise WeightsError naming missing keys, unexpected keys and wrong shapes, unless a checkpoint has exactly these
    names and shapes."""
    problems = misfits(wanted, state_dict, extra="unexpected")
    found = [f"{len(keys)} {what}: {listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"checkpoint does not fit the model: {'; '.join(found)}")


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


@contextmanager
def reading_sizes() -> Iterator[None]:
    """Within it, options and sizes that a config or a method's `check` refuses raise WeightsError: what a checkpoint
    holds, with the options that are given, makes no model."""
    try:
        yield
    except ValidationError as error:
        raise WeightsError(f"checkpoint: {first_problem(error)}") from error
    except ConfigError as error:
        raise WeightsError(f"checkpoint: {error}") from error


def first_problem(error: ValidationError) -> str:
    """The first of what pydantic refused, in one line: "option: why"."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def refuse_encoder_alone(
    state_dict: Mapping[str, Tensor],
    *,
    encoder: tuple[str, ...],
    decoder: tuple[str, ...] = ("decoder", "mask_token", "vis_mask_token"),
) -> None:
    """Raise WeightsError for a checkpoint that has keys starting as the encoder's blocks, and none as the decoder's."""
    if any(key.startswith(encoder) for key in state_dict) and not any(key.startswith(decoder) for key in state_dict):
        raise WeightsError(
            "checkpoint: an encoder alone (as for fine-tuning); take the pre-training checkpoint with its decoder"
        )


def tensor_of(state_dict: Mapping[str, Tensor], key: str, *, ndim: int, layout: str) -> Tensor:
    """The tensor of a key. Raises WeightsError, ending in `layout` ("expected ..."), unless it is there and has `ndim`
    dimensions."""
    tensor = state_dict.get(key)
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        found = "missing" if tensor is None else f"not a tensor of {ndim} dimensions"
        raise WeightsError(f"checkpoint: {key} is {found}; {layout}")
    return tensor


def numbers_in(state_dict: Mapping[str, Tensor], start: str) -> list[int]:
    """The numbers, ascending, that stand for the N of `start` ("blocks.N.") at the start of keys."""
    pattern = re.compile(re.escape(start).replace("N", r"(\d+)"))
    return sorted({int(match.group(1)) for match in map(pattern.match, state_dict) if match})


def count_of(state_dict: Mapping[str, Tensor], start: str, *, layout: str) -> int:
    """How many parts a checkpoint has whose keys start so, numbered from 0 in place of the N ("blocks.N.").

    Raises WeightsError, ending in `layout`, where it has none.
    """
    numbers = numbers_in(state_dict, start)
    if not numbers:
        raise WeightsError(f"checkpoint: no keys {start}*; {layout}")
    return numbers[-1] + 1


def heads_of(part: str, width: int, given: int | None, known: Mapping[int, int]) -> int:
    """Attention heads of an "encoder" or "decoder" of this width: those given, or those `known` to be published.

    Raises WeightsError where the width was not published, and where the heads do not divide it.
    """
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


def listed(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
