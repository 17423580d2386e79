"""What a suite's fine-tuning comes to for its rows, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from lmd_bench.config import Suite
from lmd_bench.errors import ConfigError
from lmd_bench.harness.finetune_plan import check_finetune, resolve_finetune
from lmd_bench.registry import load_method
from lmd_bench.suite_files import load_suite, shipped_suites


def suite(recipe: dict[str, Any] | None = None, row: dict[str, Any] | None = None, **finetune: Any) -> Suite:
    lr = {"base": 1e-3, "per_images": None}
    return Suite.model_validate({
        "name": "one", "title": "One", "steps": 5,
        "data": {"name": "scenes", "num_train": 100},
        "recipes": {"plain": {"batch_size": 4, "lr": lr}},
        "finetune_recipes": {"tune": {"batch_size": 10, "lr": lr, **(recipe or {})}},
        "finetune": {"steps": 20, **finetune},
        "methods": {"mae": {"label": "MAE", "method": "mae", "recipe": "plain", "finetune": "tune", **(row or {})}},
    })  # fmt: skip


def test_rows_without_a_recipe_and_suites_without_a_section_are_not_fine_tuned() -> None:
    assert resolve_finetune(suite(row={"finetune": None}), "mae", 100) is None
    assert resolve_finetune(suite().model_copy(update={"finetune": None}), "mae", 100) is None


def test_epochs_and_warm_up_are_counted_in_batches_of_the_labelled_images() -> None:
    settings = resolve_finetune(suite({"lr_warmup_epochs": 0.5}, steps=None, epochs=3, num_train=60), "mae", 100)
    assert settings is not None
    assert (settings.steps, settings.lr_warmup_steps, settings.num_train) == (18, 3, 60)
    assert settings.recipe.augmentation.crop == "none"  # `auto`, for scenes
    share = resolve_finetune(suite({"lr_warmup_share": 0.25}), "mae", 100)
    assert share is not None
    assert (share.steps, share.lr_warmup_steps) == (20, 5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"recipe": {"lr_warmup_steps": 20}},
            r"20 steps are too few, the learning rate of tune warms up for 20; raise",
        ),
        ({"recipe": {"batch_size": 101}}, r"100 labelled images do not fill one batch of 101; use more images or"),
        ({"num_train": 101}, r"num_train asks for 101 labelled images, there are 100 training images; lower it"),
        ({"knn_neighbors": 11, "probe_images": 10}, r"11 neighbours among 10 probe images; lower it or raise"),
        ({"knn_neighbors": 101}, r"101 neighbours among 100 probe images"),
    ],
)
def test_what_cannot_be_is_refused_with_the_row_it_is_about(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^finetune \(row mae\): .*{message}"):
        resolve_finetune(suite(**made), "mae", 100)


def test_neighbours_are_no_concern_of_those_who_do_not_ask_for_them() -> None:
    assert resolve_finetune(suite(knn_neighbors=101, probes=("linear",)), "mae", 100) is not None


def test_a_linear_probe_needs_an_image_of_every_class() -> None:
    method = load_method("mae", {})
    options = method.Config.model_validate({})

    def check(**finetune: Any) -> str | None:
        settings = resolve_finetune(suite(knn_neighbors=5, **finetune), "mae", 100)
        assert settings is not None
        return check_finetune(method, options, settings, row="mae", seed=0, num_classes=11, index=None)

    with pytest.raises(ConfigError, match=r"^finetune \(row mae\): 10 probe images cannot show each of 11 classes to"):
        check(probe_images=10)
    assert check(probe_images=10, probes=("knn",)) is None
    assert check(probe_images=11) is None


@pytest.mark.parametrize("name", shipped_suites())
def test_every_row_of_a_shipped_suite_that_names_a_recipe_can_be_fine_tuned_by_it(name: str) -> None:
    shipped = load_suite(name)
    for row, values in shipped.methods.items():
        if shipped.finetune is None or values.finetune is None:
            continue
        method = load_method(values.method, {})
        settings = resolve_finetune(shipped, row, 1_281_167)
        assert settings is not None
        assert settings.lr_warmup_steps < settings.steps
        options = method.Config.model_validate(values.options)
        assert check_finetune(method, options, settings, row=row, seed=0, num_classes=1000, index=None) is None
