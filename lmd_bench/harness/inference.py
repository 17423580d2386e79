"""What an image costs once a method is trained: reconstructing and sampling, at several batch sizes.

Weights are random, as times do not depend on them, but of methods that come trained the published ones. Inputs are
noise under the yardstick's masks. Calls are whole: whatever the projector does is in them, and beside them it is timed
alone.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmd_bench.config import RunConfig
from lmd_bench.data.yardstick import hide, yardstick_masks
from lmd_bench.errors import BenchError, ConfigError, TrainingError
from lmd_bench.harness.allocator import give_back_freed_memory, keep_freed_memory
from lmd_bench.harness.execute import build_method
from lmd_bench.harness.fresh_process import Failed, in_fresh_process, reason_of
from lmd_bench.harness.loop import autocast
from lmd_bench.harness.noise import NUM_CLASSES, noise_batch
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import Clock, clock_for
from lmd_bench.method import Method
from lmd_bench.metrics.cost import PeakMemory
from lmd_bench.records import InferenceRecord, InferenceRound, InferenceRow, NotMeasured
from lmd_bench.registry import load_method

if TYPE_CHECKING:
    from lmd_bench.harness.plan import Plan

RECONSTRUCT, SAMPLE = "reconstruct", "sample"
LEVELS: tuple[int | None, ...] = (8, None)
"""Numbers of unveiling levels that are timed; None: all of the method's mask schedule."""

Task = Callable[[], Tensor]


@dataclass(frozen=True)
class InferenceOptions:
    """How inference is timed."""

    batch_sizes: tuple[int, ...]
    rounds: int
    calls: int
    """Timed calls of each task per process."""
    untimed_calls: int
    """Calls before them, at least one: function evaluations are counted there."""


@dataclass(frozen=True)
class Turn:
    """What one process brings back."""

    about: InferenceRow
    rounds: list[InferenceRound]
    not_measured: list[NotMeasured]


def measure_inference(
    plan: Plan,
    options: InferenceOptions,
    added: Mapping[str, str],
    *,
    command: str,
    environment: Mapping[str, object],
    on_round: Callable[[InferenceRound], None],
    save: Callable[[InferenceRecord], None],
) -> InferenceRecord:
    """Every row at every batch size, in interleaved rounds and fresh processes.

    `save` gets the record so far after every round. What cannot be done is left out with its reason, and not tried
    again.
    """
    suite = plan.suite
    configs = {cell.config.row: cell.config for cell in [*plan.cells, *plan.finished]}
    record = InferenceRecord(
        suite=suite.name,
        command=command,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=dict(environment),
        reference=suite.reference if suite.reference in configs else None,
        precision=suite.precision,
        batch_sizes=list(options.batch_sizes),
        unit_px=suite.evaluation.unit_px,
        keep=suite.evaluation.keep,
        peak_memory_kind=PeakMemory(torch.device(next(iter(configs.values())).device)).kind,
        rows={},
        rounds=[],
        not_measured=[
            NotMeasured(row=name, task=None, batch_size=None, reason=reason)
            for name, reason in {**plan.listed_only, **plan.missing}.items()
        ],
    )
    jobs = [(row, batch_size) for row in configs for batch_size in options.batch_sizes]
    for number in range(options.rounds):
        shift = number % len(jobs)
        for row, batch_size in [*jobs[shift:], *jobs[:shift]]:
            skipped = {miss.task for miss in record.not_measured if (miss.row, miss.batch_size) == (row, batch_size)}
            if None in skipped:
                continue
            answer = in_fresh_process(time_row, configs[row], batch_size, options, dict(added), number, skipped)
            if isinstance(answer, Failed):
                miss = NotMeasured(row=row, task=None, batch_size=batch_size, reason=answer.reason)
                record.not_measured.append(miss)
                continue
            record.rows.setdefault(row, answer.about)
            record.not_measured += answer.not_measured
            record.rounds += answer.rounds
            for measured in answer.rounds:
                on_round(measured)
        save(record)
    return record


def unmeasured(record: InferenceRecord, rows: Sequence[str]) -> list[str]:
    """One line for each of `rows` and each batch size of which not one task was measured, with the reasons.

    That a method lacks a task, such as sampling, is no line.
    """
    measured = {(part.row, part.batch_size) for part in record.rounds}
    lines = []
    for row in dict.fromkeys(rows):
        for size in record.batch_sizes:
            if (row, size) not in measured:
                misses = [miss.reason for miss in record.not_measured if (miss.row, miss.batch_size) == (row, size)]
                lines.append(f"{row}, batch {size}: not measured: {'; '.join(dict.fromkeys(misses))}")
    return lines


def time_row(
    config: RunConfig,
    batch_size: int,
    options: InferenceOptions,
    added: Mapping[str, str],
    number: int,
    skipped: set[str | None],
) -> Turn:
    """Time all tasks of one row at one batch size in this process, but those in `skipped`."""
    keep_freed_memory()
    device = torch.device(config.device)
    method = build_method(config, load_method(config.method, added), NUM_CLASSES).eval()
    about = InferenceRow(
        label=config.label,
        method=config.method,
        parameters=sum(parameter.numel() for parameter in method.parameters()),
        image_size=config.image_size,
        projector=method.projector_name,
        own_mask=method.mask_pattern,
    )
    bench = _Bench(method, config, batch_size, options, device)
    turn = Turn(about, [], [])
    encode_ms, decode_ms = bench.time_projector()
    for name, task in bench.tasks().items():
        if name in skipped:
            continue
        try:
            calls_ms, evaluations, peak = bench.time_task(task)
        except Exception as error:  # one task's failure, such as a method that cannot sample, is told; the others go on
            reason = str(error) if isinstance(error, TypeError | BenchError) else reason_of(error)
            miss = NotMeasured(row=config.row, task=name, batch_size=batch_size, reason=reason)
            turn.not_measured.append(miss)
            continue
        turn.rounds.append(
            InferenceRound(
                round=number,
                row=config.row,
                task=name,
                batch_size=batch_size,
                calls_ms=calls_ms,
                encode_ms=encode_ms,
                decode_ms=decode_ms,
                function_evaluations=evaluations,
                peak_memory_bytes=peak,
            )
        )
    return turn


class _Bench:
    """One method with the inputs of one batch size."""

    def __init__(
        self, method: Method, config: RunConfig, batch_size: int, options: InferenceOptions, device: torch.device
    ) -> None:
        self.method = method
        self.config = config
        self.options = options
        self.device = device
        self.clock: Clock = clock_for(device)
        self.batch = noise_batch(method, batch_size, device, always_images=True)  # a cache holds training images only
        evaluation = config.evaluation
        masks = yardstick_masks(batch_size, config.image_size, evaluation.unit_px, evaluation.keep)
        self.masks = method.own_masks(masks).to(device)
        self.hidden = hide(self.batch.images, self.masks)

    def tasks(self) -> dict[str, Task]:
        """What the method may be able to do, by name."""
        method, count = self.method, len(self.batch.images)
        tasks: dict[str, Task] = {RECONSTRUCT: self._reconstruct}
        for order in method.progressive_orders:
            for levels in LEVELS:
                name = f"{RECONSTRUCT}, {'all' if levels is None else levels} levels, {order}"
                tasks[name] = partial(self._reconstruct_progressively, levels, order)
        tasks[SAMPLE] = lambda: method.sample(count)
        return tasks

    def _reconstruct(self) -> Tensor:
        self._refuse_obstacle()
        return self.method.reconstruct(self.hidden, self.masks)

    def _reconstruct_progressively(self, levels: int | None, order: str) -> Tensor:
        self._refuse_obstacle()
        seeds = range(len(self.hidden))
        images, _ = self.method.reconstruct_progressively(
            self.hidden, self.masks, levels=levels, order=order, seeds=seeds
        )
        return images

    def _refuse_obstacle(self) -> None:
        kind = type(self.method)
        obstacle = kind.yardstick_obstacle(kind.Config.model_validate(self.config.options))
        if obstacle is not None:
            raise ConfigError(obstacle)

    def time_projector(self) -> tuple[float | None, float | None]:
        """Mean milliseconds of encoding and of decoding one batch; None in pixel space."""
        method, images = self.method, self.batch.images
        if method.projector_name is None:
            return None, None
        encode = self._mean_ms(lambda: method.prepare(self.batch))
        both = self._mean_ms(lambda: method.round_trip(images))
        return encode, max(0.0, both - encode)

    def _mean_ms(self, work: Callable[[], object]) -> float:
        for _ in range(self.options.untimed_calls):
            self._call(work)
        times = [self._time_call(work) for _ in range(self.options.calls)]
        return sum(times) / len(times)

    def time_task(self, task: Task) -> tuple[list[float], int | None, int | None]:
        """Milliseconds of each call, function evaluations of one, and the peak memory of the timed ones."""
        with counted_evaluations(self.method) as counts:
            self._check(self._call(task))
        evaluations = most_common(counts) if type(self.method).is_trained else self.method.num_function_evaluations
        for _ in range(self.options.untimed_calls - 1):
            self._call(task)
        give_back_freed_memory()  # of earlier tasks: it must not count for this one
        memory = PeakMemory(self.device)
        memory.reset()
        self._call(task)  # pages in again what was given back
        times = [self._time_call(task) for _ in range(self.options.calls)]
        return times, evaluations, memory.peak_bytes()

    def _check(self, images: object) -> None:
        expected = self.batch.images.shape
        if not isinstance(images, Tensor) or images.shape != expected or not bool(torch.isfinite(images).all()):
            raise TrainingError("the images that came back are missing, misshapen or not finite")

    def _call(self, work: Callable[[], object]) -> object:
        reseed(self.device, self.config.seed, "inference")
        with torch.no_grad(), autocast(self.device, self.config.precision):
            return work()

    def _time_call(self, work: Callable[[], object]) -> float:
        self.clock.drain()
        start = self.clock.mark()
        self._call(work)
        end = self.clock.mark()
        self.clock.drain()
        return self.clock.elapsed_ms(start, end)


# -- function evaluations ---------------------------------------------------------------------------------------------


@contextmanager
def counted_evaluations(method: Method) -> Iterator[Counter[nn.Module]]:
    """Counts, inside the block, how often each trained layer is called."""
    counts: Counter[nn.Module] = Counter()

    def count(module: nn.Module, *_: object) -> None:
        counts[module] += 1

    layers = [
        module
        for module in method.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    handles = [layer.register_forward_hook(count) for layer in layers if layer is not method]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def most_common(counts: Mapping[nn.Module, int]) -> int | None:
    """How often most of the layers that were called at all were called: once for each pass through the network."""
    frequencies = Counter(counts.values())
    return frequencies.most_common(1)[0][0] if frequencies else None
