"""Two folders of images compared: everything about them is checked before a network looks at any."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lmd_bench.config import ImageMetricName, ImageQualityConfig
from lmd_bench.data.captions import captions_digest, captions_for, read_captions
from lmd_bench.data.decode import ImageFileError, center_square, decode
from lmd_bench.data.folders import describe_faults, find_images
from lmd_bench.errors import ConfigError, DataError, RecordError
from lmd_bench.evaluation.needs import missing_weights
from lmd_bench.harness.image_quality import SCENES_NOTE, reason_of, statistics_identity
from lmd_bench.metrics.distribution import DISTRIBUTION_METRICS, distribution_obstacle
from lmd_bench.metrics.image_metrics import FIGURES, EvaluatorSet, ImageMetrics
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import ImageQuality

KEPT_BYTES = 512 * 2**20
"""Decoded images of at most so many bytes a side are kept between the check and the measurement."""
PAIRED: tuple[ImageMetricName, ...] = ("lpips", "psnr", "ssim")
"""Metrics that compare an image with its own counterpart."""
NOT_PAIRED = "names do not pair"
_THREADS = 8
_NAMED = 6
_GREY = frozenset(("1", "L", "I", "F", "LA", "La"))


@dataclass(frozen=True)
class FolderRequest:
    """What is asked for."""

    real: Path
    fake: Path
    image_size: int | None = None
    """Resize and crop all images to this side, px; None: they are squares of one size as they are."""
    num_images: int | None = None
    """Take the first so many of each side by name; None: all, and both sides hold as many."""
    grey_to_rgb: bool = False
    """Take grey images among coloured ones as coloured."""
    captions: Path | None = None
    statistics: Path | None = None
    """File with the real side's statistics: read where they are of these images, else written."""
    seed: int = 0


def evaluate_folders(
    request: FolderRequest, config: ImageQualityConfig, weights: WeightsStore, device: torch.device
) -> ImageQuality:
    """Measure the images of one folder against those of another.

    Of `config` the metrics, evaluators, their constants and the batch size count. Images are paired by their names
    without endings; where names do not pair, metrics over pairs are not measured. Raises DataError, one line for each
    problem, before any network is opened: counts, sizes, channels, unreadable files, missing captions, fewer images
    than a metric needs.
    """
    with warnings.catch_warnings():  # around both sides, whose files are read in turns
        warnings.filterwarnings("ignore", module="PIL")
        return _evaluate(request, config, weights, device)


def _evaluate(
    request: FolderRequest, config: ImageQualityConfig, weights: WeightsStore, device: torch.device
) -> ImageQuality:
    _require_used(request, config)
    real, fake = _open_sides(request)
    paired = real.stems == fake.stems
    if paired:
        _require_clear_pairs(real, fake, config)
    captions = None if request.captions is None else _captions(request.captions, fake)
    _require_enough(config, len(real.names))
    wanted = config if paired else config.model_copy(update={"metrics": _unpaired(config.metrics)})
    _require_right_weights(wanted, weights, has_captions=captions is not None)
    _check_images(real, fake, request)
    evaluators = EvaluatorSet.open(
        wanted,
        weights,
        device,
        image_size=real.image_size,
        has_captions=captions is not None,
        num_images=len(real.names),
    )
    statistics = _StatisticsFile.of(request, evaluators, real)
    metrics = evaluators.metrics(statistics.found if statistics else None, request.seed)
    _measure(metrics, real, fake, captions, config.batch_size)
    values = metrics.compute()
    notes = [SCENES_NOTE] if config.evaluators == "scenes" and evaluators.facts.keys() & {"features", "clip"} else []
    if statistics is not None and statistics.found is None and metrics.real_statistics is not None:
        try:
            metrics.real_statistics.save(statistics.path, statistics.identity)
        except (OSError, SafetensorError) as error:  # the figures are there
            notes.append(f"--statistics {statistics.path}: not saved: {reason_of(error)}")
    not_measured = dict(evaluators.not_measured)
    if not paired:
        lost = [figure for metric in config.metrics if metric in PAIRED for figure in FIGURES[metric]]
        not_measured |= dict.fromkeys(lost, NOT_PAIRED)
    return ImageQuality(
        num_images=len(real.names),
        image_size=real.image_size,
        what=_what(request),
        values=values,
        evaluators=evaluators.facts,
        real_digest=real.digest,
        captions_digest=None if captions is None else captions_digest(captions),
        seed=request.seed,
        not_measured=not_measured,
        notes=notes,
    )


def _measure(
    metrics: ImageMetrics, real: _Folder, fake: _Folder, captions: Sequence[str] | None, batch_size: int
) -> None:
    start = 0
    for reals, fakes in zip(real.batches(batch_size), fake.batches(batch_size), strict=True):
        end = start + len(reals)
        metrics.update(reals, fakes, captions=None if captions is None else captions[start:end])
        start = end


def _unpaired(metrics: Sequence[ImageMetricName]) -> tuple[ImageMetricName, ...]:
    return tuple(metric for metric in metrics if metric not in PAIRED)


def _what(request: FolderRequest) -> str:
    """The folders by their own names: where they lie is nobody's business."""
    size = "" if request.image_size is None else f", resized and cropped to {request.image_size} px"
    return f"{request.fake.resolve().name} against {request.real.resolve().name}{size}"


# -- what is there ------------------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    """One image file."""

    name: str
    size: tuple[int, int]
    """Width and height in the file, px."""
    kind: str
    """ "colour", "grey" or "transparent"."""
    pixels: NDArray[np.uint8]
    """(H, W, 3) uint8, resized where that is asked for."""


class _Fault(NamedTuple):
    """An image file that cannot be used."""

    name: str
    reason: str


@dataclass
class _Folder:
    """One side's images, in the order of their names without endings."""

    option: str
    root: Path
    names: list[str]
    resize_to: int | None
    digest: str = ""
    """Of all pixels, 16 hex digits; known after the check."""
    image_size: int = 0
    """Side in px, after resizing; known after the check."""
    _kept: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    _kept_bytes: int = 0
    _digests: dict[int, bytes] = field(default_factory=dict)
    """Of the images that were not kept: they are decoded again, and must be the same."""

    @property
    def stems(self) -> list[str]:
        """Names without endings."""
        return [_stem(name) for name in self.names]

    def scan(self) -> Iterator[_Decoded | _Fault]:
        """Decode every image once, in order, and keep what fits; what cannot be used comes as its error."""
        digest = hashlib.sha256()
        for number, found in enumerate(_decoded(self._load, self.names)):
            if isinstance(found, _Decoded):
                digest.update(np.ascontiguousarray(found.pixels.transpose(2, 0, 1)).data)
                if self._kept_bytes + found.pixels.nbytes <= KEPT_BYTES:
                    self._kept[number] = found.pixels
                    self._kept_bytes += found.pixels.nbytes
                else:
                    self._digests[number] = _image_digest(found.pixels)
            yield found
        self.digest = digest.hexdigest()[:16]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Images as uint8 (B, 3, S, S), in order; those that were not kept are decoded again.

        Raises DataError for a file that has changed meanwhile.
        """
        again = _decoded(self._load, [name for number, name in enumerate(self.names) if number not in self._kept])
        for start in range(0, len(self.names), size):
            arrays = []
            for number in range(start, min(len(self.names), start + size)):
                pixels = self._kept.get(number)
                if pixels is None:
                    found = next(again)
                    if isinstance(found, _Fault):
                        raise DataError(f"{self.root / found.name}: changed while it was measured: {found.reason}")
                    pixels = found.pixels
                    if _image_digest(pixels) != self._digests[number]:
                        raise DataError(f"{self.root / found.name}: changed while it was measured; start again")
                arrays.append(pixels)
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _load(self, name: str) -> _Decoded | _Fault:
        path = self.root / name
        try:
            encoded = path.read_bytes()
            image = decode(path, lambda: io.BytesIO(encoded))
            kind = _kind(encoded)
        except ImageFileError as error:
            return _Fault(name, error.reason)
        except OSError as error:
            return _Fault(name, (error.strerror or str(error)).lower())
        size = image.size
        if self.resize_to is not None:
            image = center_square(image, self.resize_to, Image.Resampling.BICUBIC)
        return _Decoded(name, size, kind, np.asarray(image))


def _image_digest(pixels: NDArray[np.uint8]) -> bytes:
    """Of the size and pixels of one image."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()


def _decoded(load: Callable[[str], _Decoded | _Fault], names: Sequence[str]) -> Iterator[_Decoded | _Fault]:
    """What `load` gives for every name, in order, a bounded number of files ahead.

    The caller silences warnings: a generator would change Python's filters between its caller's lines.
    """
    workers = min(_THREADS, os.cpu_count() or 1)  # decoding releases the interpreter lock
    with ThreadPoolExecutor(workers) as pool:
        ahead = 16 * workers
        for start in range(0, len(names), ahead):
            yield from pool.map(load, names[start : start + ahead])


def _kind(encoded: bytes) -> str:
    """Whether a readable file holds colours, grey levels, or pixels that are not opaque."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            return "transparent"
        return "grey" if image.mode in _GREY or image.mode.startswith("I;16") else "colour"


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _open_sides(request: FolderRequest) -> tuple[_Folder, _Folder]:
    real, fake = (
        _Folder(option, root, _sorted_names(root, option), request.image_size)
        for option, root in (("--real", request.real), ("--fake", request.fake))
    )
    if request.num_images is not None:
        for side in (real, fake):
            if len(side.names) < request.num_images:
                raise DataError(
                    f"--num-images {request.num_images}: {side.option} {side.root} holds {len(side.names)} images"
                )
            side.names = side.names[: request.num_images]
    elif len(real.names) != len(fake.names):
        least = min(len(real.names), len(fake.names))
        raise DataError(
            f"--real {real.root} holds {len(real.names)} images, --fake {fake.root} {len(fake.names)}: FID and KID are "
            f"compared at equal numbers; --num-images {least} takes the first {least} of each by name"
        )
    return real, fake


def _sorted_names(root: Path, option: str) -> list[str]:
    return sorted(find_images(root, f"{option} {root}"), key=lambda name: (_stem(name), name))


# -- checks -------------------------------------------------------------------------------------------------------


def _require_used(request: FolderRequest, config: ImageQualityConfig) -> None:
    """Raise ConfigError for what is asked for and would go unused."""
    if request.captions is not None and "clip_score" not in config.metrics:
        raise ConfigError("--captions: clip_score is not among the metrics; leave it out")
    if request.statistics is not None and not set(DISTRIBUTION_METRICS) & set(config.metrics):
        raise ConfigError("--statistics: none of fid, kid, precision_recall is among the metrics; leave it out")


def _require_clear_pairs(real: _Folder, fake: _Folder, config: ImageQualityConfig) -> None:
    """Raise DataError where images of one side differ in their endings alone, and not alike on both sides."""
    if real.names == fake.names or not set(PAIRED) & set(config.metrics):
        return
    problems = []
    for side in (real, fake):
        twins = _twins(side.names)
        if twins:
            problems.append(
                f"{side.option} {side.root}: {_listed(twins)} differ in their endings alone, so pairs are not clear: "
                f"rename them, or leave out {', '.join(metric for metric in PAIRED if metric in config.metrics)}"
            )
    if problems:
        raise DataError("\n".join(problems))


def _twins(names: Sequence[str]) -> list[str]:
    """Those that differ from another one in their endings alone."""
    counts = Counter(map(_stem, names))
    return [name for name in names if counts[_stem(name)] > 1]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _require_enough(config: ImageQualityConfig, num_images: int) -> None:
    problems = [
        distribution_obstacle(metric, num_images, config.neighborhood)
        for metric in DISTRIBUTION_METRICS
        if metric in config.metrics
    ]
    if found := [f"--metrics: {problem}; leave it out or add images" for problem in problems if problem is not None]:
        raise DataError("\n".join(found))


def _require_right_weights(config: ImageQualityConfig, weights: WeightsStore, *, has_captions: bool) -> None:
    """Raise WeightsError for weights that will be needed, are there and are the wrong ones."""
    metrics = tuple(metric for metric in config.metrics if has_captions or metric != "clip_score")
    missing_weights(config.model_copy(update={"metrics": metrics}), weights)  # those missing are told by their figures


def _captions(file: Path, fake: _Folder) -> list[str]:
    """The caption of every image that is measured, in order, by its name or by its name without the ending."""
    captions = read_captions(file)
    by_stem: dict[str, list[str]] = {}
    for name, caption in captions.items():
        by_stem.setdefault(_stem(name), []).append(caption)
    unnamed = [name for name in fake.names if name not in captions and _stem(name) in by_stem]
    twins = set(_twins(fake.names))
    unclear = [name for name in unnamed if name in twins or len(set(by_stem[_stem(name)])) > 1]
    if unclear:
        raise DataError(
            f"--captions {file}: {_listed(unclear)}: only names with other endings have captions, and which is meant "
            "is not clear; give these images' whole names"
        )
    return captions_for(
        fake.names, captions | {name: by_stem[_stem(name)][0] for name in unnamed}, f"--captions {file}"
    )


def _check_images(real: _Folder, fake: _Folder, request: FolderRequest) -> None:
    """Decode everything once. Raises DataError with all problems: unreadable files, sizes, channels."""
    problems: list[str] = []
    sizes: dict[tuple[int, int], Path] = {}
    kinds: dict[str, Path] = {}
    for side in (real, fake):
        faults: dict[str, str] = {}
        for found in side.scan():
            if isinstance(found, _Decoded):
                sizes.setdefault(found.size, side.root / found.name)
                kinds.setdefault(found.kind, side.root / found.name)
            else:
                faults[found.name] = found.reason
        if faults:
            count = f"{len(faults)} of {len(side.names)} images"
            problems.append(f"{side.option} {side.root}: {count} cannot be used: {describe_faults(faults)}")
    problems += _channel_problems(kinds, request)
    problems += _size_problems(sizes, request)
    if problems:
        raise DataError("\n".join(problems))
    real.image_size = fake.image_size = request.image_size or next(iter(sizes))[0]


def _channel_problems(kinds: dict[str, Path], request: FolderRequest) -> list[str]:
    if "transparent" in kinds:
        return [f"{kinds['transparent']}: has transparent pixels: save it as RGB, over the background that is meant"]
    if {"grey", "colour"} <= kinds.keys() and not request.grey_to_rgb:
        return [
            f"{kinds['grey']}: one channel, {kinds['colour']}: three: save them alike, or give --grey-to-rgb to take "
            "grey images as coloured ones"
        ]
    return []


def _size_problems(sizes: dict[tuple[int, int], Path], request: FolderRequest) -> list[str]:
    if request.image_size is not None or not sizes:
        return []
    remedy = "--image-size S resizes and crops all to S px"
    (first, one), *others = sizes.items()
    if others:
        other, another = others[0]
        return [f"{one}: {first[0]} x {first[1]} px, {another}: {other[0]} x {other[1]} px: {remedy}"]
    return [f"{one}: {first[0]} x {first[1]} px, not a square: {remedy}"] if first[0] != first[1] else []


# -- statistics of the real side ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StatisticsFile:
    """Where the real side's statistics are kept, and what is there of them."""

    path: Path
    identity: dict[str, str]
    found: FeatureStatistics | None

    @classmethod
    def of(cls, request: FolderRequest, evaluators: EvaluatorSet, real: _Folder) -> _StatisticsFile | None:
        """None where no file is named or nothing would be in it. Raises RecordError for a file of something else."""
        if request.statistics is None or evaluators.extractor is None:
            return None
        identity = statistics_identity(evaluators.facts["features"], real.digest, len(real.names))
        found = FeatureStatistics.load(request.statistics, identity)
        if found is None and request.statistics.exists():
            raise RecordError(
                f"--statistics {request.statistics}: of other images, another network or another size; name another "
                "file, or delete this one"
            )
        return cls(request.statistics, identity, found)
