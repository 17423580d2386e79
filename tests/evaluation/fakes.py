"""A tiny extractor that counts what it looks at, in place of the networks behind the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmd_bench.config import ImageQualityConfig
from lmd_bench.metrics.features import FeatureExtractor
from lmd_bench.metrics.image_metrics import EvaluatorSet
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import EvaluatorFacts


class CountingFeatures(FeatureExtractor):
    """Mean colours of a 3 x 3 grid, 27 numbers; `num_seen` counts images."""

    name = "tiny features"
    num_features = 27

    def __init__(self) -> None:
        super().__init__()
        self.facts = EvaluatorFacts(name=self.name, weights="none", sha256="0" * 64, resize="none", num_features=27)
        self.num_seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)


def use_counting_features(patched: pytest.MonkeyPatch) -> CountingFeatures:
    """Evaluators open with one counting extractor from now on, and without CLIP and LPIPS."""
    features = CountingFeatures()

    def opened(config: ImageQualityConfig, weights: WeightsStore, device: Any, **facts: Any) -> EvaluatorSet:
        missing = {"clip_score": "no CLIP weights", "lpips": "no AlexNet weights"}
        not_measured = {name: why for name, why in missing.items() if name in config.metrics}
        if "kid" in config.metrics and config.kid_subset_size >= facts["num_images"]:
            not_measured["kid_std"] = "one subset"
        return EvaluatorSet(
            config, torch.device(device), features, None, None, {"features": features.facts}, not_measured
        )

    patched.setattr(EvaluatorSet, "open", opened)
    return features
