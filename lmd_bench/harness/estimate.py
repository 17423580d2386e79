"""What a run would take, from a few steps, looks and fillings timed on noise. For `run --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmd_bench.config import RunConfig
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.evaluation.fill import chunks, fill
from lmd_bench.harness.evaluate import YardstickRunner, check_steps, evaluating
from lmd_bench.harness.execute import build_method
from lmd_bench.harness.finetune import FinetuneJob, FineTuning
from lmd_bench.harness.loop import Trainer, TrainOptions, filling_precision
from lmd_bench.harness.noise import NUM_CLASSES, NoiseSource
from lmd_bench.harness.plan import Cell
from lmd_bench.harness.timer import Clock, clock_for
from lmd_bench.method import DataSpec, Method

NUM_STEPS = 3
_MOST_FILLED = 4
"""Images at most that are filled to time image quality."""
_CAPTION = "a photograph"


@dataclass(frozen=True)
class RowEstimate:
    """Expected seconds of one row, all seeds."""

    step_s: float
    check_s: float
    total_s: float
    text: str


def estimate_row(cell: Cell, num_seeds: int) -> RowEstimate:
    """Train NUM_STEPS steps spread over the schedule after one that is not timed, read the yardstick once, and fill a
    few images as image quality does.

    A method that comes trained takes no steps.

    Not compiled, even where the run would be: compiling alone would outlast the estimate.
    """
    config = cell.config
    device = torch.device(config.device)
    method = build_method(config, cell.method, NUM_CLASSES)
    clock = clock_for(device)
    step_s = _step_s(method, config, clock) if cell.method.is_trained else 0.0
    num_checks = len(check_steps(config.evaluation, config.steps))
    check_s = 0.0
    reconstructs = type(method).yardstick_obstacle(type(method).Config.model_validate(config.options)) is None
    precision = filling_precision(type(method), config.precision)
    if num_checks and reconstructs:
        count = min(config.evaluation.num_images, config.evaluation.batch_size)
        images = torch.randint(0, 256, (count, 3, config.image_size, config.image_size), dtype=torch.uint8)
        runner = YardstickRunner(images, config.evaluation, config.seed, device, precision=precision)
        clock.drain()
        begin = clock.host_s()
        runner.check(method, 0, 0.0)
        clock.drain()
        check_s = (clock.host_s() - begin) * config.evaluation.num_images / count
    total_s = num_seeds * ((config.steps + config.untimed_steps) * step_s + num_checks * check_s)
    steps = f"{step_s * 1e3:.0f} ms a step" if cell.method.is_trained else "comes trained"
    steps += f", {check_s:.1f} s a look at the yardstick"
    if config.image_quality is not None and reconstructs:
        num_images = config.image_quality.num_images
        fill_s = _fill_s(method, config, clock, precision)
        total_s += num_seeds * num_images * fill_s
        steps += f", {fill_s:.2g} s an image filled for image quality ({num_images}; its networks not counted)"
    if config.finetune is not None:
        tune_step_s = _finetune_step_s(method, config, clock)
        total_s += num_seeds * (config.finetune.steps + min(config.untimed_steps, config.finetune.steps)) * tune_step_s
        steps += f", {tune_step_s * 1e3:.0f} ms a step of fine-tuning (its looks at accuracy and probes not counted)"
    return RowEstimate(step_s, check_s, total_s, f"{steps}: about {total_s:.0f} s")


def _fill_s(method: Method, config: RunConfig, clock: Clock, precision: str) -> float:
    """Mean seconds of filling an image as image quality does, one chunk of noise after one that is not timed."""
    assert config.image_quality is not None
    device, size, evaluation = torch.device(config.device), config.image_size, config.evaluation
    count = min(config.image_quality.num_images, config.image_quality.batch_size, _MOST_FILLED)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    masks = method.own_masks(yardstick_masks(count, size, evaluation.unit_px, evaluation.keep))
    captions = [_CAPTION] * count if method.wants_captions else None
    (chunk,) = chunks(images, masks, captions, count)
    with evaluating(method):
        fill(method, chunk, config.seed, device, precision)
        clock.drain()
        begin = clock.host_s()
        fill(method, chunk, config.seed, device, precision)
        clock.drain()
    return (clock.host_s() - begin) / count


def _finetune_step_s(method: Method, config: RunConfig, clock: Clock) -> float:
    """The same of the fine-tuning, after one step that is not timed."""
    job = FinetuneJob.from_config(config.model_copy(update={"compile": False}))
    recipe = job.settings.recipe
    classifier = method.classifier(NUM_CLASSES, pool=recipe.pool, drop_path=recipe.drop_path)
    tuned = FineTuning(classifier, DataSpec(config.image_size, NUM_CLASSES), recipe).to(job.device).train()
    trainer = Trainer(tuned, NoiseSource(tuned, job.device), job.train_options, clock)
    _, times, _ = trainer.time_steps([1] * (NUM_STEPS + 1))
    return sum(step.period_ms for step in times[1:]) / NUM_STEPS / 1e3


def _step_s(method: Method, config: RunConfig, clock: Clock) -> float:
    """Mean seconds of NUM_STEPS steps."""
    options = TrainOptions.from_config(config, lr_warmup_steps=0, compile=False)
    trainer = Trainer(method, NoiseSource(method, torch.device(config.device)), options, clock)
    positions = [max(1, round((i + 0.5) / NUM_STEPS * config.steps)) for i in range(NUM_STEPS)]
    _, times, _ = trainer.time_steps([positions[0], *positions])
    return sum(step.period_ms for step in times[1:]) / NUM_STEPS / 1e3
