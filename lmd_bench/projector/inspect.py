"""What a projector is worth before any method is trained on it: what it costs, keeps, loses and lets leak."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.source import open_source
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.metrics.image import PSNR_CAP_DB, ssim
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask, token_mask
from lmd_bench.nn.perceptual import PerceptualDistance, PerceptualNet, perceptual_obstacle
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.codebook import CodebookUse, codebook_use, count_codes
from lmd_bench.projector.config import ProjectorConfig, check_projector, projector_folder, weights_bytes
from lmd_bench.projector.losses import quantise
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.train_data import patch_pca_psnr
from lmd_bench.projector.training_split import require_unseen

COST_IMAGE_PX: Final = 224
"""Side of the image that encoder and decoder FLOPs are counted on."""
KEEP: Final = 0.25
"""Share of units that the yardstick's masks leave visible."""
_FITTED_IMAGES = 512  # for the PCA; their patches are many thousands
_BATCH = 16
_PARTS = {"encoder": "encoder", "quant_conv": "encoder", "decoder": "decoder", "post_quant_conv": "decoder"}


@dataclass(frozen=True)
class InspectData:
    """Images to look through a projector at."""

    images: Tensor  # (N, 3, S, S) float32 in [0, 1], held out: no projector of ours is trained on them
    fitted: Tensor  # (M, 3, S, S) alike, other images, which the PCA is fitted on
    described: str
    index: FolderIndex | None = None  # of a folder


@dataclass(frozen=True)
class Quality:
    """Reconstructions against their images."""

    psnr_db: float  # of the mean squared error over all pixels of all images, at most PSNR_CAP_DB
    ssim: float  # mean over images
    lpips: float | str  # mean over images, lower is better; or why it was not measured


@dataclass(frozen=True)
class Codes:
    """How a codebook is used."""

    num_codes: int
    num_positions: int  # latent positions that chose a code; fewer than codes cannot use them all
    use: CodebookUse


@dataclass(frozen=True)
class Samples:
    """The first few images on their way through the projector, on CPU, for figure 7."""

    images: Tensor  # (n, 3, S, S) in [0, 1]
    latents: Tensor  # (n, C, S/f, S/f)
    rebuilt: Tensor  # (n, 3, S, S) in [0, 1]
    quantised: Tensor | None  # the same from quantised latents; None without a codebook


@dataclass(frozen=True)
class Inspection:
    """Everything `lsp inspect` says of one projector. A string stands where a figure is missing, and says why."""

    name: str
    kind: str
    precision: str
    factor: int
    latent_channels: int
    image_size: int
    numbers_per_image: int  # latent numbers of an image of image_size px
    encoder_parameters: int
    decoder_parameters: int  # the codebook belongs to neither
    encoder_gflop: float | str  # 2 x MAC, one image of COST_IMAGE_PX px
    decoder_gflop: float | str
    continuous: Quality
    quantised: Quality | None  # None without a codebook
    pca_psnr_db: float  # non-overlapping patches of factor x factor to as many numbers, fitted on other images
    codes: Codes | None
    latent_mean: tuple[float, ...]  # per channel
    latent_std: tuple[float, ...]
    leak: float | str  # see `latent_leak`
    weights_bytes: int
    samples: Samples
    lpips_net: str | None = None  # trunk of LPIPS, alex or vgg: their values are not comparable; None: not measured


def open_inspect_data(
    folder: str | None, num_images: int, image_size: int, device: torch.device, seed: int = 0
) -> InspectData:
    """Held-out images, `num_images` or as many as there are, and others to fit the PCA on.

    folder: the user's images, central squares; None means generated scenes, held-out ones from index 2^40 on.
    seed: which images of a folder are held out, which scenes are drawn (`data.seed` of runs). Raises DataError.
    """
    index: FolderIndex | None = None
    plain = AugmentationConfig(crop="none", flip=False)
    if folder is None:
        config = DataConfig(image_size=image_size, num_train=_FITTED_IMAGES, num_held_out=num_images, seed=seed)
        source = open_source(config, image_size, plain, device)
    else:
        config = DataConfig(
            name="folder", path=folder, image_size=image_size, num_held_out=num_images, seed=seed, num_workers=0
        )
        index = scan_folder(folder, config)
        num_images = min(num_images, len(index.held_out))
        source = open_source(config, image_size, plain, device, index=index)
    batches = source.batches(min(_FITTED_IMAGES, source.num_train), seed)
    fitted = next(batches).images
    batches.close()
    images = source.held_out(num_images).float() / 255.0
    source.close()
    what = "scenes" if folder is None else f"images of {folder}"
    return InspectData(images, fitted, f"{num_images} held-out {what} at {image_size} px", index)


def require_held_out(configs: Sequence[ProjectorConfig], data: InspectData) -> None:
    """Raise ConfigError where a projector may have been trained on images that it would be measured on."""
    for config in configs if data.index is not None else ():
        assert data.index is not None
        require_unseen(projector_folder(config), data.index)


def inspect_projector(config: ProjectorConfig, data: InspectData, *, num_samples: int = 4) -> Inspection:
    """Opens a projector and measures it on `data`, on the device its images are on.

    Raises WeightsError for a projector that cannot serve, or whose factor does not divide the images.
    """
    image_size = data.images.shape[-1]
    info = check_projector(config, image_size)
    projector = open_projector(config).to(data.images.device)
    measured = _pass_through(projector, data.images, num_samples)
    parameters = _parameters(projector)
    encoder_gflop, decoder_gflop = count_gflop(projector)
    num_numbers = info.latent_channels * (image_size // info.factor) ** 2
    return Inspection(
        name=info.name,
        kind=config.kind,
        precision=config.precision,
        factor=info.factor,
        latent_channels=info.latent_channels,
        image_size=image_size,
        numbers_per_image=num_numbers,
        encoder_parameters=parameters["encoder"],
        decoder_parameters=parameters["decoder"],
        encoder_gflop=encoder_gflop,
        decoder_gflop=decoder_gflop,
        continuous=measured.continuous,
        quantised=measured.quantised,
        pca_psnr_db=_pca_psnr(data, info.factor, info.latent_channels),
        codes=measured.codes,
        latent_mean=tuple(measured.latents.mean((0, 2, 3)).tolist()),
        latent_std=tuple(measured.latents.std((0, 2, 3)).tolist()),
        leak=latent_leak(projector, data.images),
        weights_bytes=weights_bytes(config),
        samples=measured.samples,
        lpips_net=measured.lpips_net,
    )


# -- cost -------------------------------------------------------------------------------------------------------------


def count_gflop(projector: LatentProjector, image_px: int = COST_IMAGE_PX) -> tuple[float | str, float | str]:
    """GFLOP (2 x MAC) of encoding and of decoding one square image; why not, where the factor does not divide it.

    Convolutions, matrix products and attention, counted on the meta device; elementwise work, and with it the light
    kind's wavelet, is left out as is usual.
    """
    if image_px % projector.factor:
        reason = f"not counted: {image_px} px are not divisible by its factor"
        return reason, reason
    stand_in = copy.deepcopy(projector).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        latents = stand_in.encode(torch.empty(1, 3, image_px, image_px, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as decoding:
        stand_in.decode(latents)
    return encoding.get_total_flops() / 1e9, decoding.get_total_flops() / 1e9


def _parameters(projector: LatentProjector) -> dict[str, int]:
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in projector.named_parameters():
        part = _PARTS.get(name.removeprefix("model.").partition(".")[0])
        if part is not None:
            counts[part] += parameter.numel()
    return counts


# -- quality ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    latents: Tensor
    continuous: Quality
    quantised: Quality | None
    codes: Codes | None
    samples: Samples
    lpips_net: str | None


def _pass_through(projector: LatentProjector, images: Tensor, num_samples: int) -> _Measured:
    """Encodes and decodes all images, a few at a time."""
    distance = _Perceptual(images)
    plain, through_codes = _Score(distance), _Score(distance)
    shown: list[Tensor] = []
    shown_quantised: list[Tensor] = []
    latents = _encode(projector, images)
    for part, encoded in zip(images.split(_BATCH), latents.split(_BATCH), strict=True):
        kept = max(0, num_samples - sum(map(len, shown)))
        with torch.no_grad():
            rebuilt = projector.decode(encoded)
            plain.add(rebuilt, part)
            shown.append(rebuilt[:kept].cpu())
            if projector.codebook is not None:
                rebuilt = projector.decode(encoded, quantize=True)
                through_codes.add(rebuilt, part)
                shown_quantised.append(rebuilt[:kept].cpu())
    return _Measured(
        latents,
        plain.quality(),
        through_codes.quality() if shown_quantised else None,
        _codes(projector, latents),
        Samples(
            images[:num_samples].cpu(),
            latents[:num_samples].cpu(),
            torch.cat(shown),
            torch.cat(shown_quantised) if shown_quantised else None,
        ),
        distance.net,
    )


def _codes(projector: LatentProjector, latents: Tensor) -> Codes | None:
    codebook = projector.codebook
    if codebook is None:
        return None
    counts = sum(count_codes(quantise(part, codebook).indices, len(codebook)) for part in latents.split(_BATCH))
    assert isinstance(counts, Tensor)
    return Codes(len(codebook), int(counts.sum()), codebook_use(counts.cpu()))


class _Perceptual:
    """LPIPS with AlexNet's trunk, as it is usually reported, or VGG's where only that is there."""

    def __init__(self, images: Tensor) -> None:
        size = min(images.shape[-2:])
        self.reason = ""
        self._distance: PerceptualDistance | None = None
        nets: tuple[PerceptualNet, ...] = ("alex", "vgg")
        fitting = [net for net in nets if perceptual_obstacle(net, image_size=size) is None]
        if fitting:
            self._distance = PerceptualDistance.open(fitting[0]).to(images.device)
        elif all(perceptual_obstacle(net) is not None for net in nets):
            self.reason = "not measured: the weights of LPIPS' trunk are not on this machine"
        else:
            self.reason = f"not measured: images of {size} px are too small for LPIPS"

    @property
    def net(self) -> str | None:
        return None if self._distance is None else self._distance.net

    def __call__(self, rebuilt: Tensor, images: Tensor) -> Tensor | None:
        return None if self._distance is None else self._distance(rebuilt * 2.0 - 1.0, images * 2.0 - 1.0)


class _Score:
    """Collects per-image figures."""

    def __init__(self, distance: _Perceptual) -> None:
        self._distance = distance
        self._squares: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._lpips: list[Tensor] = []

    def add(self, rebuilt: Tensor, images: Tensor) -> None:
        self._squares.append((rebuilt.double() - images.double()).square().mean((1, 2, 3)))
        self._ssim.append(ssim(rebuilt, images))
        distances = self._distance(rebuilt, images)
        if distances is not None:
            self._lpips.append(distances)

    def quality(self) -> Quality:
        lpips = float(torch.cat(self._lpips).mean()) if self._lpips else self._distance.reason
        return Quality(psnr_of(torch.cat(self._squares).mean()), float(torch.cat(self._ssim).mean()), lpips)


def psnr_of(mse: Tensor) -> float:
    """PSNR in dB of a mean squared error () of images in [0, 1], at most PSNR_CAP_DB."""
    return min(PSNR_CAP_DB, -10.0 * math.log10(max(float(mse), 1e-300)))


def _pca_psnr(data: InspectData, factor: int, latent_channels: int) -> float:
    if latent_channels >= 3 * factor**2:
        return PSNR_CAP_DB  # as many numbers as pixels: nothing is lost
    return patch_pca_psnr(data.fitted, data.images, patch_size=factor, num_components=latent_channels)


# -- leak -------------------------------------------------------------------------------------------------------------


def latent_leak(projector: LatentProjector, images: Tensor) -> float | str:
    """How much of the visible latents hangs on hidden pixels, 0 for none; why not, where it cannot be measured.

    Under the yardstick's masks (units of 32 px from 192 px on, else 16; a quarter visible) images are encoded whole,
    and once more with the mean visible colour in place of the hidden pixels. Of latent positions that touch no hidden
    pixel: root mean square of the difference over that of the latents themselves, less each channel's mean.
    """
    try:
        hidden = _hidden_pixels(images)
        visible = _visible_positions(hidden, projector.factor)
    except (ConfigError, DataError) as error:
        return f"not measured: {error}"
    whole = _encode(projector, images)
    alone = _encode(projector, fill_with_visible_mean(images, hidden))
    count = visible.sum()
    mean = (whole * visible).sum((0, 2, 3), keepdim=True) / count
    change = ((whole - alone) * visible).double().square().sum()
    spread = ((whole - mean) * visible).double().square().sum()
    return float((change / spread).sqrt()) if spread > 0 else "not measured: the latents are all equal"


def _encode(projector: LatentProjector, images: Tensor) -> Tensor:
    return torch.cat([projector.encode(part) for part in images.split(_BATCH)])


def _hidden_pixels(images: Tensor) -> Tensor:
    size = images.shape[-1]
    masks = yardstick_masks(len(images), size, 32 if size >= 192 else 16, KEEP)
    return pixel_mask(masks, size).to(images.device)


def _visible_positions(hidden: Tensor, factor: int) -> Tensor:
    """Latent positions without a hidden pixel, bool (N, 1, h, w)."""
    side = hidden.shape[-1] // factor
    return ~token_mask(hidden, factor).view(len(hidden), 1, side, side)
