"""How a latent projector is trained: values, checks, and the command that repeats them. Imports no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from lmd_bench.errors import ConfigError

PLACE = "lsp train"
KINDS = ("vq", "kl", "light")
_ADAM_LR_PER_IMAGE = 4.5e-6
_ADAMW_LR = 4e-3
_DISC_LR = 2e-4  # pix2pix's, whose discriminator this is, where the autoencoder's own rate is AdamW's
_MIN_PERCEPTUAL_PX = 32
_VALUES = {
    "kind": KINDS,
    "light_transform": ("wavelet", "space_to_depth"),
    "light_wavelet": ("haar", "cdf53", "cdf97"),
    "light_encoder_kernel": (1, 3),
    "codebook_init": ("uniform", "data"),
    "perceptual_net": ("vgg", "alex"),
    "disc_loss": ("hinge", "logistic"),
    "optimizer": ("auto", "adamw", "adam"),
}


_CONVOLUTIONAL = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_attention")
_LIGHT = ("factor", "transform", "wavelet", "encoder_kernel", "encoder_hidden", "decoder_widths", "decoder_blocks")
_CODEBOOK = ("num_codes", "beta", "legacy_beta", "codebook_weight", "quantised_share", "codebook_init")
_REVIVAL = ("codebook_init_step", "revive_dead_codes", "revive_every")
_OF_KIND = {
    "vq": (*_CONVOLUTIONAL, *_CODEBOOK, *_REVIVAL, "latent_noise"),
    "kl": (*_CONVOLUTIONAL, "kl_weight"),
    "light": (*(f"light_{name}" for name in _LIGHT), "latent_weight", "latent_noise"),
}
"""Options that have an effect with some kinds only."""


def _option(default: Any, text: str) -> Any:
    """A field with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LSPTrainOptions:
    """How a latent space projector is trained. Raises ConfigError for values that cannot work together.

    Each field's sentence says what it is; None means that `resolve` fills it in.
    """

    kind: str = _option("vq", "vq (VQGAN, diffusers VQModel), kl (AutoencoderKL) or light (our cheap encoder).")
    seed: int = _option(0, "Seed of weights, batches, crops and posterior samples; neither scenes nor held-out images.")
    data_seed: int = _option(0, "Which scenes are drawn, which images of a folder are held out: data.seed of runs.")
    steps: int = _option(9000, "Training steps.")
    batch_size: int = _option(16, "Images a step.")
    image_size: int = _option(64, "px; side of the square images.")
    crop_size: int = _option(32, "px; side of the random crops trained on, which cost less than whole images.")
    data: str | None = _option(None, "Folder of images to train on, or scenes. Default: scenes.")
    num_images: int = _option(8192, "Training scenes, drawn once and held in memory; a folder is used whole.")
    num_held_out: int = _option(256, "Images measured on, never trained on; of a folder a quarter at most.")
    init_from: str | None = _option(
        None, "Folder of an earlier training to start from: of the same kind and sizes, or a kl to make a vq of."
    )
    turn: bool = _option(True, "Turn batches by a random multiple of 90 degrees.")
    # The network
    block_out_channels: tuple[int, ...] = _option((32, 32, 32, 32), "Widths, one per resolution; f = 2^(number - 1).")
    # With 0 the encoder is only convolutions on the way down, all of one width: three times cheaper than with 1, for
    # a network that every training step of a method runs. The decoder always has one block more.
    layers_per_block: int = _option(0, "Residual blocks per resolution of vq and kl; the decoder has one more.")
    latent_channels: int = _option(4, "Numbers per latent position.")
    norm_num_groups: int = _option(8, "Groups of the group norms of vq and kl.")
    mid_attention: bool = _option(False, "Self-attention at the latent resolution of vq and kl.")
    light_factor: int = _option(8, "light: pixels to a latent position, a power of two.")
    light_transform: str = _option("wavelet", "light: wavelet or space_to_depth before the encoder.")
    light_wavelet: str = _option("haar", "light: haar, cdf53 or cdf97.")
    light_encoder_kernel: int = _option(3, "light: 3 looks at neighbours, 1 sees each position alone (no leak).")
    light_encoder_hidden: int = _option(64, "light: width of the encoder's nonlinear branch; 0: linear.")
    light_decoder_widths: tuple[int, ...] = _option((96, 64, 32), "light: widths of the decoder, from the latents up.")
    light_decoder_blocks: tuple[int, ...] = _option((3, 2, 2), "light: residual blocks of each of them.")
    # Regularisation of the latents
    num_codes: int = _option(1024, "vq: vectors in the codebook.")
    beta: float = _option(0.25, "vq: weight of the commitment term (eq. 4).")
    legacy_beta: bool = _option(False, "vq: beta on the codebook term instead, as in the taming-transformers release.")
    codebook_weight: float = _option(1.0, "vq: weight of codebook and commitment terms together.")
    quantised_share: float = _option(1.0, "vq: share of images decoded from quantised latents, the rest continuous.")
    codebook_init: str = _option("uniform", "vq: uniform in +-1/K, or data (k-means of latents at a later step).")
    codebook_init_step: int = _option(500, "vq: step of `data`; nothing is quantised before it.")
    revive_dead_codes: bool = _option(False, "vq: put codes that a whole window did not use onto current latents.")
    revive_every: int = _option(500, "vq: steps of that window.")
    kl_weight: float = _option(1e-5, "kl: per nat of a latent number.")
    latent_weight: float = _option(0.0, "light: weight of the latents' mean square.")
    latent_noise: float = _option(
        0.0, "vq and light: Gaussian noise on the latents that are decoded, as a share of each channel's own spread."
    )
    # Reconstruction
    l1_weight: float = _option(0.1, "Weight of the mean absolute error, images in [-1, 1].")
    l2_weight: float = _option(1.0, "Weight of the mean squared error (eq. 4), images in [-1, 1].")
    perceptual_weight: float | None = _option(None, "Weight of LPIPS. Default: 1 where its weights are there, or 0.")
    perceptual_net: str = _option("vgg", "Trunk of LPIPS: vgg or alex.")
    perceptual_trunk: str | None = _option(None, "File of the trunk's weights. Default: torch hub's folder.")
    # The adversary
    disc_weight: float | None = _option(None, "Times the adaptive weight; 0: no discriminator. Default: 0.8 for vq.")
    disc_start: int | None = _option(None, "First step with a discriminator. Default: half of the steps.")
    disc_loss: str = _option("hinge", "hinge, or logistic (eq. 5).")
    disc_layers: int = _option(3, "Convolutions of stride 2 in the patch discriminator.")
    disc_channels: int = _option(64, "Width of its first layer.")
    # Optimizers
    optimizer: str = _option(
        "auto",
        "adamw: AdamW(0.9, 0.99), linear warm-up, half a cosine, gradient norm at most 1; adam: Adam(0.5, 0.9) at a"
        " constant rate, as released for VQGAN; auto: adam with a discriminator, else adamw.",
    )
    lr: float | None = _option(None, "Peak rate. Default: adamw 4e-3, adam 4.5e-6 times the batch size.")
    disc_lr: float | None = _option(None, "Rate of the discriminator's Adam(0.5, 0.9). Default: adam's lr, else 2e-4.")
    lr_warmup_steps: int = _option(100, "Linear rise of adamw's rate.")
    # Afterwards and beside
    normalise_latents: bool = _option(True, "Fold mean 0 and standard deviation 1 of the latents into the weights.")
    half: bool = _option(False, "Write the weights in 16-bit floats.")
    log_every: int = _option(100, "Steps between rows of training.csv.")
    eval_every: int = _option(1000, "Steps between measurements on held-out images.")
    save_every: int = _option(1000, "Steps between training states, from which the same command goes on.")

    def __post_init__(self) -> None:
        for check in (_check_values, _check_numbers, _check_network, _check_images, _check_adversary):
            check(self)

    @property
    def factor(self) -> int:
        """Pixels to a latent position, along each axis."""
        return self.light_factor if self.kind == "light" else 2 ** (len(self.block_out_channels) - 1)

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator takes part; of resolved options."""
        return bool(self.disc_weight)

    def command(self, out: Path) -> str:
        """The command that repeats this training, with every option, so that it outlives changes of the defaults."""
        words = ["lmd-bench", "lsp", "train", "--out", str(out)]
        for name, value in option_texts(self).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif value is not None:
                words += [flag, value]
        return shlex.join(words)


def command_line_options() -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of every option on a command line, where a tuple is numbers between commas."""
    found: list[tuple[str, Any, Any, str]] = []
    for entry, default in zip(fields(LSPTrainOptions), option_texts(LSPTrainOptions).values(), strict=True):
        kind = get_type_hints(LSPTrainOptions)[entry.name]
        if isinstance(entry.default, tuple):
            found.append((entry.name, str, default, entry.metadata["help"]))
        else:
            found.append((entry.name, kind, entry.default, entry.metadata["help"]))
    return found


def parse_options(values: Mapping[str, Any]) -> LSPTrainOptions:
    """The options from a command line's values. Raises ConfigError."""
    parsed = dict(values)
    for entry in fields(LSPTrainOptions):
        if isinstance(entry.default, tuple):
            parsed[entry.name] = _numbers(entry.name, values[entry.name])
    if parsed["data"] == "scenes":
        parsed["data"] = None
    return LSPTrainOptions(**parsed)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        flag = name.replace("_", "-")
        raise ConfigError(f"{PLACE}: --{flag} {text}: whole numbers separated by commas, such as 32,64") from None


def option_texts(options: LSPTrainOptions | type[LSPTrainOptions]) -> dict[str, str | bool | None]:
    """Every option as the command line writes it; of the class: the defaults. bool for switches, None for absent."""
    texts: dict[str, str | bool | None] = {}
    for entry in fields(options):
        value = entry.default if isinstance(options, type) else getattr(options, entry.name)
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        texts[entry.name] = value if value is None or isinstance(value, bool) else str(value)
    return texts


def resolve(options: LSPTrainOptions, *, perceptual: bool) -> LSPTrainOptions:
    """Fills in every None that has a default of its own; `perceptual`: whether LPIPS can be had on this machine."""
    disc_weight = options.disc_weight
    if disc_weight is None:
        disc_weight = 0.8 if options.kind == "vq" else 0.0
    optimizer = options.optimizer
    if optimizer == "auto":
        optimizer = "adam" if disc_weight > 0 else "adamw"
    lr = options.lr
    if lr is None:
        lr = _ADAMW_LR if optimizer == "adamw" else _ADAM_LR_PER_IMAGE * options.batch_size
    disc_lr = options.disc_lr
    if disc_lr is None:
        disc_lr = _DISC_LR if optimizer == "adamw" else lr
    weight = options.perceptual_weight
    if weight is None:
        weight = 1.0 if perceptual and options.crop_size >= _MIN_PERCEPTUAL_PX else 0.0
    return replace(
        options,
        disc_weight=disc_weight,
        disc_start=options.steps // 2 if options.disc_start is None else options.disc_start,
        optimizer=optimizer,
        lr=lr,
        disc_lr=disc_lr,
        perceptual_weight=weight,
    )


def changed_options(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Names of options that differ between two `option_texts`; how often states are saved may change freely."""
    names = [name for name in (*now, *(before.keys() - now.keys())) if name != "save_every"]
    return [name for name in names if now.get(name) != before.get(name) or (name in now) != (name in before)]


def unused_options(options: LSPTrainOptions) -> list[str]:
    """Names of options that differ from their defaults without having an effect; of options not yet resolved."""
    unused = {name for kind, names in _OF_KIND.items() if kind != options.kind for name in names}
    unused -= set(_OF_KIND[options.kind])
    names = {entry.name: entry for entry in fields(options)}
    if options.kind == "vq" and options.codebook_init == "uniform":
        unused.add("codebook_init_step")
    if options.disc_weight == 0 or (options.disc_weight is None and options.kind != "vq"):
        unused |= {name for name in names if name.startswith("disc_")} - {"disc_weight"}
    if options.data is not None:
        unused.add("num_images")
    return [name for name, entry in names.items() if name in unused and getattr(options, name) != entry.default]


def _refuse(text: str) -> ConfigError:
    return ConfigError(f"{PLACE}: {text}")


def _check_values(options: LSPTrainOptions) -> None:
    for name, allowed in _VALUES.items():
        value = getattr(options, name)
        if value not in allowed:
            raise _refuse(f"{name} {value!r} must be one of {', '.join(map(str, allowed))}")


def _check_numbers(options: LSPTrainOptions) -> None:
    at_least = {
        1: ("steps", "num_held_out", "batch_size", "latent_channels", "norm_num_groups", "revive_every", "disc_layers"),
        0: ("seed", "data_seed", "layers_per_block", "codebook_init_step", "lr_warmup_steps"),
    }
    at_least[1] += ("disc_channels", "log_every", "eval_every", "save_every")
    for least, names in at_least.items():
        for name in names:
            if getattr(options, name) < least:
                raise _refuse(f"{name} {getattr(options, name)} must be at least {least}")
    if options.num_codes < 2:
        raise _refuse(f"num_codes {options.num_codes} must be at least 2")
    if options.kind == "vq" and options.codebook_init == "data" and options.codebook_init_step >= options.steps:
        raise _refuse(f"codebook_init_step {options.codebook_init_step} must come before steps {options.steps}")
    weights = [entry.name for entry in fields(options) if entry.name.endswith("_weight")]
    for name in (*weights, "beta", "disc_start"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise _refuse(f"{name} {value} must be a number from 0 on")
    for name in ("lr", "disc_lr"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise _refuse(f"{name} {value} must be a number above 0")
    if options.l1_weight == options.l2_weight == 0 and not options.perceptual_weight:
        raise _refuse("nothing to reconstruct for; set l1_weight, l2_weight or perceptual_weight above 0")
    if not 0 <= options.latent_noise < math.inf:
        raise _refuse(f"latent_noise {options.latent_noise} must be a number from 0 on")
    if options.latent_noise and options.kind == "kl":
        raise _refuse("latent_noise is for vq and light; kl learns its own")
    if not 0 <= options.quantised_share <= 1:
        raise _refuse(f"quantised_share {options.quantised_share} must be from 0 to 1")


def _check_network(options: LSPTrainOptions) -> None:
    if options.kind == "light":
        _check_light(options)
        return
    channels = options.block_out_channels
    if not channels or min(channels) < 1:
        raise _refuse(f"block_out_channels {channels} need numbers from 1 on")
    if options.layers_per_block == 0 and len(set(channels)) > 1:
        raise _refuse(f"block_out_channels {channels} differ; with layers_per_block 0 they must be equal")
    if any(width % options.norm_num_groups for width in channels):
        raise _refuse(f"block_out_channels {channels} must be multiples of norm_num_groups {options.norm_num_groups}")


def _check_light(options: LSPTrainOptions) -> None:
    factor, widths, blocks = options.light_factor, options.light_decoder_widths, options.light_decoder_blocks
    if factor < 2 or factor & (factor - 1):
        raise _refuse(f"light_factor {factor} must be a power of two from 2 on")
    if options.light_encoder_hidden < 0:
        raise _refuse(f"light_encoder_hidden {options.light_encoder_hidden} must be at least 0")
    if not 1 <= len(widths) <= factor.bit_length() or len(widths) != len(blocks) or min(widths) < 1 or min(blocks) < 0:
        raise _refuse(
            f"light_decoder_widths {widths} and light_decoder_blocks {blocks} need one number per level each, at most"
            f" {factor.bit_length()} levels for factor {factor}"
        )


def _check_images(options: LSPTrainOptions) -> None:
    if not 8 <= options.image_size <= 4096:
        raise _refuse(f"image_size {options.image_size} must be from 8 to 4096 px")
    for name in ("image_size", "crop_size"):
        if getattr(options, name) % options.factor:
            raise _refuse(f"{name} {getattr(options, name)} is not divisible by the factor {options.factor}")
    if not 0 < options.crop_size <= options.image_size:
        raise _refuse(f"crop_size {options.crop_size} must be from 1 to image_size {options.image_size}")
    if options.data is None and options.batch_size > options.num_images:
        raise _refuse(f"batch_size {options.batch_size} must be from 1 to num_images {options.num_images}")
    if options.perceptual_weight and options.crop_size < _MIN_PERCEPTUAL_PX:
        raise _refuse(f"crop_size {options.crop_size} is too small for LPIPS; use {_MIN_PERCEPTUAL_PX} px or more")


def _check_adversary(options: LSPTrainOptions) -> None:
    if options.disc_weight == 0 or (options.disc_weight is None and options.kind != "vq"):
        return
    if options.disc_start is not None and options.disc_start >= options.steps:
        raise _refuse(
            f"disc_start {options.disc_start} leaves no step to the discriminator; give one below steps"
            f" {options.steps}, or disc_weight 0"
        )
    least = 3 * 2**options.disc_layers  # the two last convolutions take away one position each
    if options.crop_size < least:
        raise _refuse(
            f"crop_size {options.crop_size} is too small for a discriminator of {options.disc_layers} layers; use"
            f" {least} or more, fewer disc_layers, or disc_weight 0"
        )
