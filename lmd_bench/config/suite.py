"""A whole experiment, one cell of it, and what is known of imported weights. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmd_bench.config.base import ImageSize, Json, Values, near
from lmd_bench.config.data import DataConfig
from lmd_bench.config.finetune import FinetuneConfig, FinetuneRecipeConfig, FinetuneRunConfig
from lmd_bench.config.image_quality import ImageQualityConfig
from lmd_bench.config.recipe import RecipeConfig


class RowConfig(Values):
    """One row of a suite: a method with options under a recipe."""

    method: str
    """Name of an installed method (`lmd-bench list`)."""
    label: str
    """How tables name the row."""
    recipe: str | None = None
    """Name of one of the suite's recipes; None only for methods that are never trained here (`Method.is_trained`)."""
    finetune: str | None = None
    """Name of one of the suite's fine-tuning recipes; None: the row is not fine-tuned."""
    options: Json = Field(default_factory=dict)
    """The method's own options, checked by the method."""
    image_size: ImageSize | None = None
    """Overrides data.image_size for this row."""
    published: str | None = None
    """The row of the published tables this one stands beside, as it is named there."""
    missing: str | None = None
    """Set by the plan where published weights that the row needs are not there: why. Listed, never run."""
    listed_only: str | None = None
    """Why the row is listed in tables and not run by this suite (too heavy for a demo, say)."""
    base: str | None = None
    """The row that this one is a change of: the table "one factor at a time" compares the two."""
    note: str = ""
    """A sentence that tables print under themselves for this row."""


class TargetConfig(Values):
    """A quality that TTQ waits for: a share of the reference row's own gain on the yardstick."""

    fraction: float = Field(gt=0, le=1)
    of: str
    """The row whose gain (from its first check to its best) the fraction is taken of."""
    metric: Literal["psnr", "lpips"] = "psnr"
    """What is waited for: more PSNR over hidden pixels, or less LPIPS of the composite."""


class EvaluationConfig(Values):
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


class EstimatorValues(Values):
    """How a valid loss decrease is counted (docs: README, "What the numbers mean")."""

    headline: Literal["relative", "fraction", "grid", "slope"] = "relative"
    delta: float = Field(default=0.01, gt=0, lt=1)
    levels: int = Field(default=20, ge=2)
    grid_step: float = Field(default=0.01, gt=0)
    half_life_steps: int = Field(default=20, ge=1)
    num_resamples: int = Field(default=1000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


TableName = Literal["table1", "table2", "table3", "table4", "table5"]
Precision = Literal["fp32", "bf16"]


class Suite(Values):
    """A whole experiment: rows, data, recipes and the tables that come of them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    notes: str = ""
    data: DataConfig = DataConfig(num_train=4096)
    recipes: dict[str, RecipeConfig] = Field(default_factory=dict)
    finetune_recipes: dict[str, FinetuneRecipeConfig] = Field(default_factory=dict)
    methods: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")], RowConfig] = Field(min_length=1)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of every run; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    untimed_steps: int = Field(default=5, ge=0)
    """Steps run first on state that is restored afterwards."""
    precision: Precision = "fp32"
    """Of training, and of rows that come trained while they fill images; rows trained here fill theirs in fp32."""
    compile: bool = False
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    log_every_steps: int = Field(default=50, ge=1)
    """Rows are written and the loss is looked at this often, on a clock of its own."""
    evaluation: EvaluationConfig = EvaluationConfig()
    finetune: FinetuneConfig | None = None
    """None: no row is fine-tuned."""
    image_quality: ImageQualityConfig | None = None
    """None: FID and the like are not measured in runs (`lmd-bench evaluate` does so afterwards)."""
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
            for place, wanted, there in (
                ("recipe", row.recipe, self.recipes.keys()),
                ("finetune", row.finetune, self.finetune_recipes.keys()),
            ):
                if wanted is not None and wanted not in there:
                    raise ValueError(f"methods.{name}.{place}: no recipe {wanted!r}{near(wanted, there)}")
            if row.base == name:
                raise ValueError(f"methods.{name}.base: a row is not a change of itself; name another row")
        named = [("reference", self.reference)]
        named += [(f"methods.{name}.base", row.base) for name, row in self.methods.items()]
        named += [(f"evaluation.targets.{i}.of", target.of) for i, target in enumerate(self.evaluation.targets)]
        for place, row_name in named:
            if row_name is not None and row_name not in self.methods:
                raise ValueError(f"{place}: no row {row_name!r}{near(row_name, self.methods)}")
        return self


LATER_PARTS = ("finetune", "image_quality")
"""Of `RunConfig`: what is done with the trained weights, and can be done later."""


class RunConfig(Values):
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
    """`NOT_TRAINED` for a method that is not trained here."""
    steps: int
    """0 for a method that is not trained here."""
    lr_warmup_steps: int
    untimed_steps: int
    precision: Precision
    compile: bool
    seed: int
    device: str
    log_every_steps: int
    evaluation: EvaluationConfig
    finetune: FinetuneRunConfig | None = None
    image_quality: ImageQualityConfig | None = None
    estimator: EstimatorValues

    def digest(self) -> str:
        """SHA-256 over the values that change what is trained and looked at while training, 16 hex digits.

        Left out: names, what is only counted afterwards from the steps on disk, and what is measured afterwards from
        the saved weights, which `lmd-bench finetune` and `lmd-bench evaluate` make up for (`LATER_PARTS`).
        """
        values = self.model_dump(
            mode="json",
            exclude={
                "label": True,
                "log_every_steps": True,
                "estimator": True,
                "recipe": {"source"},
                "evaluation": {"targets"},
                **dict.fromkeys(LATER_PARTS, True),
            },
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class ImportedConfig(Values):
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
