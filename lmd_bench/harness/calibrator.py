"""The calibrator: a fixed, well-known training step that lets ratios travel between machines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmd_bench.config import AugmentationConfig, LearningRateConfig, OptimizerConfig, RecipeConfig
from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput

CALIBRATOR_RECIPE = RecipeConfig(
    batch_size=4,
    optimizer=OptimizerConfig(name="adamw", betas=(0.9, 0.999), weight_decay=0.01),
    lr=LearningRateConfig(base=1e-3, per_images=None, schedule="constant"),
    augmentation=AugmentationConfig(crop="none", flip=False),
    source="torch.optim.AdamW with its defaults",
)
CALIBRATOR_IMAGE_SIZE = 224


class CalibratorConfig(MethodConfig):
    """The calibrator has no options: it is always the same."""


class Calibrator(Method):
    """timm `vit_base_patch16_224`, 1000 classes, cross-entropy; batch 4, fp32, AdamW. Never a row of a suite."""

    Config = CalibratorConfig

    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        import timm

        self.network: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=1000)

    def prepare(self, batch: Batch) -> Tensor:
        return batch.images

    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        labels = torch.arange(len(inputs), device=inputs.device)
        return StepOutput(nn.functional.cross_entropy(self.network(inputs), labels))

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """One group, as `AdamW(model.parameters())` makes it."""
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise TypeError("the calibrator classifies; it does not reconstruct")
