"""Trains a small KL autoencoder on scenes: the projector that ships with the package, or one like it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.projector.config import WEIGHTS_FILE
from lmd_bench.projector.kl import KLProjector, load_autoencoder

HELD_OUT_START = 2**40
_LOG_EVERY_STEPS = 100
_FIRST_LOGVAR = -6.0


@dataclass(frozen=True)
class KLTrainOptions:
    """How a KL autoencoder is trained. Raises ConfigError for values that cannot work together."""

    seed: int = 0  # of weights, order of images, and posterior samples; scenes are those of this seed too
    steps: int = 9000
    batch_size: int = 16
    image_size: int = 64  # px
    crop_size: int = 32  # px; training sees random square crops of this size, which cost less than whole images
    num_images: int = 8192  # scenes 0 to num_images - 1, drawn once and held in memory
    num_held_out: int = 256  # scenes from 2^40 on
    lr: float = 4e-3  # peak of AdamW's rate: linear rise, then half a cosine to 0
    lr_warmup_steps: int = 100
    block_out_channels: tuple[int, ...] = (32, 32, 32, 32)  # one per resolution; the factor is 2^(number - 1)
    # Residual blocks per resolution; the decoder has one more. With 0 the encoder is only convolutions on the way
    # down, all of one width: three times cheaper than with 1, for a network that every training step runs.
    layers_per_block: int = 0
    latent_channels: int = 4
    norm_num_groups: int = 8
    l1_weight: float = 0.1
    l2_weight: float = 1.0
    kl_weight: float = 1e-5  # of the KL divergence in nats per latent number

    def __post_init__(self) -> None:
        channels = self.block_out_channels
        if self.layers_per_block == 0 and len(set(channels)) > 1:
            raise ConfigError(
                f"projector train: block_out_channels {channels} differ; with layers_per_block 0 they must be equal"
            )
        if any(width % self.norm_num_groups for width in channels):
            raise ConfigError(
                f"projector train: block_out_channels {channels} must be multiples of"
                f" norm_num_groups {self.norm_num_groups}"
            )
        factor = 2 ** (len(channels) - 1)
        for name in ("image_size", "crop_size"):
            if getattr(self, name) % factor:
                raise ConfigError(
                    f"projector train: {name} {getattr(self, name)} is not divisible by the factor {factor}"
                )
        if not 0 < self.crop_size <= self.image_size:
            raise ConfigError(
                f"projector train: crop_size {self.crop_size} must be from 1 to image_size {self.image_size}"
            )
        if not 0 < self.batch_size <= self.num_images or self.steps < 1 or self.num_held_out < 1:
            raise ConfigError("projector train: needs steps, num_held_out >= 1 and 1 <= batch_size <= num_images")

    def command(self, out: Path) -> str:
        """The command that repeats this training, with every option, so that it outlives changes of the defaults."""
        words = ["lmd-bench", "projector", "train", "--out", str(out)]
        for field in fields(self):
            value = getattr(self, field.name)
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += ["--" + field.name.replace("_", "-"), text]
        return shlex.join(words)


@dataclass(frozen=True)
class TrainReport:
    """What training reached, measured on held-out scenes with the folder as it was written and read back."""

    psnr_db: float  # of the mean squared error over all held-out pixels, images in [0, 1]
    pca_psnr_db: float  # the same of a PCA of non-overlapping patches with as many numbers a patch as latents have
    first_loss: float  # mean over the first tenth of the steps
    last_loss: float  # mean over the last tenth
    latent_mean: tuple[float, ...]  # per channel
    latent_std: tuple[float, ...]
    num_parameters: int
    weights_bytes: int


def train_kl(
    out: Path,
    options: KLTrainOptions,
    *,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Trains an AutoencoderKL on scenes and writes it to the folder `out`, with a README of how and how well.

    Latents of the written model have mean 0 and standard deviation 1 per channel on the training scenes. On one
    machine and number of threads the same options give the same weights. `log` takes lines of progress.

    Raises TrainingError for a loss that is not finite, ConfigError for a folder that cannot be written.
    """
    _make_folder(out)
    scenes = Scenes(options.seed, options.image_size)
    log(f"drawing {options.num_images} scenes of {options.image_size} px")
    images = scenes.render(range(options.num_images), device=device)
    model = _build_model(options).to(device=device, memory_format=torch.channels_last)
    losses = _fit(model, images, options, log)
    normalise_latents(model, images[: 16 * options.num_held_out])
    model.to(memory_format=torch.contiguous_format).save_pretrained(out, safe_serialization=True)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone, which an installed package must not
    held_out = scenes.render(torch.arange(options.num_held_out) + HELD_OUT_START, device=device)
    report = _measure(out, images, held_out, losses, options)
    (out / "README.md").write_text(_readme(out, options, report), encoding="utf-8")
    log(f"held-out PSNR {report.psnr_db:.2f} dB (PCA of patches {report.pca_psnr_db:.2f} dB), written to {out}")
    return report


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"projector train: cannot write to {out} ({error.strerror}); choose another --out") from None


def _build_model(options: KLTrainOptions) -> AutoencoderKL:
    blocks = len(options.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=options.block_out_channels,
            layers_per_block=options.layers_per_block,
            latent_channels=options.latent_channels,
            norm_num_groups=options.norm_num_groups,
            sample_size=options.image_size,
            scaling_factor=1.0,  # latents leave the encoder at unit scale, see normalise_latents
            mid_block_add_attention=False,
        )
    # At a log-variance of 0 the posterior's noise drowns the first latents and training stands still for long.
    nn.init.constant_(model.quant_conv.bias[options.latent_channels :], _FIRST_LOGVAR)
    return model


def _rate(step: int, options: KLTrainOptions) -> float:
    """Learning rate of a step as a share of its peak."""
    warmup = min(options.lr_warmup_steps, options.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (options.steps - warmup)))


def _batches(images: Tensor, options: KLTrainOptions, generator: torch.Generator) -> Callable[[], Tensor]:
    """Draws batches in [-1, 1] without end, each image once before any twice.

    Each batch is cropped at one random place, turned and mirrored.
    """
    order: list[int] = []
    side = options.crop_size

    def draw() -> Tensor:
        nonlocal order
        if len(order) < options.batch_size:
            order = torch.randperm(len(images), generator=generator).tolist()
        rows, order = order[: options.batch_size], order[options.batch_size :]
        top, left = torch.randint(options.image_size - side + 1, (2,), generator=generator).tolist()
        turns, mirrored = torch.randint(4, (2,), generator=generator).tolist()
        batch = images[rows, :, top : top + side, left : left + side].float() / 127.5 - 1.0
        batch = torch.rot90(batch, turns, (2, 3))
        return (batch.flip(3) if mirrored % 2 else batch).contiguous(memory_format=torch.channels_last)

    return draw


def _loss(model: AutoencoderKL, batch: Tensor, options: KLTrainOptions, generator: torch.Generator) -> Tensor:
    posterior = model.encode(batch).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(batch.device)
    rebuilt = model.decode(posterior.mean + posterior.std * noise).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    l1, l2 = functional.l1_loss(rebuilt, batch), functional.mse_loss(rebuilt, batch)
    total: Tensor = options.l1_weight * l1 + options.l2_weight * l2 + options.kl_weight * kl
    return total


def _fit(model: AutoencoderKL, images: Tensor, options: KLTrainOptions, log: Callable[[str], None]) -> list[float]:
    """Trains in place; the loss of every step."""
    generator = torch.Generator().manual_seed(options.seed)
    draw = _batches(images, options, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    losses = []
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.lr * _rate(step, options)
        loss = _loss(model, draw(), options, generator)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"projector train: loss is {losses[-1]} at step {step}; use a smaller --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _LOG_EVERY_STEPS == 0:
            log(f"step {step + 1}/{options.steps}: loss {_mean(losses[-_LOG_EVERY_STEPS:]):.5f}")
    return losses


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Gives the latents of uint8 images (N, 3, H, W) mean 0 and standard deviation 1 per channel.

    The shift and the scale go into the two 1 x 1 convolutions on either side of the latents, so that reconstructions
    stay what they are; the posterior's log-variance moves along.
    """
    latents = torch.cat([model.encode(part.float() / 127.5 - 1.0).latent_dist.mode() for part in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    outer, inner = model.quant_conv, model.post_quant_conv
    inner.bias += (inner.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    inner.weight *= std.view(1, -1, 1, 1)
    channels = len(mean)
    outer.weight[:channels] /= std.view(-1, 1, 1, 1)
    outer.bias[:channels] = (outer.bias[:channels] - mean) / std
    outer.bias[channels:] -= 2.0 * std.log()


def patch_pca_psnr(train: Tensor, held_out: Tensor, *, patch_size: int, num_components: int) -> float:
    """PSNR in dB of uint8 images (N, 3, H, W) after a PCA of their patches that is fitted on other images.

    Patches are `patch_size` square, RGB, not overlapping; the mean patch is kept aside and costs no component.
    """

    def patches(images: Tensor) -> Tensor:
        columns = functional.unfold(images.float() / 255.0, patch_size, stride=patch_size)
        return columns.transpose(1, 2).flatten(0, 1)

    fitted, wanted = patches(train), patches(held_out)
    mean = fitted.mean(0)
    basis = torch.linalg.eigh(torch.cov(fitted.t())).eigenvectors[:, -num_components:]
    residual = wanted - mean
    residual = residual - residual @ basis @ basis.t()
    return -10.0 * math.log10(float(residual.square().mean()))


def _measure(out: Path, images: Tensor, held_out: Tensor, losses: list[float], options: KLTrainOptions) -> TrainReport:
    model = load_autoencoder(out).to(images.device)
    projector = KLProjector(model, name=out.name)
    wanted = held_out.float() / 255.0
    latents = torch.cat([projector.encode(part) for part in wanted.split(64)])
    with torch.no_grad():
        rebuilt = torch.cat([projector.decode(part) for part in latents.split(64)])
    tenth = max(1, len(losses) // 10)
    return TrainReport(
        psnr_db=-10.0 * math.log10(float((rebuilt - wanted).square().mean())),
        pca_psnr_db=patch_pca_psnr(
            images[:2048], held_out, patch_size=projector.factor, num_components=options.latent_channels
        ),
        first_loss=_mean(losses[:tenth]),
        last_loss=_mean(losses[-tenth:]),
        latent_mean=tuple(latents.mean((0, 2, 3)).tolist()),
        latent_std=tuple(latents.std((0, 2, 3)).tolist()),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_bytes=(out / WEIGHTS_FILE).stat().st_size,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _readme(out: Path, options: KLTrainOptions, report: TrainReport) -> str:
    factor = 2 ** (len(options.block_out_channels) - 1)
    stds = ", ".join(f"{value:.2f}" for value in report.latent_std)
    return f"""# {out.name}

A diffusers `AutoencoderKL` for the generated scenes: factor {factor}, {options.latent_channels} latent channels,
{report.num_parameters:,} parameters, {report.weights_bytes / 2**20:.2f} MiB in float32. Made by

    {options.command(out)}

| on {options.num_held_out} held-out scenes of {options.image_size} px (indices from 2^40, seed {options.seed}) | |
|---|---|
| PSNR of encode and decode | {report.psnr_db:.2f} dB |
| PSNR of a PCA of {factor} x {factor} patches to {options.latent_channels} numbers | {report.pca_psnr_db:.2f} dB |
| standard deviation of the latents, per channel | {stds} |

Images are scaled to [-1, 1], latents are the posterior's mode and are used as they are (`scale: 1.0`). Weights are
under this package's license.
"""
