"""One cell from its settings to its record: seed -> data -> method -> train (timed) -> evaluate -> record."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lmd_bench.config import RunConfig
from lmd_bench.data.source import BatchSource, open_source
from lmd_bench.errors import BenchError
from lmd_bench.harness.allocator import give_back_freed_memory
from lmd_bench.harness.environment import gpu_facts
from lmd_bench.harness.evaluate import YardstickRunner, check_steps
from lmd_bench.harness.instrument import measure_instrument
from lmd_bench.harness.latents import open_cached
from lmd_bench.harness.loop import Trainer, TrainOptions, TrainResult
from lmd_bench.harness.noise import noise_batch
from lmd_bench.harness.plan import Cell, Plan
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import StepTimes, clock_for
from lmd_bench.harness.weights import WEIGHTS_FILE, save_weights
from lmd_bench.method import DataSpec, Method
from lmd_bench.metrics.cost import PeakMemory, count_step_flops
from lmd_bench.metrics.efficiency import EstimatorConfig, measure_run
from lmd_bench.projector.cache_encode import OnProgress
from lmd_bench.records import (
    PHASES,
    STEP_COLUMNS,
    Cost,
    Phases,
    RunRecord,
    StepWriter,
    Timing,
    read_run,
    read_steps,
    write_json,
)


class Watcher(Protocol):
    """Who is told how a cell gets on; `cli` shows it."""

    def began(self, config: RunConfig) -> None: ...

    def encoded(self, num_images: int, total: int, images_per_s: float) -> None: ...

    def trained(self, step: int, loss: float, mask_ratio: float | None, steps_per_s: float) -> None: ...

    def checked(self, step: int, psnr_db: float) -> None: ...

    def ended(self, record: RunRecord) -> None: ...


@dataclass
class DataShelf:
    """Data sources already made, so that rows with the same data and augmentation, or the same cache, share them."""

    plan: Plan
    _sources: dict[str, BatchSource] = field(default_factory=dict)

    def source(self, config: RunConfig, *, command: str, on_progress: OnProgress) -> BatchSource:
        """The source for a cell's images and augmentation, or for its cached latents.

        A cache that has to be made is made here; `command` is noted in it, `on_progress` told of it.
        """
        images_key = f"{config.image_size} {config.recipe.augmentation}"
        need = self.plan.caches.get(config.row)
        key = images_key if need is None else str(need.folder)
        if key in self._sources:
            return self._sources[key]
        index = self.plan.folder_index
        if need is None:
            device = torch.device(config.device)
            source = open_source(config.data, config.image_size, config.recipe.augmentation, device, index=index)
        else:
            images = self._sources.get(images_key)
            source = open_cached(need, config, index, images, command=command, on_progress=on_progress)
        self._sources[key] = source
        return source

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def build_method(config: RunConfig, method: type[Method], num_classes: int | None) -> Method:
    """The method on its device, weights drawn from the cell's seed."""
    device = torch.device(config.device)
    reseed(device, config.seed, "weights")
    options = method.Config.model_validate(config.options)
    return method(options, DataSpec(config.image_size, num_classes)).to(device).train()


def execute(
    cell: Cell, shelf: DataShelf, *, command: str, environment: Mapping[str, Any], watcher: Watcher
) -> RunRecord:
    """Run one cell and write its record. What fails inside the cell becomes a record with status "failed"."""
    config = cell.config
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    watcher.began(config)
    base = RunRecord(
        suite=config.suite,
        row=config.row,
        label=config.label,
        method=config.method,
        seed=config.seed,
        status="finished",
        config=config.model_dump(mode="json"),
        config_hash=config.digest(),
        command=command,
        started_at=started_at,
        environment=dict(environment),
        num_steps=config.steps,
    )
    try:
        for name in ("record.json", "error.txt", WEIGHTS_FILE):
            (cell.folder / name).unlink(missing_ok=True)
        with closing(StepWriter(cell.folder / "steps.csv")) as writer:
            record = _measure(cell, shelf, base, writer, watcher)
        write_json(cell.folder / "record.json", record)
    except Exception as error:  # one cell's failure must not take the others with it; it is recorded and reported
        record = _failed(cell, base, error)
    watcher.ended(record)
    return record


def _failed(cell: Cell, base: RunRecord, error: Exception) -> RunRecord:
    """The record of a cell that failed, on disk if it can be written there."""
    details = traceback.format_exc()
    text = _shortened(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {_shortened(error)}"
    record = base.model_copy(update={"status": "failed", "error": text})
    try:
        if not isinstance(error, BenchError):
            record = record.model_copy(update={"error": f"{text} (details: {cell.folder / 'error.txt'})"})
            (cell.folder / "error.txt").write_text(details, encoding="utf-8")
        write_json(cell.folder / "record.json", record)
    except OSError as full:
        note = f"{text}; and its record could not be written: {full}; free some space or choose another --out"
        return base.model_copy(update={"status": "failed", "error": note})
    return record


def _shortened(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def _measure(cell: Cell, shelf: DataShelf, base: RunRecord, writer: StepWriter, watcher: Watcher) -> RunRecord:
    config = cell.config
    device = torch.device(config.device)
    source = shelf.source(config, command=base.command, on_progress=watcher.encoded)
    give_back_freed_memory()
    method = build_method(config, cell.method, source.num_classes)
    source = source.with_collate(method.collate)
    not_measured: dict[str, str] = {}
    flops = _count_flops(method, config, not_measured)
    yardstick = _yardstick(method, config, source, device, not_measured)
    checks = frozenset(check_steps(config.evaluation, config.steps)) if yardstick else frozenset()
    trainer = Trainer(method, source, TrainOptions.from_config(config, check_steps=checks), clock_for(device))
    rows: list[tuple[object, ...]] = []

    def on_rows(new: Any) -> None:
        writer.append(new)
        rows.extend(row for row in new if row[1])

    memory = PeakMemory(device)

    def on_check(step: int, train_s: float) -> None:
        if yardstick is not None:
            with memory.left_out():
                watcher.checked(step, yardstick.check(method, step, train_s).psnr_db)

    memory.reset()
    result = trainer.run(on_rows, on_check, watcher.trained)
    peak = memory.peak_bytes()
    with trainer.averaged():
        summary = yardstick.summary(method) if yardstick else None
        weights = save_weights(method, cell.folder / WEIGHTS_FILE, config) if shelf.plan.save_weights else None
    instrument_us = measure_instrument(device, config.log_every_steps)
    notes = [] if result.wall.valid else [f"invalid: {result.wall.residual_share:.2%} of the wall time is missing"]
    return base.model_copy(
        update={
            "timing": _timing(result, instrument_us),
            "phases": mean_phases(result.times),
            "cost": Cost(
                parameters=sum(p.numel() for p in method.parameters()),
                trainable_parameters=sum(p.numel() for p in method.parameters() if p.requires_grad),
                projector_parameters=projector_parameters(method),
                flops_per_step=flops,
                peak_memory_bytes=peak,
                peak_memory_kind=memory.kind,
                compiled_graphs=result.compiled_graphs,
            ),
            "efficiency": _efficiency(result, rows, config),
            "yardstick": summary,
            "weights": weights,
            "not_measured": not_measured,
            "data": source.describe(),
            "gpu_at_end": gpu_facts(config.device, {}) if device.type == "cuda" else None,
            "notes": notes + source_notes(source),
        }
    )


def _count_flops(method: Method, config: RunConfig, not_measured: dict[str, str]) -> int | None:
    flops, reason = try_count_flops(method, config)
    if reason is not None:
        not_measured["flops_per_step"] = reason
    return flops


def try_count_flops(
    method: Method, config: RunConfig, steps: Sequence[int] | None = None
) -> tuple[int | None, str | None]:
    """FLOPs of a step, or None and why they cannot be counted."""
    try:
        batch = noise_batch(method, config.recipe.batch_size, torch.device("cpu"))
        return count_step_flops(method, batch, config.steps, steps), None
    except Exception as error:  # only a figure beside the times: whatever a method cannot do is the reason
        return None, f"the step does not run on the meta device: {type(error).__name__}: {_shortened(error)}"


def _yardstick(
    method: Method, config: RunConfig, source: BatchSource, device: torch.device, not_measured: dict[str, str]
) -> YardstickRunner | None:
    if config.evaluation.num_checks == 0:
        not_measured["yardstick"] = "turned off (evaluation.num_checks: 0)"
        return None
    obstacle = type(method).yardstick_obstacle(type(method).Config.model_validate(config.options))
    if obstacle is not None:
        not_measured["yardstick"] = obstacle
        return None
    images: Tensor = source.held_out(config.evaluation.num_images)
    return YardstickRunner(images, config.evaluation, config.seed, device)


def _timing(result: TrainResult, instrument_us: float) -> Timing:
    return Timing(
        train_s=result.wall.train_s,
        pauses_s=result.wall.pauses_s,
        wall_s=result.wall.wall_s,
        residual_share=result.wall.residual_share,
        valid=result.wall.valid,
        untimed_s=result.untimed_s,
        compile_s=result.compile_s,
        instrument_us_per_step=instrument_us,
    )


def mean_phases(times: list[StepTimes]) -> Phases:
    """Means over steps, and the shares of the mean period."""
    period = sum(step.period_ms for step in times) / len(times)
    means = [sum(step.phases_ms[i] for step in times) / len(times) for i in range(len(PHASES))]
    by_name = dict(zip(PHASES, means, strict=True))
    busy = sum(by_name.values()) - by_name["data"]
    return Phases(
        **{f"{name}_ms": value for name, value in by_name.items()},
        stall_share=(period - busy) / period,
        projector_share=by_name["projector"] / period,
    )


def projector_parameters(method: Method) -> int:
    """Parameters of a method's frozen projector, 0 where it has none."""
    projector = getattr(method, "projector", None)
    return sum(p.numel() for p in projector.parameters()) if isinstance(projector, torch.nn.Module) else 0


def _efficiency(result: TrainResult, rows: list[tuple[object, ...]], config: RunConfig) -> dict[str, Any]:
    return measure_run(
        loss=result.losses,
        period_ms=[step.period_ms for step in result.times],
        tokens=_column(rows, "tokens"),
        mask_ratio=_column(rows, "mask_ratio"),
        config=EstimatorConfig(**config.estimator.model_dump()),
        seed=config.seed,
    ).to_dict()


def recount(cell: Cell) -> bool:
    """Count a finished cell's decreases again, from its steps on disk, if the suite now counts them otherwise.

    Returns whether the record was changed. Nothing is trained.
    """
    path = cell.folder / "record.json"
    record = read_run(path)
    estimator = cell.config.estimator
    if record.config.get("estimator") == estimator.model_dump(mode="json"):
        return False
    columns = read_steps(cell.folder / "steps.csv")
    measured = [number for number, timed in enumerate(columns["timed"]) if timed]

    def numbers(name: str) -> list[float] | None:
        values = [columns[name][number] for number in measured]
        return None if None in values else [float(value) for value in values if value is not None]

    efficiency = measure_run(
        loss=numbers("loss") or [],
        period_ms=numbers("period_ms") or [],
        tokens=numbers("tokens"),
        mask_ratio=numbers("mask_ratio"),
        config=EstimatorConfig(**estimator.model_dump()),
        seed=cell.config.seed,
    )
    config = {**record.config, "estimator": estimator.model_dump(mode="json")}
    write_json(path, record.model_copy(update={"config": config, "efficiency": efficiency.to_dict()}))
    return True


def _column(rows: list[tuple[object, ...]], name: str) -> list[float] | None:
    """A column of the rows as numbers, None where any is missing."""
    values = [row[STEP_COLUMNS.index(name)] for row in rows]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else None


def source_notes(source: BatchSource) -> list[str]:
    """What the data has to say for itself, such as files it could not read, or work done ahead of the clock."""
    facts = source.describe()
    names = [*facts.get("skipped", []), *facts.get("unreadable_in_training", [])]
    count = facts.get("num_skipped", 0) + facts.get("num_unreadable_in_training", 0)
    notes = [f"{count} image files could not be used: {', '.join(names[:5])}"] if count else []
    if cache := facts.get("latent_cache"):
        notes.append(
            f"latents were read from a cache: encoding {cache['views']} x {facts['num_train']} images took "
            f"{cache['seconds']:.1f} s and {cache['num_bytes'] / 2**20:.1f} MiB once, off the clock"
        )
    return notes
