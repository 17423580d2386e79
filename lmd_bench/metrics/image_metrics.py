"""All measures of image quality behind one interface, and the networks that they need, opened once.

Images are uint8, or floats in [0, 1] that are rounded to uint8 here: every figure is of the picture as it would be
saved. Means are over images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lmd_bench.config import Evaluators, ImageMetricName, ImageQualityConfig
from lmd_bench.errors import DataError, WeightsError
from lmd_bench.metrics.clip_score import ClipModel, pretrained_hub
from lmd_bench.metrics.distribution import (
    DISTRIBUTION_METRICS,
    DistributionMetric,
    distribution_obstacle,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from lmd_bench.metrics.features import FeatureExtractor, InceptionFeatures
from lmd_bench.metrics.image import SSIM_WINDOW_PX, psnr, psnr_hidden, ssim, to_uint8
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.nn.full_precision import full_precision
from lmd_bench.nn.perceptual import PerceptualDistance, size_obstacle
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import EvaluatorFacts

FIGURES: dict[ImageMetricName, tuple[str, ...]] = {
    "fid": ("fid",),
    "kid": ("kid", "kid_std"),
    "precision_recall": ("precision", "recall"),
    "clip_score": ("clip_score",),
    "lpips": ("lpips",),
    "psnr": ("psnr_db",),
    "ssim": ("ssim",),
}
"""The keys of a metric's figures, without the suffix of the small evaluators."""
WITH_EVALUATORS: tuple[ImageMetricName, ...] = (*DISTRIBUTION_METRICS, "clip_score")
"""Metrics whose networks the suite chooses; the others have one of their own, or none."""
SCENES_SUFFIX = "_scenes"
_Network = TypeVar("_Network")


def figure_keys(metrics: Sequence[ImageMetricName], evaluators: Evaluators) -> list[str]:
    """The keys of all figures of some metrics, with the suffix of the small evaluators where these measure them."""
    return [_key(metric, figure, evaluators) for metric in metrics for figure in FIGURES[metric]]


def _key(metric: ImageMetricName, figure: str, evaluators: Evaluators) -> str:
    return f"{figure}{SCENES_SUFFIX}" if evaluators == "scenes" and metric in WITH_EVALUATORS else figure


# -- one interface --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageBatch:
    """What one update brings, checked: images and what belongs to them."""

    real: Tensor | None
    """(B, 3, H, W) uint8; None where only the other side is at hand."""
    fake: Tensor
    """(B, 3, H, W) uint8."""
    captions: Sequence[str] | None
    mask: Tensor | None
    """(B, g, g) bool over square units, True = hidden."""

    @cached_property
    def fake_floats(self) -> Tensor:
        """In [0, 1], float32."""
        return self.fake.float() / 255

    @cached_property
    def real_floats(self) -> Tensor:
        """In [0, 1], float32. Raises DataError where real images are not at hand."""
        if self.real is None:
            raise DataError("image metrics: real images are needed beside the others for LPIPS, PSNR and SSIM")
        return self.real.float() / 255


class ImageMetric(ABC):
    """A measure over pairs of images, given in batches."""

    resizes: bool = False
    """Whether it resizes images on the host first, and so is handed them where they came from."""

    def update(
        self, real: Tensor | None, fake: Tensor, *, captions: Sequence[str] | None = None, mask: Tensor | None = None
    ) -> None:
        """Add a batch.

        real, fake: (B, 3, H, W), uint8 or floats in [0, 1]; `real` may be None for a measure that knows the real side
        already, or looks at one side only. captions: one for each image. mask: (B, g, g) bool over square units, True
        = hidden. Raises DataError, before anything is computed: shapes that differ, other than three channels, other
        types, values outside [0, 1], captions or masks that are missing or of another number.

        Networks look at the images in full single precision, without TF32.
        """
        batch = checked_batch(real, fake, captions, mask)
        with full_precision():
            self.add(batch)

    @abstractmethod
    def add(self, batch: ImageBatch) -> None:
        """Add a batch that is checked already."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures over all batches so far. Raises DataError where they are too few."""


def checked_batch(
    real: Tensor | None, fake: Tensor, captions: Sequence[str] | None = None, mask: Tensor | None = None
) -> ImageBatch:
    """A batch as metrics take it, rounded to uint8; DataError as `ImageMetric.update` says."""
    _require_images(fake)
    if real is not None:
        _require_images(real)
        if len(real) != len(fake):
            raise DataError(f"image metrics: {len(real)} real images and {len(fake)} others; give pairs")
        if real.shape != fake.shape:
            sizes = " and ".join(f"{images.shape[3]} x {images.shape[2]} px" for images in (real, fake))
            raise DataError(f"image metrics: sizes differ: {sizes} (real and other); resize one side")
    if captions is not None and len(captions) != len(fake):
        raise DataError(f"image metrics: {len(captions)} captions for {len(fake)} images")
    if mask is not None and (mask.dtype != torch.bool or len(mask) != len(fake)):
        raise DataError(f"image metrics: masks must be bool, one for each of {len(fake)} images")
    rounded = to_uint8(fake.detach())
    return ImageBatch(
        None if real is None else rounded if real is fake else to_uint8(real.detach()), rounded, captions, mask
    )


def _require_images(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"image metrics: need images (B, 3, H, W), got shape {list(images.shape)}")
    if images.shape[1] != 3:
        kind = "grey images" if images.shape[1] == 1 else f"images of {images.shape[1]} channels"
        raise DataError(f"image metrics: {kind}; three channels are needed: convert them to RGB")


# -- the measures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistributionOptions:
    """Constants of the metrics between two sets."""

    metrics: tuple[DistributionMetric, ...] = DISTRIBUTION_METRICS
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    """Lowered to the number of images where there are fewer."""
    neighborhood: int = 3
    seed: int = 0
    """Of KID's subsets."""


class DistributionMetrics(ImageMetric):
    """FID, KID, precision and recall on one extractor's features; each image is looked at once for all of them.

    With `real_statistics` the real images are not looked at: they are known. One tensor given for both sides, as for
    what a column can be at best, is looked at once. Keys: `fid`, `kid`, `kid_std`,
    `precision`, `recall` with the extractor's suffix; `kid_std` only where subsets can differ.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        options: DistributionOptions | None = None,
        real_statistics: FeatureStatistics | None = None,
    ) -> None:
        self.extractor = extractor
        self.resizes = extractor.resizes
        self.options = options or DistributionOptions()
        self._reused = real_statistics is not None
        self.real_statistics = real_statistics or FeatureStatistics()
        self.fake_statistics = FeatureStatistics()

    @torch.inference_mode()
    def add(self, batch: ImageBatch) -> None:
        found = self.extractor(batch.fake)
        self.fake_statistics.update(found)
        if self._reused:
            return
        if batch.real is None:
            raise DataError("image metrics: real images, or statistics of them, are needed for FID, KID and recall")
        self.real_statistics.update(found if batch.real is batch.fake else self.extractor(batch.real))

    def compute(self) -> dict[str, float]:
        real, fake, options = self.real_statistics, self.fake_statistics, self.options
        if real.num_images != fake.num_images:
            raise DataError(
                f"image metrics: statistics of {real.num_images} real images and {fake.num_images} others; "
                "FID depends on the number, so both sides must have the same"
            )
        found: dict[str, float] = {}
        if "fid" in options.metrics:
            found["fid"] = frechet_distance(real, fake)
        if "kid" in options.metrics:
            mean, deviation = kernel_distance(
                real, fake, subsets=options.kid_subsets, subset_size=options.kid_subset_size, seed=options.seed
            )
            found["kid"] = mean
            if options.kid_subset_size < fake.num_images:
                found["kid_std"] = deviation
        if "precision_recall" in options.metrics:
            found["precision"], found["recall"] = precision_recall(real, fake, neighborhood=options.neighborhood)
        return {f"{name}{self.extractor.suffix}": value for name, value in found.items()}


class _MeanOverImages(ImageMetric):
    """A figure for each image, averaged at the end; nothing waits for a GPU before."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._values: list[Tensor] = []

    @torch.inference_mode()
    def add(self, batch: ImageBatch) -> None:
        self._values.append(self.measure(batch))

    @abstractmethod
    def measure(self, batch: ImageBatch) -> Tensor:
        """(B,) one figure for each image."""

    def compute(self) -> dict[str, float]:
        if not self._values:
            raise DataError(f"image metrics: {self._key} of no images")
        return {self._key: float(torch.cat(self._values).double().mean())}


class ClipScore(_MeanOverImages):
    """Mean cosine between images and their captions: `clip_score`, higher is better, in [-1, 1]."""

    resizes = True

    def __init__(self, clip: ClipModel) -> None:
        super().__init__(f"clip_score{clip.suffix}")
        self._clip = clip

    def measure(self, batch: ImageBatch) -> Tensor:
        if batch.captions is None:
            raise DataError("CLIP-score: captions are needed, one for each image")
        return self._clip.similarity(batch.fake, batch.captions)


class Lpips(_MeanOverImages):
    """Mean LPIPS between the images of a pair: `lpips`, lower is better."""

    def __init__(self, distance: PerceptualDistance) -> None:
        super().__init__("lpips")
        self._distance = distance

    def measure(self, batch: ImageBatch) -> Tensor:
        distances: Tensor = self._distance(batch.fake_floats * 2 - 1, batch.real_floats * 2 - 1)  # it wants [-1, 1]
        return distances


class Psnr(_MeanOverImages):
    """Mean PSNR in dB: `psnr_db`, over hidden pixels where there is a mask, else over all."""

    def __init__(self) -> None:
        super().__init__("psnr_db")

    def measure(self, batch: ImageBatch) -> Tensor:
        if batch.mask is None:
            return psnr(batch.fake_floats, batch.real_floats)
        return psnr_hidden(batch.fake_floats, batch.real_floats, batch.mask)


class Ssim(_MeanOverImages):
    """Mean SSIM over the whole images: `ssim`."""

    def __init__(self) -> None:
        super().__init__("ssim")

    def measure(self, batch: ImageBatch) -> Tensor:
        return ssim(batch.fake_floats, batch.real_floats)


class ImageMetrics(ImageMetric):
    """Several measures over the same batches, which are checked once, and moved to the device once for all measures
    but those that resize on the host: these move what they have made."""

    def __init__(self, parts: Sequence[ImageMetric], device: torch.device) -> None:
        self._parts = tuple(parts)
        self._device = device

    def add(self, batch: ImageBatch) -> None:
        fake = batch.fake.to(self._device)
        real = None if batch.real is None else fake if batch.real is batch.fake else batch.real.to(self._device)
        mask = None if batch.mask is None else batch.mask.to(self._device)
        moved = ImageBatch(real, fake, batch.captions, mask)
        for part in self._parts:
            part.add(batch if part.resizes else moved)

    def compute(self) -> dict[str, float]:
        return {name: value for part in self._parts for name, value in part.compute().items()}

    @property
    def real_statistics(self) -> FeatureStatistics | None:
        """The real side's, given or gathered, to be used again; None where no metric needs any."""
        return next((part.real_statistics for part in self._parts if isinstance(part, DistributionMetrics)), None)


# -- the networks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluatorSet:
    """The networks behind a suite's figures, opened once, and what cannot be measured, and why."""

    config: ImageQualityConfig
    device: torch.device
    extractor: FeatureExtractor | None = None
    clip: ClipModel | None = None
    lpips: PerceptualDistance | None = None
    facts: dict[str, EvaluatorFacts] = field(default_factory=dict)
    """By the kind of figure: features, clip, lpips."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Figure -> why, under the name that the figure would have had: `fid`, or `fid_scenes`."""

    @classmethod
    def open(
        cls,
        config: ImageQualityConfig,
        weights: WeightsStore,
        device: torch.device | str,
        *,
        image_size: int,
        has_captions: bool,
        num_images: int,
        shared: EvaluatorSet | None = None,
    ) -> EvaluatorSet:
        """What `config` asks for, as far as it can be had.

        image_size: shorter side of the images, px. num_images: of each side. shared: a set of the same `config`, open
        for images of another size: its networks are used, and not opened a second time. Weights that are missing,
        damaged, of another network or with a wrong hash are a reason in `not_measured` for the figures that need them;
        the others are measured. `evaluation.needs.missing_weights` refuses a wrong hash before anything begins.
        Raises ConfigError for a CLIP model that open_clip does not know.
        """
        return _Opener(config, weights, torch.device(device), image_size, has_captions, num_images, shared).open()

    def metrics(self, real_statistics: FeatureStatistics | None = None, seed: int = 0) -> ImageMetrics:
        """Fresh measures of all that can be measured. `seed` draws KID's subsets.

        With `real_statistics`, from `ImageMetrics.real_statistics` or a file, the real images' features are not
        computed again.
        """
        parts: list[ImageMetric] = []
        wanted = self._measured
        if self.extractor is not None:
            options = DistributionOptions(
                metrics=tuple(name for name in DISTRIBUTION_METRICS if name in wanted),
                kid_subsets=self.config.kid_subsets,
                kid_subset_size=self.config.kid_subset_size,
                neighborhood=self.config.neighborhood,
                seed=seed,
            )
            parts.append(DistributionMetrics(self.extractor, options, real_statistics))
        if self.clip is not None:
            parts.append(ClipScore(self.clip))
        if self.lpips is not None:
            parts.append(Lpips(self.lpips))
        parts += [metric() for name, metric in (("psnr", Psnr), ("ssim", Ssim)) if name in wanted]
        return ImageMetrics(parts, self.device)

    @property
    def _measured(self) -> set[ImageMetricName]:
        names = {name.removesuffix(SCENES_SUFFIX) for name in self.not_measured}
        return {metric for metric in self.config.metrics if not set(FIGURES[metric][:1]) & names}


class _Opener:
    """Opens what a suite asks for, piece by piece, gathering reasons."""

    def __init__(
        self,
        config: ImageQualityConfig,
        weights: WeightsStore,
        device: torch.device,
        image_size: int,
        has_captions: bool,
        num_images: int,
        shared: EvaluatorSet | None,
    ) -> None:
        self._config = config
        self._weights = weights
        self._device = device
        self._image_size = image_size
        self._has_captions = has_captions
        self._num_images = num_images
        self._shared = shared
        self._reasons: dict[str, str] = {}

    def open(self) -> EvaluatorSet:
        extractor, clip, lpips = self._extractor(), self._clip(), self._lpips()
        if "ssim" in self._config.metrics and self._image_size < SSIM_WINDOW_PX:
            self._leave_out("ssim", f"SSIM: images of {self._image_size} px are smaller than its window of 11 px")
        facts = {kind: opened.facts for kind, opened in (("features", extractor), ("clip", clip)) if opened is not None}
        if lpips is None:
            return EvaluatorSet(self._config, self._device, extractor, clip, None, facts, self._reasons)
        distance, facts["lpips"] = lpips
        return EvaluatorSet(self._config, self._device, extractor, clip, distance, facts, self._reasons)

    def _extractor(self) -> FeatureExtractor | None:
        wanted = [name for name in DISTRIBUTION_METRICS if name in self._config.metrics]
        for name in tuple(wanted):
            reason = distribution_obstacle(name, self._num_images, self._config.neighborhood)
            if reason is not None:
                wanted.remove(name)
                self._leave_out(name, reason)
        if not wanted:
            return None
        if "kid" in wanted and self._config.kid_subset_size >= self._num_images:
            self._note(
                "kid", "kid_std", f"KID: each subset holds all {self._num_images} images, so subsets do not differ"
            )
        if self._shared is not None and self._shared.extractor is not None:
            return self._shared.extractor
        return self._opened(self._open_extractor, *wanted)

    def _open_extractor(self) -> FeatureExtractor:
        if self._config.evaluators == "scenes":
            from lmd_bench.evaluators.classifier import ScenesFeatures

            scenes: FeatureExtractor = ScenesFeatures.open(self._device)
            return scenes
        path = self._find("inception")
        return InceptionFeatures.open(path, self._device, sha256=self._weights.sha256_of("inception"))

    def _clip(self) -> ClipModel | None:
        if "clip_score" not in self._config.metrics:
            return None
        if not self._has_captions:
            self._leave_out("clip_score", "no captions")
            return None
        if self._shared is not None and self._shared.clip is not None:
            return self._shared.clip
        return self._opened(self._open_clip, "clip_score")

    def _open_clip(self) -> ClipModel:
        if self._config.evaluators == "scenes":
            from lmd_bench.evaluators.clip import open_scenes_clip

            scenes: ClipModel = open_scenes_clip(self._device)
            return scenes
        model, tag = self._config.clip_model, self._config.clip_pretrained
        name = self._clip_weights(model, tag)
        path = self._find(name)
        return ClipModel.open(model, path, self._device, tag=tag, sha256=self._weights.sha256_of(name))

    def _clip_weights(self, model: str, tag: str) -> str:
        """The manifest's name of a CLIP model's weights. Raises WeightsError where it lists none."""
        hub = pretrained_hub(model, tag)
        entries = self._weights.manifest.weights
        found = next((name for name, entry in entries.items() if hub is not None and entry.hub == hub), None)
        if found is None:
            known = ", ".join(f"{entry.title}" for entry in entries.values() if entry.open_clip_model is not None)
            raise WeightsError(f"no {model} ({tag}) weights: the manifest lists {known} alone")
        return found

    def _lpips(self) -> tuple[PerceptualDistance, EvaluatorFacts] | None:
        if "lpips" not in self._config.metrics:
            return None
        too_small = size_obstacle("alex", self._image_size)
        if too_small is not None:
            self._leave_out("lpips", f"LPIPS: {too_small}")
            return None
        if self._shared is not None and self._shared.lpips is not None:
            return self._shared.lpips, self._shared.facts["lpips"]
        return self._opened(self._open_lpips, "lpips")

    def _open_lpips(self) -> tuple[PerceptualDistance, EvaluatorFacts]:
        path = self._find("alexnet")
        facts = EvaluatorFacts(
            name="LPIPS v0.1, AlexNet", weights=path.name, sha256=self._weights.sha256_of("alexnet"), resize="none"
        )
        return PerceptualDistance.open("alex", path).to(self._device), facts

    def _find(self, name: str) -> Path:
        return self._weights.find(name, download=self._config.download)

    def _opened(self, open_it: Callable[[], _Network], *metrics: ImageMetricName) -> _Network | None:
        """What `open_it` gives; None, with the reason told for each metric, for weights that cannot be had or used."""
        try:
            return open_it()
        except WeightsError as error:
            for metric in metrics:
                self._leave_out(metric, str(error))
            return None

    def _leave_out(self, metric: ImageMetricName, reason: str) -> None:
        for figure in FIGURES[metric]:
            self._note(metric, figure, reason)

    def _note(self, metric: ImageMetricName, figure: str, reason: str) -> None:
        self._reasons[_key(metric, figure, self._config.evaluators)] = reason
