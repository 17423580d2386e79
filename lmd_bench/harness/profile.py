"""Speed runs: a few steps of each row in fresh processes, in interleaved rounds, with the calibrator beside them.

They fill the table "step cost" and nothing else; MIT comes from whole runs. Inputs are noise already in memory, so
the data phase is what it costs to gather a batch, not to decode one.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmd_bench.config import DataConfig, EvaluationConfig, RunConfig, Suite
from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.harness.allocator import keep_freed_memory
from lmd_bench.harness.calibrator import CALIBRATOR_IMAGE_SIZE, CALIBRATOR_RECIPE, Calibrator
from lmd_bench.harness.execute import build_method, projector_parameters, try_count_flops
from lmd_bench.harness.fresh_process import Failed, in_fresh_process
from lmd_bench.harness.instrument import measure_instrument
from lmd_bench.harness.loop import Trainer, TrainOptions
from lmd_bench.harness.noise import NUM_CLASSES, NoiseSource
from lmd_bench.harness.timer import StepTimes, clock_for
from lmd_bench.metrics.cost import PeakMemory
from lmd_bench.records import CACHED_LATENTS, CALIBRATOR, PHASES, ProfileRecord, ProfileRound, ProfileRow
from lmd_bench.registry import load_method

if TYPE_CHECKING:
    from lmd_bench.harness.plan import Plan
    from lmd_bench.method import Method

SCHEDULE_STEPS = 1000
"""Length of the imagined run whose mask schedule the timed steps are taken from."""


@dataclass(frozen=True)
class SpeedOptions:
    """How a speed run goes."""

    rounds: int
    steps: int
    """Timed steps per process with the inner marks on, and as many with them off."""
    untimed_steps: int
    batch_size: int | None
    """None: every row's own."""
    keep_memory: bool
    """Keep freed host memory (`allocator`), as runs do; False leaves the system's default."""
    progress: float | None
    """Point of the mask schedule, 0 to 1, at which all steps are taken; None: midpoints spread over all of it."""

    def positions(self) -> list[int]:
        """Steps of an imagined run of SCHEDULE_STEPS that are timed."""
        if self.progress is not None:
            return [max(1, round(self.progress * SCHEDULE_STEPS))] * self.steps
        return [max(1, round((i + 0.5) / self.steps * SCHEDULE_STEPS)) for i in range(self.steps)]

    def progress_text(self) -> str:
        """Which part of the mask schedule the steps stand for, in words."""
        if self.progress is not None:
            return f"at {self.progress:.0%} of the mask schedule"
        return f"mean over the mask schedule ({self.steps} midpoints)"


def profile(
    plan: Plan,
    options: SpeedOptions,
    added: Mapping[str, str],
    *,
    command: str,
    environment: Mapping[str, Any],
    on_round: Callable[[ProfileRound], None],
    save: Callable[[ProfileRecord], None],
) -> ProfileRecord:
    """Run all rounds and return their record. A row that fails is left out with its reason; rows that come trained have
    no step to time. Raises ConfigError where no other row is left.

    `save` gets the record so far after every round, so that nothing measured is lost.
    """
    trained = {cell.config.row: cell.method.is_trained for cell in [*plan.cells, *plan.finished]}
    if not any(trained.values()):
        raise ConfigError(f"{', '.join(trained)}: comes trained: there is no training step to time; name another row")
    first = {cell.config.row: cell.config for cell in [*plan.cells, *plan.finished] if cell.method.is_trained}
    jobs = {name: _with_batch(config, options.batch_size) for name, config in first.items()}
    device = next(iter(jobs.values())).device
    suite = plan.suite
    jobs = {CALIBRATOR: calibrator_config(suite, device), **jobs}
    record = ProfileRecord(
        suite=suite.name,
        command=command,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=dict(environment),
        reference=suite.reference if suite.reference in jobs else None,
        precision=suite.precision,
        compile=suite.compile,
        progress=options.progress_text(),
        rows={},
        rounds=[],
        instrument_us_per_step=measure_instrument(torch.device(device), suite.log_every_steps),
    )
    for number in range(options.rounds):
        for name in _rotated(list(jobs), number):
            if name in record.not_measured:
                continue
            describe = name not in record.rows
            answer = in_fresh_process(time_row, jobs[name], options, dict(added), number, describe)
            if isinstance(answer, Failed):
                record.not_measured[name] = answer.reason
                continue
            measured, row = answer
            if row is not None:
                record.rows[name] = row
            record.rounds.append(measured)
            on_round(measured)
        save(record)
    return record


def _rotated(names: list[str], number: int) -> list[str]:
    """The calibrator first, then the rows, starting at another one in every round."""
    rows = names[1:]
    shift = number % len(rows)
    return [names[0], *rows[shift:], *rows[:shift]]


def _with_batch(config: RunConfig, batch_size: int | None) -> RunConfig:
    recipe = config.recipe if batch_size is None else config.recipe.model_copy(update={"batch_size": batch_size})
    return config.model_copy(update={"recipe": recipe, "steps": SCHEDULE_STEPS, "lr_warmup_steps": 0})


def calibrator_config(suite: Suite, device: str) -> RunConfig:
    """The calibrator as a cell: batch 4, fp32, not compiled, whatever the suite says."""
    return RunConfig(
        suite=suite.name,
        row=CALIBRATOR,
        label="calibrator",
        method=CALIBRATOR,
        options={},
        image_size=CALIBRATOR_IMAGE_SIZE,
        data=DataConfig(num_train=8, image_size=CALIBRATOR_IMAGE_SIZE),
        recipe=CALIBRATOR_RECIPE,
        steps=SCHEDULE_STEPS,
        lr_warmup_steps=0,
        untimed_steps=0,
        precision="fp32",
        compile=False,
        seed=0,
        device=device,
        log_every_steps=1,
        evaluation=EvaluationConfig(num_checks=0),
        estimator=suite.estimator,
    )


def time_row(
    config: RunConfig, options: SpeedOptions, added: Mapping[str, str], number: int, describe: bool
) -> tuple[ProfileRound, ProfileRow | None]:
    """Time a few steps of one row in this process; with `describe`, count its parameters and FLOPs too."""
    method_class = Calibrator if config.method == CALIBRATOR else load_method(config.method, added)
    device = torch.device(config.device)
    if options.keep_memory:
        keep_freed_memory()
    method = build_method(config, method_class, NUM_CLASSES)
    row = _describe(method, config, options) if describe else None
    memory = PeakMemory(device)
    memory.reset()
    train_options = TrainOptions.from_config(config, lr_warmup_steps=0, untimed_steps=0)
    trainer = Trainer(method, NoiseSource(method, device), train_options, clock_for(device))
    positions = options.positions()
    trainer.time_steps(_spread(positions, max(options.untimed_steps, len(set(positions)) if config.compile else 0)))
    schedule = [position for position in positions for _ in range(2)]
    outputs, times, _ = trainer.time_steps(schedule, marked=[count % 2 == number % 2 for count in range(len(schedule))])
    last_loss = float(outputs[-1].loss)
    if not math.isfinite(last_loss):
        raise TrainingError(f"the loss is {last_loss} after a few steps; times of such steps mean little")
    marked = [(step, output) for step, output in zip(times, outputs, strict=True) if step.phases_ms]
    unmarked = [step.period_ms for step in times if not step.phases_ms]
    return _round(config, number, marked, unmarked, memory.peak_bytes()), row


def _spread(positions: Sequence[int], count: int) -> list[int]:
    return [positions[i * len(positions) // count] for i in range(count)] if count else []


def _round(
    config: RunConfig, number: int, marked: list[tuple[StepTimes, Any]], unmarked: list[float], peak: int | None
) -> ProfileRound:
    return ProfileRound(
        round=number,
        row=config.row,
        period_ms=[step.period_ms for step, _ in marked],
        phases_ms={name: [step.phases_ms[i] for step, _ in marked] for i, name in enumerate(PHASES)},
        mask_ratio=[_plain(output.scalars.get("mask_ratio")) for _, output in marked],
        unmarked_period_ms=sum(unmarked) / len(unmarked) if unmarked else None,
        peak_memory_bytes=peak,
    )


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)


def _projector_text(method: Method) -> str | None:
    name = method.projector_name
    return name if name is None or method.cached_shape is None else f"{name}, {CACHED_LATENTS}"


def _describe(method: Method, config: RunConfig, options: SpeedOptions) -> ProfileRow:
    flops, _ = try_count_flops(method, config, options.positions())
    optimizer, frozen = config.recipe.optimizer, projector_parameters(method)
    return ProfileRow(
        label=config.label,
        method=config.method,
        optimizer=f"{optimizer.name} ({optimizer.implementation})",
        parameters=sum(p.numel() for p in method.parameters()) - frozen,
        batch_size=config.recipe.batch_size,
        flops_per_step=flops,
        projector=_projector_text(method),
        projector_parameters=frozen,
    )
