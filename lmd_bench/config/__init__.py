"""Suites as validated values: what is trained, how, on what, and which figures are wanted. Imports no torch.

A `Suite` is what a YAML file says (`suite_files` reads it). A `RunConfig`, made by `harness.plan`, is the complete and
explicit description of one cell: a row and a seed.
"""

from lmd_bench.config.base import ImageSize, Json, Values, near
from lmd_bench.config.data import AugmentationConfig, DataConfig, resolve_crop
from lmd_bench.config.finetune import FinetuneConfig, FinetuneRecipeConfig, FinetuneRunConfig
from lmd_bench.config.image_quality import Evaluators, ImageMetricName, ImageQualityConfig
from lmd_bench.config.recipe import NOT_TRAINED, LearningRateConfig, OptimizerConfig, RecipeConfig
from lmd_bench.config.suite import (
    LATER_PARTS,
    EstimatorValues,
    EvaluationConfig,
    ImportedConfig,
    Precision,
    RowConfig,
    RunConfig,
    Suite,
    TableName,
    TargetConfig,
)

__all__ = [
    "LATER_PARTS",
    "NOT_TRAINED",
    "AugmentationConfig",
    "DataConfig",
    "EstimatorValues",
    "EvaluationConfig",
    "Evaluators",
    "FinetuneConfig",
    "FinetuneRecipeConfig",
    "FinetuneRunConfig",
    "ImageMetricName",
    "ImageQualityConfig",
    "ImageSize",
    "ImportedConfig",
    "Json",
    "LearningRateConfig",
    "OptimizerConfig",
    "Precision",
    "RecipeConfig",
    "RowConfig",
    "RunConfig",
    "Suite",
    "TableName",
    "TargetConfig",
    "Values",
    "near",
    "resolve_crop",
]
