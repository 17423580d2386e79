"""What a run would take, from a few steps and one look at the yardstick, timed on noise. For `run --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmd_bench.harness.evaluate import YardstickRunner, check_steps
from lmd_bench.harness.execute import build_method
from lmd_bench.harness.loop import Trainer, TrainOptions
from lmd_bench.harness.noise import NUM_CLASSES, NoiseSource
from lmd_bench.harness.plan import Cell
from lmd_bench.harness.timer import clock_for

NUM_STEPS = 3


@dataclass(frozen=True)
class RowEstimate:
    """Expected seconds of one row, all seeds."""

    step_s: float
    check_s: float
    total_s: float
    text: str


def estimate_row(cell: Cell, num_seeds: int) -> RowEstimate:
    """Train NUM_STEPS steps spread over the schedule after one that is not timed, and read the yardstick once.

    Not compiled, even where the run would be: compiling alone would outlast the estimate.
    """
    config = cell.config
    device = torch.device(config.device)
    method = build_method(config, cell.method, NUM_CLASSES)
    clock = clock_for(device)
    options = TrainOptions.from_config(config, lr_warmup_steps=0, compile=False)
    trainer = Trainer(method, NoiseSource(method, device), options, clock)
    positions = [max(1, round((i + 0.5) / NUM_STEPS * config.steps)) for i in range(NUM_STEPS)]
    _, times, _ = trainer.time_steps([positions[0], *positions])
    step_s = sum(step.period_ms for step in times[1:]) / NUM_STEPS / 1e3
    num_checks = len(check_steps(config.evaluation, config.steps))
    check_s = 0.0
    if num_checks and type(method).yardstick_obstacle(type(method).Config.model_validate(config.options)) is None:
        count = min(config.evaluation.num_images, config.evaluation.batch_size)
        images = torch.randint(0, 256, (count, 3, config.image_size, config.image_size), dtype=torch.uint8)
        runner = YardstickRunner(images, config.evaluation, config.seed, device)
        clock.drain()
        begin = clock.host_s()
        runner.check(method, 0, 0.0)
        clock.drain()
        check_s = (clock.host_s() - begin) * config.evaluation.num_images / count
    total_s = num_seeds * ((config.steps + config.untimed_steps) * step_s + num_checks * check_s)
    text = f"{step_s * 1e3:.0f} ms a step, {check_s:.1f} s a look at the yardstick: about {total_s:.0f} s"
    return RowEstimate(step_s, check_s, total_s, text)
