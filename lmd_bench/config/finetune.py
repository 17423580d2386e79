"""Fine-tuning (MAT) and the probes of frozen features. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmd_bench.config.base import Values
from lmd_bench.config.recipe import RecipeConfig

ProbeName = Literal["linear", "knn"]


class FinetuneRecipeConfig(RecipeConfig):
    """How a trained encoder is fine-tuned for classification: a recipe, and what belongs to labels."""

    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the tokens, or the class token where the encoder has one."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The learning rate of a layer is that of the one after it times this; 1 is one rate for all."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: share of samples that skip the last block's branches, falling linearly to 0 at the first."""
    mixup_alpha: float = Field(default=0.0, ge=0)
    """Images and labels of a batch are mixed in pairs by a share from Beta(alpha, alpha); 0 mixes none."""
    cutmix_alpha: float = Field(default=0.0, ge=0)
    """As mixup with a rectangle of that area in place of a blend; where both are on, each batch gets one of them."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle of an image is replaced by noise."""


class FinetuneConfig(Values):
    """Fine-tuning of every row that names a fine-tuning recipe, after its pre-training, on the same data's labels."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    num_train: int | None = Field(default=None, ge=1)
    """Labelled training images: the first so many of a fixed order; None takes all."""
    num_val: int | None = Field(default=None, ge=1)
    """Images that accuracy is measured on; None takes all of a folder's val/ (without one: all held-out ones)."""
    num_checks: int = Field(default=4, ge=1)
    """Times accuracy is measured, spread evenly over the run, besides before the first step. Off the clock."""
    batch_size_val: int = Field(default=64, ge=1)
    val_crop: float = Field(default=1.0, gt=0, le=1)
    """Side of what is seen of a folder's validation images, as a share of their central square: 0.875 is MAE's resizing
    to 256 px and cutting out 224. Scenes are always seen whole."""
    probes: tuple[ProbeName, ...] = ("linear", "knn")
    """Cheap yardsticks on the frozen encoder's features, before fine-tuning changes it."""
    probe_images: int = Field(default=2000, ge=10)
    """Labelled training images whose features the probes are fitted to, at most."""
    knn_neighbors: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("finetune: give either steps or epochs")
        return self


class FinetuneRunConfig(Values):
    """One cell's fine-tuning, complete."""

    recipe: FinetuneRecipeConfig
    steps: int
    lr_warmup_steps: int
    num_train: int | None
    num_val: int | None
    num_checks: int
    batch_size_val: int
    val_crop: float
    probes: tuple[ProbeName, ...]
    probe_images: int
    knn_neighbors: int
