"""Speed runs: which steps they take, in which order, beside which calibrator."""

from __future__ import annotations

import pytest
import torch
from helpers.methods import Tiny, TinyConfig

from baselines.ldm import LDM
from lmd_bench.harness.instrument import measure_instrument
from lmd_bench.harness.noise import NoiseSource
from lmd_bench.harness.profile import (
    SCHEDULE_STEPS,
    SpeedOptions,
    _rotated,
    calibrator_config,
    time_row,
)
from lmd_bench.method import DataSpec
from lmd_bench.records import PHASES
from lmd_bench.suite_files import load_suite


def options(**changes: object) -> SpeedOptions:
    values = {
        "rounds": 1,
        "steps": 5,
        "untimed_steps": 1,
        "batch_size": None,
        "keep_memory": True,
        "progress": None,
        **changes,
    }
    return SpeedOptions(**values)  # type: ignore[arg-type]


def test_steps_are_midpoints_of_the_schedule_or_one_point_of_it() -> None:
    assert options().positions() == [100, 300, 500, 700, 900]
    assert options(progress=1.0).positions() == [SCHEDULE_STEPS] * 5
    assert options(progress=0.0).positions() == [1] * 5
    assert "75%" in options(progress=0.75).progress_text()


def test_every_round_begins_with_the_calibrator_and_another_row() -> None:
    names = ["calibrator", "a", "b", "c"]
    assert [_rotated(names, number) for number in range(3)] == [
        ["calibrator", "a", "b", "c"],
        ["calibrator", "b", "c", "a"],
        ["calibrator", "c", "a", "b"],
    ]


def test_the_calibrator_is_the_documented_one_whatever_the_suite_says() -> None:
    config = calibrator_config(load_suite("in1k"), "cpu")
    assert (config.recipe.batch_size, config.image_size, config.precision, config.compile) == (4, 224, "fp32", False)
    assert config.recipe.optimizer.name == "adamw"
    assert config.recipe.optimizer.betas == (0.9, 0.999)
    assert config.recipe.optimizer.weight_decay == 0.01
    assert config.recipe.optimizer.implementation == "default"


def test_noise_batches_repeat_and_are_gathered_on_the_device() -> None:
    source = NoiseSource(Tiny(TinyConfig(), DataSpec(32)), torch.device("cpu"))
    first = next(source.batches(4, 0))
    assert first.images.shape == (4, 3, 32, 32)
    assert 0 <= float(first.images.min()) <= float(first.images.max()) <= 1
    assert torch.equal(first.images, next(source.batches(4, 0)).images)
    assert not torch.equal(first.images, next(source.batches(4, 1)).images)


@pytest.mark.parametrize("number", [0, 1])
def test_a_row_is_timed_with_marks_on_and_off_in_turn(number: int) -> None:
    suite = load_suite("demo")
    config = calibrator_config(suite, "cpu").model_copy(
        update={"method": "tiny", "row": "tiny", "options": {}, "image_size": 16}
    )
    target = __file__.replace("harness/test_profile.py", "helpers/methods.py") + ":Tiny"
    measured, row = time_row(config, options(), {"tiny": target}, number, describe=True)
    assert row is not None
    assert row.parameters > 0
    assert len(measured.period_ms) == 5
    assert set(measured.phases_ms) == set(PHASES)
    for step, period in enumerate(measured.period_ms):
        assert sum(measured.phases_ms[name][step] for name in PHASES) == pytest.approx(period)
    assert measured.unmarked_period_ms is not None
    assert measured.unmarked_period_ms > 0


def test_a_frozen_projectors_parameters_are_counted_apart() -> None:
    suite = load_suite("demo")
    changes = {"method": "ldm", "row": "ldm", "options": suite.methods["ldm"].options, "image_size": 64}
    config = calibrator_config(suite, "cpu").model_copy(update=changes)
    _, row = time_row(config, options(steps=1, untimed_steps=0, batch_size=1), {}, 0, describe=True)
    assert row is not None
    method = LDM(LDM.Config.model_validate(suite.methods["ldm"].options), DataSpec(64))
    assert row.parameters == sum(parameter.numel() for parameter in method.unet.parameters())
    assert row.projector_parameters == sum(parameter.numel() for parameter in method.projector.parameters()) > 0


def test_the_instruments_cost_is_measured_without_training() -> None:
    cost = measure_instrument(torch.device("cpu"), log_every_steps=50, num_steps=200)
    assert 0 < cost < 5000
