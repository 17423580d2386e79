"""What a plan checks and says about image quality before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmd_bench.config import ImageQualityConfig, Suite
from lmd_bench.errors import ConfigError
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import RunRecord

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex

_HEADER_BYTES = 4096
"""Of a file of statistics, at most."""


def resolve_image_quality(suite: Suite, index: FolderIndex | None) -> tuple[ImageQualityConfig | None, str | None]:
    """The suite's image quality, on as many images as a folder can hold out, and a note where these are fewer.

    Raises ConfigError where the suite itself holds back fewer images than it measures.
    """
    quality, data = suite.image_quality, suite.data
    if quality is None:
        return None, None
    if quality.num_images > data.num_held_out:
        raise ConfigError(
            f"image_quality.num_images: {quality.num_images} images, but data.num_held_out holds back only "
            f"{data.num_held_out}"
        )
    if index is None or len(index.held_out) >= quality.num_images:
        return quality, None
    there = len(index.held_out)
    note = f"image quality uses the {there} images that can be held out, not {quality.num_images}"
    return quality.model_copy(update={"num_images": there}), note


def image_quality_notes(
    quality: ImageQualityConfig, suite: Suite, index: FolderIndex | None, weights: WeightsStore
) -> list[str]:
    """What cannot be measured, and why, in lines for the plan.

    Raises WeightsError for weights that are there and wrong, DataError for captions that are there and wrong,
    ConfigError for a CLIP model that there is not.
    """
    from lmd_bench.data.captions import check_captions
    from lmd_bench.evaluation.needs import missing_weights
    from lmd_bench.harness.image_quality import SCENES_NOTE

    notes = missing_weights(quality, weights)
    reason = check_captions(index, suite.data)  # methods read captions too, so damaged ones are never passed over
    if reason is not None and "clip_score" in quality.metrics:
        notes.append(f"CLIP-score: not measured: {reason}")
    if quality.evaluators == "scenes" and suite.data.name != "scenes":
        notes.append(f"image_quality.evaluators: {SCENES_NOTE}")
    return notes


def require_captions(rows: Sequence[str], suite: Suite, index: FolderIndex | None) -> None:
    """Raise ConfigError where `rows`, which fill what captions say, would be measured on images without any."""
    from lmd_bench.data.captions import check_captions

    reason = check_captions(index, suite.data) if rows else None
    if reason is not None:
        which = f"row {rows[0]} fills" if len(rows) == 1 else f"rows {', '.join(rows)} fill"
        raise ConfigError(f"{which} what captions say: {reason}; or leave out such rows, or --set image_quality=null")


def has_other_captions(record: RunRecord, index: FolderIndex | None) -> bool:
    """Whether a record's image quality was measured with other captions than the folder has now."""
    from lmd_bench.data.captions import captions_digest

    quality, captions = record.image_quality, None if index is None else index.held_out_captions
    if quality is None or captions is None:
        return False
    return quality.captions_digest != captions_digest(captions[: quality.num_images])


def image_quality_bytes(quality: ImageQualityConfig | None, image_sizes: list[int]) -> int:
    """Upper estimate of what pictures of cells of these sizes, and the real sides' statistics, take on disk."""
    if quality is None or not image_sizes:
        return 0
    tiles = 3 * quality.num_pictures + quality.num_samples
    pictures = sum(3 * size**2 * tiles for size in image_sizes)
    return pictures + len(set(image_sizes)) * _statistics_bytes(quality)


def _statistics_bytes(quality: ImageQualityConfig) -> int:
    """What the real side's features, their mean and their covariance take for one size of images."""
    from lmd_bench.evaluators.resnet import NUM_FEATURES
    from lmd_bench.metrics.distribution import DISTRIBUTION_METRICS
    from lmd_bench.metrics.features import INCEPTION_LAYER

    if not set(quality.metrics) & set(DISTRIBUTION_METRICS):
        return 0
    width = NUM_FEATURES if quality.evaluators == "scenes" else int(INCEPTION_LAYER)
    return 4 * quality.num_images * width + 8 * width * (width + 1) + _HEADER_BYTES
