"""Autoencoders in the layout of taming-transformers and latent-diffusion, as diffusers models.

Both repositories (CompVis) write the same names, and so does Stable Diffusion, under `first_stage_model.`. Sizes are
read off the tensors; the group norms' 32 groups leave no trace and are those of every released model.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from lmd_bench.checkpoints.files import read_checkpoint
from lmd_bench.errors import WeightsError
from lmd_bench.nn.official import count_of, listed, misfits, tensor_of
from lmd_bench.projector.config import WEIGHTS_FILE
from lmd_bench.projector.discriminator import PatchDiscriminator

_EXPECTED = "expected the layout of taming-transformers or latent-diffusion"
_NORM_GROUPS = 32
_CODEBOOK = "quantize.embedding.weight"
_FIRST_STAGE = "first_stage_model."
_SCALE_FACTOR = "scale_factor"
_DISCRIMINATOR = "loss.discriminator."

# What training leaves in a checkpoint beside the autoencoder. Anything else is an error: it may change the output.
_LEFT_OUT_OF_AUTOENCODER = re.compile(r"(loss|model_ema)\..+|colorize")
_LEFT_OUT_OF_DIFFUSION = re.compile(
    r"(model|model_ema|cond_stage_models?|first_stage_model\.(loss|model_ema))\..+|first_stage_model\.colorize"
    r"|betas|lvlb_weights|logvar|cond_ids|posterior_\w+"
    r"|((sqrt|log|sqrt_recip|sqrt_recipm1)_)?(one_minus_)?alphas_cumprod(_prev)?"
)

# diffusers' names for parts of the network -> CompVis' names
_RESIDUAL_PARTS = {"conv_shortcut": "nin_shortcut"}
_ATTENTION_PARTS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

# -- from tensors to models -------------------------------------------------------------------------------------------


def vq_from_compvis(state_dict: Mapping[str, Tensor], *, scaling_factor: float = 1.0) -> VQModel:
    """A VQModel from the weights of taming's or latent-diffusion's, in evaluation mode, float32.

    state_dict: `encoder.`, `decoder.`, `quant_conv.`, `post_quant_conv.` and `quantize.` keys, nothing else.
    scaling_factor: written into the configuration for diffusion pipelines; the weights know none.
    Raises WeightsError naming keys that are missing, unexpected or of another shape.
    """
    if _CODEBOOK not in state_dict:
        raise WeightsError(f"checkpoint: {_CODEBOOK} is missing; kl_from_compvis reads KL autoencoders")
    num_vectors, width = _tensor(state_dict, _CODEBOOK, ndim=2).shape
    sizes = _sizes(state_dict)
    model = VQModel(**sizes, num_vq_embeddings=num_vectors, vq_embed_dim=width, scaling_factor=scaling_factor)
    _fill(model, state_dict, num_levels=len(sizes["block_out_channels"]))
    return model.eval()


def kl_from_compvis(state_dict: Mapping[str, Tensor], *, scaling_factor: float = 1.0) -> AutoencoderKL:
    """An AutoencoderKL from the weights of latent-diffusion's, in evaluation mode, float32.

    state_dict: `encoder.`, `decoder.`, `quant_conv.` and `post_quant_conv.` keys, nothing else.
    scaling_factor: as for `vq_from_compvis`.
    Raises WeightsError as `vq_from_compvis`, and where the latents' width changes on the way (diffusers has no such).
    """
    if _CODEBOOK in state_dict:
        raise WeightsError(f"checkpoint: has {_CODEBOOK}; a VQ model, which vq_from_compvis reads")
    width, hidden = _tensor(state_dict, "quant_conv.weight", ndim=4).shape[:2]
    if width != hidden:
        raise WeightsError(
            f"checkpoint: quant_conv takes {hidden} channels to {width}; AutoencoderKL keeps their number"
        )
    sizes = _sizes(state_dict)
    model = AutoencoderKL(**sizes, scaling_factor=scaling_factor)
    _fill(model, state_dict, num_levels=len(sizes["block_out_channels"]))
    return model.eval()


def discriminator_from_compvis(state_dict: Mapping[str, Tensor]) -> PatchDiscriminator:
    """The patch discriminator of a whole VQGAN or latent-diffusion checkpoint, or of its own keys `main.N...`.

    Evaluation mode, float32; batch statistics are read too. Raises WeightsError naming keys that are missing,
    unexpected (a discriminator with activation norm has other ones) or of another shape.
    """
    inside = any(key.startswith(_DISCRIMINATOR) for key in state_dict)
    own = _under(state_dict, _DISCRIMINATOR) if inside else dict(state_dict)
    first = _tensor(own, "main.0.weight", ndim=4)
    num_layers = sum(tensor.ndim == 4 for tensor in own.values()) - 2
    if num_layers < 1:
        raise WeightsError("checkpoint: fewer than 3 convolutions main.N.weight; not a patch discriminator")
    model = PatchDiscriminator(in_channels=first.shape[1], width=first.shape[0], num_layers=num_layers)
    _check_fit({key: tensor.shape for key, tensor in model.state_dict().items()}, own)
    model.load_state_dict(own)
    return model.eval()


def _sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What VQModel and AutoencoderKL share in their configuration."""
    levels = count_of(state_dict, "encoder.down.N.", layout=_EXPECTED)
    widths = [_tensor(state_dict, f"encoder.down.{i}.block.0.conv1.weight", ndim=4).shape[0] for i in range(levels)]
    unfit = [width for width in widths if width % _NORM_GROUPS]
    if unfit:
        raise WeightsError(f"checkpoint: {unfit[0]} channels do not split into the {_NORM_GROUPS} groups of its norms")
    down = [
        "AttnDownEncoderBlock2D" if _attends(state_dict, f"encoder.down.{i}") else "DownEncoderBlock2D"
        for i in range(levels)
    ]
    up = [
        "AttnUpDecoderBlock2D" if _attends(state_dict, f"decoder.up.{i}") else "UpDecoderBlock2D"
        for i in reversed(range(levels))
    ]
    return {
        "in_channels": _tensor(state_dict, "encoder.conv_in.weight", ndim=4).shape[1],
        "out_channels": _tensor(state_dict, "decoder.conv_out.weight", ndim=4).shape[0],
        "latent_channels": _tensor(state_dict, "decoder.conv_in.weight", ndim=4).shape[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": count_of(state_dict, "encoder.down.0.block.N.", layout=_EXPECTED),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "norm_num_groups": _NORM_GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state_dict,
        "sample_size": 256,  # px; of the released models. The network takes any size its factor divides
    }


def _attends(state_dict: Mapping[str, Tensor], level: str) -> bool:
    return f"{level}.attn.0.norm.weight" in state_dict


def _fill(model: nn.Module, state_dict: Mapping[str, Tensor], *, num_levels: int) -> None:
    own = model.state_dict()
    source = {key: _compvis_name(key, num_levels) for key in own}
    _check_fit({source[key]: _compvis_shape(key, tensor) for key, tensor in own.items()}, state_dict)
    model.load_state_dict({key: state_dict[source[key]].reshape(tensor.shape) for key, tensor in own.items()})


def _compvis_name(key: str, num_levels: int) -> str:
    """What CompVis call a tensor of diffusers' VQModel or AutoencoderKL. Decoder levels count from the other end."""
    key = re.sub(r"^(\w+)\.conv_norm_out\.", r"\1.norm_out.", key)
    key = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", key)
    key = re.sub(r"\.mid_block\.attentions\.0\.", ".mid.attn_1.", key)
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{num_levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key)
    key = re.sub(r"\.attentions\.(\d+)\.", r".attn.\1.", key)
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    for ours, theirs in (_ATTENTION_PARTS if ".attn" in key else _RESIDUAL_PARTS).items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def _compvis_shape(key: str, tensor: Tensor) -> torch.Size:
    """CompVis project attention by 1 x 1 convolutions where diffusers has linear layers."""
    is_projection = ".attentions." in key and tensor.ndim == 2
    return torch.Size([*tensor.shape, 1, 1]) if is_projection else tensor.shape


# -- from files to folders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportReport:
    """What an import made of a checkpoint: every key is either used or left out."""

    out: Path  # a diffusers folder
    kind: Literal["vq", "kl"]
    factor: int  # image pixels to one latent position, along each axis
    latent_channels: int
    num_parameters: int
    scaling_factor: float  # 1 / standard deviation of the latents, as the checkpoint has it; 1 where it has none
    used: tuple[str, ...]  # keys of the checkpoint
    left_out: tuple[str, ...]

    @property
    def left_out_groups(self) -> dict[str, int]:
        """Left-out keys by their first two names (`loss.discriminator`), with how many there are of each.

        Averages (`model_ema`) have names without dots and are one group.
        """
        return dict(Counter(re.sub(r"^(model_ema|[^.]+\.[^.]+)\..*", r"\1", key) for key in self.left_out))


def import_checkpoint(path: Path, out: Path) -> ImportReport:
    """Write the autoencoder of a CompVis checkpoint (.ckpt, .pt, .pth or .safetensors) as a diffusers folder.

    Whole diffusion checkpoints serve too: their first stage is taken, and their `scale_factor` where there is one.
    Of an autoencoder that was trained with an average (`model_ema.`) the plain weights are taken, as its own code does
    outside validation.
    `out` must not exist (an empty folder may); it is there complete or not at all.
    Raises WeightsError for a file that is missing, unreadable or holds pickled objects, for keys that are missing or
    unknown, and for an `out` that is taken.
    """
    if out.name in ("", ".."):
        raise WeightsError(f"{out}: a folder is made and takes this name; give one that is not there yet")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise WeightsError(f"{out}: exists already; name a folder that does not, or is empty")
    state_dict = read_checkpoint(path).tensors
    try:
        weights, used, scaling_factor = _autoencoder_part(state_dict)
        kind: Literal["vq", "kl"] = "vq" if _CODEBOOK in weights else "kl"
        convert = vq_from_compvis if kind == "vq" else kl_from_compvis
        model = convert(weights, scaling_factor=scaling_factor)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    _write_folder(model, out)
    return ImportReport(
        out=out,
        kind=kind,
        factor=2 ** (len(model.config["block_out_channels"]) - 1),
        latent_channels=weights["quant_conv.weight"].shape[0] // (1 if kind == "vq" else 2),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        scaling_factor=scaling_factor,
        used=tuple(key for key in state_dict if key in used),
        left_out=tuple(key for key in state_dict if key not in used),
    )


def _autoencoder_part(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str], float]:
    """The autoencoder's weights under their own names, the checkpoint's keys that are used, the scaling factor."""
    whole = any(key.startswith(_FIRST_STAGE) for key in state_dict)
    left_out = _LEFT_OUT_OF_DIFFUSION if whole else _LEFT_OUT_OF_AUTOENCODER
    used = {key for key in state_dict if not left_out.fullmatch(key)}
    scaling_factor = 1.0
    if whole and _SCALE_FACTOR in used:
        scaling_factor = float(state_dict[_SCALE_FACTOR])
    weights = {key: state_dict[key] for key in state_dict if key in used and not (whole and key == _SCALE_FACTOR)}
    if whole:
        strays = [key for key in weights if not key.startswith(_FIRST_STAGE)]
        if strays:
            raise WeightsError(
                f"checkpoint does not fit CompVis' layout; keys unknown ({len(strays)}): {listed(strays)}"
            )
        weights = _under(weights, _FIRST_STAGE)
    return weights, used, scaling_factor


def _under(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def _write_folder(model: VQModel | AutoencoderKL, out: Path) -> None:
    temporary = out.with_name(f".{out.name}-{uuid4().hex[:8]}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(temporary, safe_serialization=True)
        (temporary / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone
        temporary.replace(out)
    except OSError as error:
        raise WeightsError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_fit(wanted: Mapping[str, torch.Size], state_dict: Mapping[str, Tensor]) -> None:
    """Every key and every shape must fit. Raises WeightsError naming those that do not in the checkpoint's words."""
    problems = misfits(wanted, state_dict, extra="unknown")
    found = [f"{what} ({len(keys)}): {listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"checkpoint does not fit CompVis' layout; keys {'; '.join(found)}")


def _tensor(state_dict: Mapping[str, Tensor], key: str, *, ndim: int) -> Tensor:
    return tensor_of(state_dict, key, ndim=ndim, layout=_EXPECTED)
