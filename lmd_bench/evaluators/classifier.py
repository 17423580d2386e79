"""The scenes classifier: a small residual network whose pooled features FID, KID, precision and recall stand on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lmd_bench.errors import WeightsError
from lmd_bench.evaluators.files import CLASSIFIER_FILE, SHIPPED, EvaluatorFile, checked_file
from lmd_bench.evaluators.resnet import IMAGE_SIZE, NUM_FEATURES, ScenesClassifier
from lmd_bench.metrics.features import FeatureExtractor
from lmd_bench.metrics.image import resize_square
from lmd_bench.records import EvaluatorFacts

__all__ = ["ScenesClassifier", "ScenesFeatures", "open_classifier"]


def open_classifier(device: torch.device | str, folder: Path = SHIPPED) -> tuple[ScenesClassifier, EvaluatorFile]:
    """The trained classifier on `device`, in single precision and evaluation mode, and its file.

    Raises WeightsError for a file that is missing, damaged or of another network.
    """
    from safetensors.torch import load_file

    file = checked_file(folder, CLASSIFIER_FILE)
    with torch.device("meta"):  # no initial weights, and so no draws from torch's generators
        model = ScenesClassifier()
    try:
        tensors = {name: _single(value) for name, value in load_file(file.path).items()}
        model.load_state_dict(tensors, assign=True)
    except Exception as error:  # safetensors has its own exceptions, load_state_dict raises RuntimeError
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{file.path}: not the scenes classifier ({reason})") from None
    return model.to(device).eval().requires_grad_(False), file


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.clone()


class ScenesFeatures(FeatureExtractor):
    """Pooled features of the scenes classifier: uint8 (B, 3, H, W) to float32 (B, 96)."""

    name = "scenes features"
    suffix = "_scenes"
    num_features = NUM_FEATURES
    resizes = True

    def __init__(self, model: ScenesClassifier, file: EvaluatorFile) -> None:
        super().__init__()
        self.model = model
        self.facts = EvaluatorFacts(
            name=self.name,
            weights=CLASSIFIER_FILE,
            sha256=file.sha256,
            resize=f"antialiased bicubic to {IMAGE_SIZE} px, where it is not that",
            num_features=NUM_FEATURES,
        )

    @classmethod
    def open(cls, device: torch.device | str, folder: Path = SHIPPED) -> ScenesFeatures:
        """The shipped features, or those of an own training in `folder`. Raises WeightsError."""
        return cls(*open_classifier(device, folder))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """As the class says; images of another size are resized first."""
        small = resize_square(images, IMAGE_SIZE).to(self.model.head.weight.device)
        return self.model.features(small.float() / 255.0)
