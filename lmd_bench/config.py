"""Suites as validated values: what is trained, how, on what, and which figures are wanted. Imports no torch.

A `Suite` is what a YAML file says (`suite_files` reads it). A `RunConfig`, made by `harness.plan`, is the complete and
explicit description of one cell: a row and a seed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Json = dict[str, Any]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
"""Side of square images, px."""


def near(word: str, words: typing.Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest of `words`, or what there is."""
    candidates = list(words)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Values):
    """Where images come from."""

    name: Literal["scenes", "folder"] = "scenes"
    path: str | None = None
    """Folder of images (ImageFolder layout, with or without train/ and val/, or flat), or LSUN's LMDB folder of a
    category, or the folder that holds them. Only for `folder`."""
    image_size: ImageSize = 64
    """Side of the square training images, px."""
    num_train: int | None = Field(default=None, ge=1)
    """Training images; None takes all of a folder. `scenes` needs a number: they are made once, before timing."""
    num_held_out: int = Field(default=64, ge=1)
    """Images kept away from training, for the yardstick. A folder without val/ gives up its own, a quarter at most."""
    seed: int = Field(default=0, ge=0)
    """Which scenes are drawn; which images of a folder are held out."""
    num_workers: int | None = Field(default=None, ge=0)
    """Decoding processes for a folder; None: one per core but one, at most 16. Scenes are held in memory."""

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.name == "scenes" and self.num_train is None:
            raise ValueError("scenes are generated, so data.num_train must say how many")
        if self.name == "scenes" and self.path is not None:
            raise ValueError("data.path is for data.name = folder")
        return self


class AugmentationConfig(_Values):
    """What happens to a training image before a method sees it."""

    crop: Literal["auto", "none", "random_resized"] = "auto"
    """`random_resized`: torchvision's RandomResizedCrop; `none`: short side resized, centre crop; `auto`: `none` for
    scenes, `random_resized` for a folder."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width over height."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: bool = True
    """Mirror left to right with probability 1/2."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentationConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augmentation.{name} must be two numbers 0 < low <= high, got {low}, {high}")
        return self


def resolve_crop(augmentation: AugmentationConfig, data: DataConfig) -> AugmentationConfig:
    """`crop: auto` made explicit: scenes are drawn at their size, photographs get MAE's random crops."""
    if augmentation.crop != "auto":
        return augmentation
    return augmentation.model_copy(update={"crop": "none" if data.name == "scenes" else "random_resized"})


class OptimizerConfig(_Values):
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


class LearningRateConfig(_Values):
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


class RecipeConfig(_Values):
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


class RowConfig(_Values):
    """One row of a suite: a method with options under a recipe."""

    method: str
    """Name of an installed method (`lmd-bench list`)."""
    label: str
    """How tables name the row."""
    recipe: str
    """Name of one of the suite's recipes."""
    options: Json = {}
    """The method's own options, checked by the method."""
    image_size: ImageSize | None = None
    """Overrides data.image_size for this row."""
    published: str | None = None
    """The row of the published tables this one stands beside, as it is named there."""
    planned: str | None = None
    """Set where the method or part of it is not built yet: why. The row is then listed, never run."""
    base: str | None = None
    """The row that this one is a change of: the table "one factor at a time" compares the two."""
    note: str = ""
    """A sentence that tables print under themselves for this row."""


class TargetConfig(_Values):
    """A quality that TTQ waits for: a share of the reference row's own gain on the yardstick."""

    fraction: float = Field(gt=0, le=1)
    of: str
    """The row whose gain (PSNR at its first check to its best) the fraction is taken of."""


class EvaluationConfig(_Values):
    """The common yardstick: same held-out images, same masks, off the clock."""

    num_checks: int = Field(default=6, ge=0)
    """Checks spread evenly over the run, besides the one before the first step; 0 turns the yardstick off."""
    num_images: int = Field(default=32, ge=1)
    unit_px: int = Field(default=32, ge=1)
    """Side of a mask unit, px, at every row's own image size."""
    keep: float = Field(default=0.25, gt=0, lt=1)
    """Share of units that stay visible: int(keep * n)."""
    batch_size: int = Field(default=32, ge=1)
    targets: tuple[TargetConfig, ...] = ()


class EstimatorValues(_Values):
    """How a valid loss decrease is counted (docs: README, "What the numbers mean")."""

    headline: Literal["relative", "fraction", "grid", "slope"] = "relative"
    delta: float = Field(default=0.01, gt=0, lt=1)
    levels: int = Field(default=20, ge=2)
    grid_step: float = Field(default=0.01, gt=0)
    half_life_steps: int = Field(default=20, ge=1)
    num_resamples: int = Field(default=1000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


TableName = Literal["table1", "table2", "table3", "table5"]
Precision = Literal["fp32", "bf16"]


class Suite(_Values):
    """A whole experiment: rows, data, recipes and the tables that come of them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    notes: str = ""
    data: DataConfig = DataConfig(num_train=4096)
    recipes: dict[str, RecipeConfig]
    methods: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")], RowConfig] = Field(min_length=1)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of every run; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    untimed_steps: int = Field(default=5, ge=0)
    """Steps run first on state that is restored afterwards."""
    precision: Precision = "fp32"
    compile: bool = False
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    log_every_steps: int = Field(default=50, ge=1)
    """Rows are written and the loss is looked at this often, on a clock of its own."""
    evaluation: EvaluationConfig = EvaluationConfig()
    estimator: EstimatorValues = EstimatorValues()
    tables: tuple[TableName, ...] = ("table1",)
    reference: str | None = None
    """The row that ratios are taken against."""

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
        for name, row in self.methods.items():
            if row.recipe not in self.recipes:
                raise ValueError(f"methods.{name}.recipe: no recipe {row.recipe!r}{near(row.recipe, self.recipes)}")
            if row.base == name:
                raise ValueError(f"methods.{name}.base: a row is not a change of itself; name another row")
        named = [("reference", self.reference)]
        named += [(f"methods.{name}.base", row.base) for name, row in self.methods.items()]
        named += [(f"evaluation.targets.{i}.of", target.of) for i, target in enumerate(self.evaluation.targets)]
        for place, row_name in named:
            if row_name is not None and row_name not in self.methods:
                raise ValueError(f"{place}: no row {row_name!r}{near(row_name, self.methods)}")
        return self


class RunConfig(_Values):
    """One cell (row x seed), complete: two cells with equal values are the same experiment."""

    suite: str
    row: str
    label: str
    method: str
    code: str | None = None
    """SHA-256 of the file of a method that `--add` brought in; None for installed methods."""
    options: Json
    inputs: str | None = None
    """Digest of the files that the options name (`Method.inputs_digest`); None where they name none."""
    image_size: int
    data: DataConfig
    recipe: RecipeConfig
    steps: int
    lr_warmup_steps: int
    untimed_steps: int
    precision: Precision
    compile: bool
    seed: int
    device: str
    log_every_steps: int
    evaluation: EvaluationConfig
    estimator: EstimatorValues

    def digest(self) -> str:
        """SHA-256 over the values that change what is trained and evaluated, 16 hex digits.

        Left out: names, and what is only counted afterwards from the steps on disk.
        """
        values = self.model_dump(
            mode="json",
            exclude={
                "label": True,
                "log_every_steps": True,
                "estimator": True,
                "recipe": {"source"},
                "evaluation": {"targets"},
            },
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class ImportedConfig(_Values):
    """A method whose weights were trained by others and imported: all that is known of it, and no recipe or data."""

    method: str
    code: str | None = None
    """As in `RunConfig`."""
    options: Json
    image_size: ImageSize
    source: str
    """Name of the authors' file."""
    source_sha256: str
    """Of that whole file, hexadecimal."""
    place: str
    """Where in the file the weights lay, in words."""
