"""What a suite's fine-tuning comes to for a row, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmd_bench.config import FinetuneRunConfig, RecipeConfig, Suite, resolve_crop
from lmd_bench.errors import ConfigError

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex
    from lmd_bench.method import Method


def resolve_finetune(suite: Suite, row: str, num_images: int) -> FinetuneRunConfig | None:
    """A row's fine-tuning, complete; None where the suite or the row asks for none.

    num_images: training images of the data. Raises ConfigError for steps too short or images too few.
    """
    name = suite.methods[row].finetune
    if suite.finetune is None or name is None:
        return None
    settings, recipe = suite.finetune, suite.finetune_recipes[name]
    place = f"finetune (row {row})"
    num_train = num_images if settings.num_train is None else settings.num_train
    if num_train > num_images:
        raise ConfigError(
            f"{place}: num_train asks for {num_train} labelled images, there are {num_images} training images; lower it"
        )
    if num_train < recipe.batch_size:
        raise ConfigError(
            f"{place}: {num_train} labelled images do not fill one batch of {recipe.batch_size}; use more images or "
            f"--set finetune_recipes.{name}.batch_size=N"
        )
    if "knn" in settings.probes and settings.knn_neighbors > min(settings.probe_images, num_images):
        raise ConfigError(
            f"{place}: knn_neighbors asks for {settings.knn_neighbors} neighbours among "
            f"{min(settings.probe_images, num_images)} probe images; lower it or raise probe_images"
        )
    steps_per_epoch = num_train // recipe.batch_size
    steps = settings.steps or max(1, round((settings.epochs or 0) * steps_per_epoch))
    warmup = warmup_steps(recipe, steps, steps_per_epoch)
    if warmup >= steps:
        raise ConfigError(
            f"{place}: {steps} step{'s' if steps > 1 else ''} are too few, the learning rate of {name} warms up for "
            f"{warmup}; raise finetune.steps, or lower the recipe's warm-up"
        )
    values: dict[str, Any] = settings.model_dump(exclude={"steps", "epochs", "num_train"})
    return FinetuneRunConfig(
        recipe=recipe.model_copy(update={"augmentation": resolve_crop(recipe.augmentation, suite.data)}),
        steps=steps,
        lr_warmup_steps=warmup,
        num_train=settings.num_train,
        **values,
    )


def check_finetune(
    method: type[Method],
    options: Any,
    settings: FinetuneRunConfig,
    *,
    row: str,
    seed: int,
    num_classes: int | None,
    index: FolderIndex | None,
) -> str | None:
    """Raise a BenchError where a row cannot be fine-tuned as asked; returns a note where its data has no labels.

    seed: `data.seed`. index: the folder that was scanned, None for scenes.
    """
    from lmd_bench.data.image_files import NO_CLASS_FOLDERS
    from lmd_bench.harness.finetune import label_obstacle

    recipe = settings.recipe
    if (obstacle := method.classifier_obstacle(options, pool=recipe.pool)) is not None:
        raise ConfigError(f"methods.{row}.finetune: {obstacle}; or leave finetune out")
    why_no_classes = NO_CLASS_FOLDERS if index is None else index.files.why_no_classes()
    if (obstacle := label_obstacle(num_classes, why_no_classes)) is not None:
        return f"{row} is not fine-tuned: {obstacle}"
    if "linear" in settings.probes and num_classes is not None and settings.probe_images < num_classes:
        raise ConfigError(
            f"finetune (row {row}): {settings.probe_images} probe images cannot show each of {num_classes} classes to "
            "the linear probe; raise finetune.probe_images, or leave linear out of finetune.probes"
        )
    if index is not None:
        index.labelled_validation(settings.num_val, seed)
    return None


def warmup_steps(recipe: RecipeConfig, steps: int, steps_per_epoch: int) -> int:
    """Steps of the learning rate's warm-up in a run of `steps`."""
    if recipe.lr_warmup_share is not None:
        return round(recipe.lr_warmup_share * steps)
    if recipe.lr_warmup_epochs is not None:
        return round(recipe.lr_warmup_epochs * steps_per_epoch)
    return recipe.lr_warmup_steps or 0
