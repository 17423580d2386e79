"""Learning rates and moving averages of published recipes, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lmd_bench.config import RecipeConfig
from lmd_bench.harness.optim import WeightAverage, lr_at, peak_lr


def recipe(batch_size: int = 4, *, warmup_steps: int = 10, **lr: Any) -> RecipeConfig:
    return RecipeConfig.model_validate({"batch_size": batch_size, "lr": lr, "lr_warmup_steps": warmup_steps})


def rates(chosen: RecipeConfig, steps: tuple[int, ...], total_steps: int, warmup_steps: int = 10) -> list[float]:
    return [lr_at(chosen, step, total_steps, warmup_steps) for step in steps]


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def test_maes_rate_rises_from_zero_and_its_cosine_begins_where_the_warm_up_ends() -> None:
    found = rates(recipe(4096, base=1.5e-4), (1, 6, 11, 61, 110), 110)
    assert found == pytest.approx([0.0, 1.2e-3, 2.4e-3, 1.2e-3, 2.4e-3 * cosine(0.99)])


def test_a_cosine_without_prefix_runs_over_all_steps_and_the_warm_up_takes_the_place_of_its_beginning() -> None:
    chosen = recipe(base=1.0, per_images=None, warmup_start=0.2, minimum=0.1, warmup_prefix=False)
    found = rates(chosen, (1, 6, 10, 11, 51, 100), 100)
    after = [0.1 + 0.9 * cosine(share) for share in (0.1, 0.5, 0.99)]
    assert found == pytest.approx([0.2, 0.6, 0.92, *after])


def test_simmims_bounds_scale_with_the_batch_as_its_base_does() -> None:
    chosen = recipe(
        2048, base=2e-4, per_images=512, minimum=1e-5, warmup_start=1e-6, scale_bounds=True, warmup_prefix=False
    )
    assert peak_lr(chosen) == pytest.approx(8e-4)
    assert rates(chosen, (1, 101), 100) == pytest.approx([4e-6, 4e-5])


def test_bounds_are_rates_themselves_unless_a_recipe_scales_them() -> None:
    chosen = recipe(2048, base=2e-4, per_images=512, minimum=1e-5, warmup_start=1e-6)
    assert rates(chosen, (1, 101), 100) == pytest.approx([1e-6, 1e-5])


def test_multistep_drops_at_shares_of_the_run() -> None:
    chosen = recipe(
        base=1.0, per_images=None, schedule="multistep", milestones=[0.5, 0.875], warmup_start=0.1, warmup_prefix=False
    )
    assert rates(chosen, (1, 6, 11, 400, 401, 700, 701, 800), 800) == pytest.approx(
        [0.1, 0.55, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )


def test_a_multistep_with_prefix_counts_its_milestones_from_the_end_of_the_warm_up() -> None:
    chosen = recipe(base=1.0, per_images=None, schedule="multistep", milestones=[0.5], gamma=0.2)
    assert rates(chosen, (60, 61), 110) == pytest.approx([1.0, 0.2])


def test_latent_diffusions_rate_is_constant_and_linear_in_the_batch() -> None:
    chosen = recipe(48, warmup_steps=0, base=2e-6, per_images=1, schedule="constant")
    assert rates(chosen, (1, 50, 100), 100, warmup_steps=0) == pytest.approx([9.6e-5] * 3)


def test_an_average_with_warm_up_starts_with_small_decays_and_ends_with_its_own() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = WeightAverage(module, 0.25, warmup=True)
    module.weight.data.fill_(1.0)
    expected = 0.0
    for decay in (2 / 11, 3 / 12, 0.25, 0.25):  # 4/13 and 5/14 are above the recipe's own
        average.update()
        expected = expected * decay + (1 - decay)
        with average.applied():
            assert module.weight.item() == pytest.approx(expected)
