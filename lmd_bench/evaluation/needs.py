"""Which published weights a suite's image quality needs, and what it cannot measure without them. Opens no network."""

from __future__ import annotations

from lmd_bench.config import ImageMetricName, ImageQualityConfig
from lmd_bench.metrics.clip_score import pretrained_hub
from lmd_bench.metrics.distribution import DISTRIBUTION_METRICS
from lmd_bench.pretrained import WeightsStore


def needed_weights(config: ImageQualityConfig, weights: WeightsStore) -> dict[str, list[ImageMetricName]]:
    """Names of the manifest's entries -> the metrics that need them. Raises ConfigError for an unknown CLIP model."""
    needed: dict[str, list[ImageMetricName]] = {}
    if config.evaluators == "real":
        needed["inception"] = [metric for metric in config.metrics if metric in DISTRIBUTION_METRICS]
        if "clip_score" in config.metrics:
            hub = pretrained_hub(config.clip_model, config.clip_pretrained)
            entries = weights.manifest.weights.items()
            needed |= {name: ["clip_score"] for name, entry in entries if hub is not None and entry.hub == hub}
    if "lpips" in config.metrics:
        needed["alexnet"] = ["lpips"]
    return {name: metrics for name, metrics in needed.items() if metrics}


_NAMES: dict[ImageMetricName, str] = {
    "fid": "FID",
    "kid": "KID",
    "precision_recall": "precision and recall",
    "clip_score": "CLIP-score",
    "lpips": "LPIPS",
}


def missing_weights(config: ImageQualityConfig, weights: WeightsStore) -> list[str]:
    """ "FID, KID: not measured: why" for every entry that is not there and cannot be fetched.

    Raises WeightsError for a file that is there and wrong, ConfigError for an unknown CLIP model.
    """
    lines = []
    for name, metrics in needed_weights(config, weights).items():
        reason = weights.obstacle(name, download=config.download)
        if reason is not None:
            lines.append(f"{', '.join(_NAMES[metric] for metric in metrics)}: not measured: {reason}")
    return lines
