"""FID, KID, precision and recall: how two sets of images differ, by torch-fidelity's formulas on their features.

The filled or generated images are torch-fidelity's input 1 and the real ones its input 2: precision and recall, and
the subsets that KID's seed draws, depend on the order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmd_bench.errors import DataError
from lmd_bench.metrics.statistics import FeatureStatistics

DistributionMetric = Literal["fid", "kid", "precision_recall"]
DISTRIBUTION_METRICS: tuple[DistributionMetric, ...] = ("fid", "kid", "precision_recall")
_WHOLE_DISTANCES = 10_000
"""Up to so many images the distances between all pairs are held at once; beyond it, a part at a time."""


def distribution_obstacle(metric: DistributionMetric, num_images: int, neighborhood: int = 3) -> str | None:
    """Why a metric cannot be had from so many images a side, None where it can."""
    needed = {"fid": 2, "kid": 2, "precision_recall": neighborhood + 1}[metric]
    if num_images >= needed:
        return None
    name = {"fid": "FID", "kid": "KID", "precision_recall": "precision and recall"}[metric]
    reason = f" for balls of {neighborhood} neighbours" if metric == "precision_recall" else ""
    return f"{name}: at least {needed} images a side are needed{reason}, there are {num_images}"


def frechet_distance(real: FeatureStatistics, fake: FeatureStatistics) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500) by torch-fidelity's formula; at or near 0 it may be slightly negative.

    Raises DataError for fewer than 2 images or features of different widths.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    _require(real, fake, "fid")
    values = fid_statistics_to_metric(_moments(fake), _moments(real), verbose=False)
    return float(values[KEY_METRIC_FID])


def kernel_distance(
    real: FeatureStatistics, fake: FeatureStatistics, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): mean and standard deviation over random subsets.

    The cubic polynomial kernel, unbiased, so slightly negative for equal distributions. Subsets of more images than
    there are become all of them. Where that is so on both sides they differ in rounding alone: one is computed, in
    float64, and the deviation is 0. Raises DataError for fewer than 2 images or features of different widths.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _require(real, fake, "kid")
    size = min(subset_size, real.num_images, fake.num_images)
    sides = fake.features, real.features
    if size == real.num_images == fake.num_images:
        subsets, sides = 1, (fake.features.double(), real.features.double())
    values = kid_features_to_metric(*sides, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    return float(values[KEY_METRIC_KID_MEAN]), float(values[KEY_METRIC_KID_STD])


def precision_recall(real: FeatureStatistics, fake: FeatureStatistics, *, neighborhood: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), shares in [0, 1].

    A fake image counts as precise inside the ball of some real image, which reaches to that image's
    `neighborhood`-th nearest real one; recall is the same with the sides changed. Raises DataError for fewer than
    `neighborhood` + 1 images or features of different widths.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _require(real, fake, "precision_recall", neighborhood)
    values = prc_features_to_metric(
        fake.features,
        real.features,
        prc_neighborhood=neighborhood,
        prc_batch_size=_WHOLE_DISTANCES,
        save_cpu_ram=max(real.num_images, fake.num_images) > _WHOLE_DISTANCES,
        verbose=False,
    )
    return float(values[KEY_METRIC_PRECISION]), float(values[KEY_METRIC_RECALL])


def _moments(statistics: FeatureStatistics) -> dict[str, NDArray[np.floating]]:
    """What torch-fidelity's formula takes.

    It averages features in float32. FID follows, so that it equals torch-fidelity's: the float64 mean moves it by
    1e-6 of its value over 1000 images, which no reader sees but a comparison of programs does.
    """
    return {"mu": statistics.features.numpy().mean(axis=0), "sigma": statistics.covariance.numpy()}


def _require(
    real: FeatureStatistics, fake: FeatureStatistics, metric: DistributionMetric, neighborhood: int = 3
) -> None:
    obstacle = distribution_obstacle(metric, min(real.num_images, fake.num_images), neighborhood)
    if obstacle is not None:
        raise DataError(obstacle)
    widths = [side.features.shape[1] for side in (real, fake)]
    if widths[0] != widths[1]:
        raise DataError(f"features: {widths[0]} numbers for each real image and {widths[1]} for the others")
