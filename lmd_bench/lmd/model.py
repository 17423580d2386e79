"""LMD's masked model: a masked autoencoder on latents whose decoder subtracts its position table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lmd_bench.errors import WeightsError
from lmd_bench.lmd.unet import MaskedUNet
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.nn.official import load_exactly

SUBTRACTED = -1
"""Sign of LMD's decoder positions, the "negative SPE" of paper sec. 3.2.2 and of its code."""

MaskedModel = MaskedAutoencoder | MaskedUNet
"""The networks that LMD can train. Both have `shape.num_tokens` and `shape.grid_size`, are called with
(latents, ids, num_kept) for their loss, and fill hidden tokens in with `complete(latents, hidden)`."""

Variant = Literal["discriminant", "generative"]
VARIANT_DEPTHS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "discriminant": MappingProxyType({"encoder_depth": 12, "decoder_depth": 8}),
        "generative": MappingProxyType({"encoder_depth": 8, "decoder_depth": 12}),
    }
)
"""Blocks of the paper's two shapes (sec. 4.1): a deep encoder to classify with, a deep decoder to generate with."""

_NETWORK_PREFIX = "model."


def lmd_vit_base_patch4(
    *, variant: Variant = "discriminant", decoder_width: int = 512, normalize_targets: bool = True
) -> MaskedAutoencoder:
    """The authors' model: ViT-B on 28 x 28 x 4 latents, patch 4, 49 tokens, decoder 512 x 8; 110,817,856 parameters.

    "generative" has 8 encoder blocks and 12 decoder blocks, of width 512 or, after the paper's example, 1024.
    """
    shape = MaskedAutoencoderShape(
        input_size=28, patch_size=4, in_channels=4, decoder_width=decoder_width, **VARIANT_DEPTHS[variant]
    )
    return MaskedAutoencoder(shape, decoder_pos_sign=SUBTRACTED, normalize_targets=normalize_targets)


def file_digest(path: str) -> str:
    """SHA-256 of a weight file, 16 hex digits. Raises WeightsError where it cannot be read."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise WeightsError(
            f"init_weights: {path} cannot be read ({error.strerror}); name the weights.safetensors of a finished run"
        ) from error


def run_behind(path: str) -> tuple[Mapping[str, Any], str]:
    """Options of the run that left a weight file, and its projector's digest.

    Raises WeightsError for a file that does not say, which could have learned anything.
    """
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            metadata = file.metadata() or {}
        options = json.loads(metadata["config"])["options"]
        return {**options}, metadata["projector_digest"]
    except (KeyError, TypeError, ValueError):
        raise WeightsError(
            f"init_weights: {path} does not say what it was trained on; name the weights.safetensors of a finished run"
        ) from None


def check_initial_weights(network: MaskedModel, path: str) -> None:
    """Raise WeightsError unless the file's names and shapes fit `network`, whose device is meta; reads no weights."""
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"init_weights: {path} is not a readable safetensors file: {error}") from error
    _load(network, path, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def load_initial_weights(network: MaskedModel, path: str) -> None:
    """Load a finished run's weights into `network`, from a safetensors file of the whole method.

    Tables that are not trained may be left out there, everything else must fit. Raises WeightsError naming keys that
    are missing, unexpected or of another shape.
    """
    _load(network, path, load_file(Path(path).expanduser()))


def _load(network: MaskedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
    fixed = {name: parameter for name, parameter in network.named_parameters() if not parameter.requires_grad}
    given = {name.removeprefix(_NETWORK_PREFIX): tensor for name, tensor in tensors.items()}
    try:
        load_exactly(network, {**fixed, **given})
    except WeightsError as error:
        raise WeightsError(f"init_weights: {path}: {error}") from error
