"""Everything about training that a publication fixes beside the model. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmd_bench.config.base import Values
from lmd_bench.config.data import AugmentationConfig


class OptimizerConfig(Values):
    """The optimizer and its constants."""

    name: Literal["adamw", "adam", "adan"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)
    """Two for adamw and adam, three for adan (in the convention of its code: 0.98, 0.92, 0.99)."""
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    implementation: Literal["default", "loop", "foreach", "fused", "compiled"] = "default"
    """`default` is the library's own choice for the device; the others force one. `compiled` is for adan only: our
    own, one kernel made by torch.compile (`harness.adan`)."""

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        wanted = 3 if self.name == "adan" else 2
        if len(self.betas) != wanted or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer {self.name} needs {wanted} betas in [0, 1), got {list(self.betas)}")
        if self.name == "adan" and self.implementation == "fused":
            raise ValueError("adan has no fused implementation: use default, loop, foreach or compiled")
        if self.name != "adan" and self.implementation == "compiled":
            raise ValueError(f"{self.name} has no compiled implementation: use default, loop, foreach or fused")
        return self


class LearningRateConfig(Values):
    """The learning rate over a run."""

    base: float = Field(gt=0)
    """Rate for `per_images` images a step; scaled linearly to the batch."""
    per_images: int | None = Field(default=256, ge=1)
    """None: `base` is the rate itself, whatever the batch."""
    schedule: Literal["cosine", "constant", "multistep"] = "cosine"
    """After the linear warm-up: half a cosine down to `minimum`, constant, or times `gamma` at every milestone."""
    minimum: float = Field(default=0.0, ge=0)
    """Where the cosine ends."""
    warmup_start: float = Field(default=0.0, ge=0)
    """Rate at which the warm-up begins."""
    scale_bounds: bool = False
    """Whether `minimum` and `warmup_start` are for `per_images` images too and scale with the batch as `base` does
    (SimMIM); otherwise they are rates themselves (MAE, LMD)."""
    warmup_prefix: bool = True
    """Whether the schedule begins where the warm-up ends (MAE). False: it runs over all steps, and the warm-up takes
    the place of its beginning (timm's default, SimMIM)."""
    milestones: tuple[float, ...] = ()
    """For `multistep`: shares of the run, ascending between 0 and 1, such as 0.875 for epoch 700 of 800."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """For `multistep`: what the rate is multiplied by at every milestone."""

    @model_validator(mode="after")
    def _milestones_fit(self) -> LearningRateConfig:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(
                f"lr.milestones belong to schedule multistep, got {list(self.milestones)} for {self.schedule}"
            )
        if list(self.milestones) != sorted({share for share in self.milestones if 0 < share < 1}):
            raise ValueError(f"lr.milestones must ascend between 0 and 1, got {list(self.milestones)}")
        return self


class RecipeConfig(Values):
    """Everything about training that a publication fixes beside the model."""

    batch_size: int = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: LearningRateConfig
    lr_warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear learning-rate warm-up; give at most one of the three."""
    lr_warmup_epochs: float | None = Field(default=None, ge=0)
    lr_warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the run: what a warm-up of 40 in 800 epochs is in a run of another length."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; None does not clip."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the moving average of the weights that is evaluated; None keeps none."""
    ema_warmup: bool = False
    """Whether the average's decay begins lower: min(ema_decay, (1 + n) / (10 + n)) at its n-th update (LDM)."""
    augmentation: AugmentationConfig = AugmentationConfig()
    source: str = ""
    """Where these values were published."""

    @model_validator(mode="after")
    def _one_warmup(self) -> RecipeConfig:
        given = (self.lr_warmup_steps, self.lr_warmup_epochs, self.lr_warmup_share)
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of lr_warmup_steps, lr_warmup_epochs and lr_warmup_share")
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> RecipeConfig:
        no_warmup = self.lr_warmup_steps is self.lr_warmup_epochs is self.lr_warmup_share is None
        if self.lr.warmup_start and no_warmup:
            raise ValueError(
                "lr.warmup_start needs a warm-up: give lr_warmup_steps, lr_warmup_epochs or lr_warmup_share"
            )
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup needs the average's ema_decay")
        return self


NOT_TRAINED = RecipeConfig(
    batch_size=1, lr=LearningRateConfig(base=1.0), source="none: its weights are published, nothing is trained here"
)
"""Stands in the recipe's place for methods that come trained (`Method.is_trained` is False)."""
