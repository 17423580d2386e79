"""The yardstick as the harness applies it: what a method may see, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.methods import Tiny, TinyConfig
from torch import Tensor

from lmd_bench.config import EvaluationConfig
from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import TrainingError
from lmd_bench.harness.evaluate import YardstickRunner, check_steps
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import pixel_mask

CPU = torch.device("cpu")
CONFIG = EvaluationConfig(num_images=6, unit_px=16, batch_size=4)


def images() -> Tensor:
    return Scenes(0, 64).render(torch.arange(6))


class Peeking(Tiny):
    """Gives back whatever it is shown."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return images


class Leaky(Peeking):
    """Has a projector that passes images through unharmed."""

    def round_trip(self, images: Tensor) -> Tensor:
        return images

    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor:
        return images


class Stepwise(Tiny):
    """Reconstructs better the more levels it takes, and keeps what it was asked for."""

    progressive_orders = ("random", "confidence")

    def __init__(self, config: TinyConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.asked: list[tuple[int | None, str, tuple[int, ...]]] = []

    def reconstruct_progressively(
        self, images: Tensor, mask: Tensor, *, levels: int | None, order: str, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        self.asked.append((levels, order, tuple(seeds)))
        assert len(seeds) == len(images)
        assert not images.masked_select(pixel_mask(mask, images.shape[-1])).any(), "hidden pixels must be black"
        return torch.full_like(images, 0.5 if levels == 1 else 0.4), levels or 38


class OwnMasked(Tiny):
    """Takes masks of its own alone: the left half of every image hidden, in units of 32 px."""

    @property
    def mask_pattern(self) -> str:
        return "left half"

    def own_masks(self, masks: Tensor) -> Tensor:
        return torch.tensor([[True, False], [True, False]]).expand(len(masks), -1, -1)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (len(images), 2, 2)
        assert not images[..., :32].any(), "hidden pixels must be black"
        assert images[..., 32:].any()
        return torch.full_like(images, 0.5)


class Broken(Tiny):
    """Reconstructs nothing of use."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return images * float("nan")


def runner(of: Tensor | None = None) -> YardstickRunner:
    return YardstickRunner(images() if of is None else of, CONFIG, 0, CPU)


def test_no_hidden_pixel_reaches_a_method_not_even_one_that_looks() -> None:
    looked = runner().check(Peeking(TinyConfig(), DataSpec(64)), 0, 0.0)
    assert looked.psnr_db < 15, "hidden pixels arrive as black, so showing them back is a bad reconstruction"


def test_a_method_with_masks_of_its_own_is_measured_under_them() -> None:
    yardstick = runner()
    method = OwnMasked(TinyConfig(), DataSpec(64))
    check = yardstick.check(method, 1, 0.0)
    summary = yardstick.summary(method)
    assert (summary.own_mask, summary.unit_px) == ("left half", 32)
    errors = (images()[..., :32].float() / 255 - 0.5).square().mean(dim=(1, 2, 3))
    assert check.psnr_db == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-4)


def test_ceiling_leak_and_floor_are_measured_beside_the_reconstruction() -> None:
    yardstick = runner()
    method = Leaky(TinyConfig(), DataSpec(64))
    last = yardstick.check(method, 5, 1.5)
    summary = yardstick.summary(method)
    assert summary.ceiling_psnr_db == 100.0, "an unharmed image has the capped PSNR"
    assert summary.latent_leak_db == pytest.approx(100.0 - last.psnr_db)
    assert summary.mean_colour_psnr_db is not None
    assert summary.mean_colour_psnr_db > last.psnr_db
    assert summary.checks == [last]


def test_methods_without_a_projector_have_neither_ceiling_nor_leak() -> None:
    yardstick = runner()
    method = Tiny(TinyConfig(), DataSpec(64))
    yardstick.check(method, 0, 0.0)
    summary = yardstick.summary(method)
    assert summary.ceiling_psnr_db is None
    assert summary.latent_leak_db is None


def test_one_shot_and_every_way_of_unveiling_are_measured_on_the_same_images() -> None:
    method = Stepwise(TinyConfig(), DataSpec(64))
    ways = runner().summary(method).progressive
    assert [(way.levels, way.order, way.function_evaluations) for way in ways] == [
        (1, "none", 1),
        (8, "random", 8),
        (8, "confidence", 8),
        (None, "random", 38),
        (None, "confidence", 38),
    ]
    assert {way.num_images for way in ways} == {6}
    assert ways[0].psnr_db != ways[1].psnr_db
    seeds = [[seed for asked in method.asked[two : two + 2] for seed in asked[2]] for two in range(0, 10, 2)]
    assert all(one == seeds[0] for one in seeds), "two chunks each, of four and two images, under the same seeds"
    assert len(set(seeds[0])) == 6


def test_methods_of_one_prediction_have_nothing_to_unveil() -> None:
    summary = runner().summary(Tiny(TinyConfig(), DataSpec(64)))
    assert summary.progressive == []
    assert summary.nearest_unit_psnr_db is not None
    assert summary.nearest_unit_psnr_db < 100


class Noticing(Leaky):
    """Keeps whether it was in training mode when it was asked for anything."""

    def __init__(self, config: TinyConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.modes: list[bool] = []

    def round_trip(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images

    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images


def test_a_summary_asks_a_method_for_nothing_while_it_is_in_training_mode() -> None:
    method = Noticing(TinyConfig(), DataSpec(64)).train()
    yardstick = runner()
    yardstick.check(method, 0, 0.0)
    yardstick.summary(method)
    assert len(method.modes) == 2 * 3
    assert not any(method.modes), "running statistics of a norm would move"
    assert method.training


class Counting(Stepwise):
    """Takes one pass for each hidden unit, whatever it says of a nominal mask."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([super(Counting, self).reconstruct(images, mask) for _ in range(int(mask[0].sum()))])[0]


def test_function_evaluations_are_those_of_the_yardsticks_masks() -> None:
    method = Counting(TinyConfig(), DataSpec(64))
    assert method.num_function_evaluations == 1
    assert runner().summary(method).function_evaluations == 12, "of 16 units"
    assert runner().summary(Tiny(TinyConfig(), DataSpec(64))).function_evaluations == 1


def test_a_failed_check_leaves_the_method_in_training_mode() -> None:
    method = Broken(TinyConfig(), DataSpec(64)).train()
    with pytest.raises(TrainingError):
        runner().check(method, 0, 0.0)
    assert method.training


def test_a_check_leaves_the_method_in_training_mode_and_repeats_exactly() -> None:
    method = Tiny(TinyConfig(), DataSpec(64)).train()
    yardstick = runner()
    first, again = yardstick.check(method, 0, 0.0), yardstick.check(method, 0, 0.0)
    assert method.training
    assert (first.psnr_db, first.ssim) == (again.psnr_db, again.ssim)


def test_a_reconstruction_that_is_not_finite_is_an_error_with_words() -> None:
    with pytest.raises(TrainingError, match="misshapen or not finite"):
        runner().check(Broken(TinyConfig(), DataSpec(64)), 0, 0.0)


def test_checks_are_spread_evenly_and_include_both_ends() -> None:
    assert check_steps(EvaluationConfig(num_checks=4), 100) == [0, 25, 50, 75, 100]
    assert check_steps(EvaluationConfig(num_checks=4), 3) == [0, 1, 2, 3]
    assert check_steps(EvaluationConfig(num_checks=0), 100) == []
