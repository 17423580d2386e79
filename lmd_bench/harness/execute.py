"""One cell from its settings to its record: seed -> data -> method -> train (timed) -> evaluate -> record."""

from __future__ import annotations

import datetime
import shutil
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
from lmd_bench.harness.evaluate import YardstickRunner, check_steps, open_lpips
from lmd_bench.harness.finetune import FinetuneJob, FinetuneOutcome, fine_tune, with_finetune
from lmd_bench.harness.image_quality import ImageQualityRunner, measure_quality, with_quality
from lmd_bench.harness.instrument import measure_instrument
from lmd_bench.harness.latents import open_cached, without_training
from lmd_bench.harness.loop import Trainer, TrainOptions, TrainResult, filling_precision
from lmd_bench.harness.noise import noise_batch
from lmd_bench.harness.plan import Cell, Plan
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import StepTimes, clock_for
from lmd_bench.harness.weights import WEIGHTS_FILE, save_weights
from lmd_bench.method import DataSpec, Method
from lmd_bench.metrics.cost import PeakMemory, count_step_flops
from lmd_bench.metrics.efficiency import EstimatorConfig, measure_run
from lmd_bench.nn.perceptual import PerceptualDistance
from lmd_bench.projector.cache_encode import OnProgress
from lmd_bench.records import (
    PHASES,
    PICTURES,
    STEP_COLUMNS,
    YARDSTICK_BOUNDS,
    Cost,
    Phases,
    RunRecord,
    StepWriter,
    Timing,
    Yardstick,
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

    def filled(self, num_images: int, total: int) -> None: ...

    def tuned(self, step: int, total: int, top1: float) -> None: ...

    def ended(self, record: RunRecord) -> None: ...


@dataclass
class DataShelf:
    """Data sources already made, so that rows with the same data and augmentation, or the same cache, share them."""

    plan: Plan
    _sources: dict[str, BatchSource] = field(default_factory=dict)
    _lpips: dict[int, PerceptualDistance | str] = field(default_factory=dict)
    _lpips_note: str = ""
    """Which weights LPIPS was opened with."""
    _image_quality: ImageQualityRunner | None = None

    def source(self, config: RunConfig, *, command: str, on_progress: OnProgress) -> BatchSource:
        """The source for a cell's images and augmentation, or for its cached latents.

        A cache that has to be made is made here; `command` is noted in it, `on_progress` told of it.
        """
        if not config.steps:
            return self._held_out_source(config)
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

    def _held_out_source(self, config: RunConfig) -> BatchSource:
        """For a cell that looks at held-out images alone: the source of any row that is trained at its size, opened
        now if it comes later, otherwise one without training images."""
        cells = [cell.config for cell in self.plan.cells]
        trained = [each for each in cells if each.steps and each.image_size == config.image_size]
        opened = [each for each in trained if f"{each.image_size} {each.recipe.augmentation}" in self._sources]
        lender = next(iter([*opened, *(each for each in trained if each.row not in self.plan.caches)]), None)
        if lender is not None:
            return self.images(lender)
        key = f"{config.image_size} held out"
        if key not in self._sources:
            data, device = without_training(config.data), torch.device(config.device)
            self._sources[key] = open_source(
                data, config.image_size, config.recipe.augmentation, device, index=self.plan.folder_index
            )
        return self._sources[key]

    def images(self, config: RunConfig) -> BatchSource:
        """The source for a cell's images, also where the cell reads cached latents."""
        key = f"{config.image_size} {config.recipe.augmentation}"
        if key not in self._sources:
            device, index = torch.device(config.device), self.plan.folder_index
            self._sources[key] = open_source(
                config.data, config.image_size, config.recipe.augmentation, device, index=index
            )
        return self._sources[key]

    def lpips(self, config: RunConfig) -> PerceptualDistance | str:
        """LPIPS for a cell's images, opened once, or why it cannot be measured."""
        if config.image_size not in self._lpips:
            download = config.image_quality is not None and config.image_quality.download
            weights = self.plan.weights
            found = self._lpips[config.image_size] = open_lpips(weights, config.image_size, download=download)
            if isinstance(found, PerceptualDistance):  # asked now: after a training nothing may fail that need not
                name, sha256 = weights.find("alexnet").name, weights.sha256_of("alexnet")
                self._lpips_note = f"LPIPS on the yardstick: {name}, SHA-256 {sha256}"
        return self._lpips[config.image_size]

    def lpips_notes(self, measured: Yardstick) -> list[str]:
        """Which weights the LPIPS of a yardstick was measured with; none where there is no LPIPS in it."""
        if not measured.checks or measured.checks[-1].lpips is None:
            return []
        return [self._lpips_note]

    def image_quality(self, config: RunConfig) -> ImageQualityRunner:
        """What measures image quality, made once; weights that may be downloaded are there afterwards."""
        if self._image_quality is None:
            self._image_quality = ImageQualityRunner.from_plan(self.plan, config)
            self._image_quality.fetch_weights()
        return self._image_quality

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
        shutil.rmtree(cell.folder / PICTURES, ignore_errors=True)
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
    text = _named(error)
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


def _named(error: Exception) -> str:
    return _shortened(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {_shortened(error)}"


def _shortened(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def _measure(cell: Cell, shelf: DataShelf, base: RunRecord, writer: StepWriter, watcher: Watcher) -> RunRecord:
    config = cell.config
    device = torch.device(config.device)
    if config.image_quality is not None:
        shelf.image_quality(config)  # downloads come before the first training, not after it
    source = shelf.source(config, command=base.command, on_progress=watcher.encoded)
    give_back_freed_memory()
    method = build_method(config, cell.method, source.num_classes)
    source = source.with_collate(method.collate)
    not_measured: dict[str, str] = {}
    yardstick = _yardstick(method, config, source, shelf, not_measured)
    training = None
    if cell.method.is_trained:
        training = _train(method, config, source, yardstick, writer, watcher, not_measured)
    else:
        not_measured.update(dict.fromkeys(_OF_TRAINING, NO_TRAINING))
        if yardstick is not None:
            watcher.checked(0, yardstick.check(method, 0, 0.0).psnr_db)
    keeps = training is not None and shelf.plan.save_weights  # weights that came trained are the user's own files
    weights = save_weights(method, cell.folder / WEIGHTS_FILE, config) if keeps else None
    record = base.model_copy(
        update={
            **(training.figures if training else {"cost": _cost(method, None, None, PeakMemory(device).kind, None)}),
            "weights": weights,
            "not_measured": not_measured,
            "data": source.describe(),
            "gpu_at_end": gpu_facts(config.device, {}) if device.type == "cuda" else None,
            "notes": [*(training.notes if training else []), *source_notes(source)],
        }
    )
    if yardstick is not None:
        record = _with_summary(cell, method, yardstick, record, shelf)
    if config.image_quality is not None:
        record = _with_image_quality(cell, method, shelf, record, watcher)
    return record if config.finetune is None else _tune(cell, method, shelf, record, watcher)


def _with_summary(
    cell: Cell, method: Method, yardstick: YardstickRunner, record: RunRecord, shelf: DataShelf
) -> RunRecord:
    """The record with what stands beside the yardstick's checks. It is written with these before: nothing that ends
    the rest can take them or the training."""
    checked = yardstick.checked(method)
    record = record.model_copy(update={"yardstick": checked, "notes": [*record.notes, *shelf.lpips_notes(checked)]})

    def without(reason: str) -> RunRecord:
        return record.model_copy(update={"not_measured": {**record.not_measured, YARDSTICK_BOUNDS: reason}})

    write_json(cell.folder / "record.json", without("stopped before its end; --force runs the cell again"))
    try:
        return record.model_copy(update={"yardstick": yardstick.summary(method)})
    except Exception as error:  # the training is done: whatever fails here is a reason in the record
        return without(_named(error))


def _with_image_quality(cell: Cell, method: Method, shelf: DataShelf, record: RunRecord, watcher: Watcher) -> RunRecord:
    """The record with its image quality. It is written before: nothing that ends the measurement can take it."""
    stopped = "stopped before its end: `lmd-bench evaluate` makes up for it"
    write_json(cell.folder / "record.json", with_quality(record, None, stopped))
    runner = shelf.image_quality(cell.config)
    found = measure_quality(runner, method, cell.config, cell.folder, watcher.filled)
    runner.close_evaluators()
    return with_quality(record, *found)


def _tune(cell: Cell, method: Method, shelf: DataShelf, record: RunRecord, watcher: Watcher) -> RunRecord:
    """The record with probes and fine-tuning. It is written before they begin: nothing that ends them can take it."""
    stopped = {**record.not_measured, "finetune": "stopped before its end: `lmd-bench finetune` makes up for it"}
    write_json(cell.folder / "record.json", record.model_copy(update={"not_measured": stopped}))
    outcome = FinetuneOutcome()

    def tune() -> None:
        nonlocal outcome
        outcome = fine_tune(method, shelf.images(cell.config), FinetuneJob.from_config(cell.config), watcher.tuned)

    outcome.attempt(tune, "finetune")
    outcome.write_details(cell.folder)
    return with_finetune(record, outcome)


NO_TRAINING = "comes trained: no training was measured"
"""Why a method that is not trained here lacks the figures of training."""
_OF_TRAINING = ("efficiency", "timing", "phases", "flops_per_step", "peak_memory_bytes")


@dataclass(frozen=True)
class _Training:
    """What training leaves beside the weights: fields of the record."""

    figures: dict[str, Any]
    notes: list[str]


def _train(
    method: Method,
    config: RunConfig,
    source: BatchSource,
    yardstick: YardstickRunner | None,
    writer: StepWriter,
    watcher: Watcher,
    not_measured: dict[str, str],
) -> _Training:
    device = torch.device(config.device)
    flops = _count_flops(method, config, not_measured)
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
    trainer.settle()
    peak = memory.peak_bytes()
    figures = {
        "timing": _timing(result, measure_instrument(device, config.log_every_steps)),
        "phases": mean_phases(result.times),
        "cost": _cost(method, flops, peak, memory.kind, result.compiled_graphs),
        "efficiency": _efficiency(result, rows, config),
    }
    notes = [] if result.wall.valid else [f"invalid: {result.wall.residual_share:.2%} of the wall time is missing"]
    return _Training(figures, notes)


def _cost(method: Method, flops: int | None, peak: int | None, kind: str, compiled_graphs: int | None) -> Cost:
    return Cost(
        parameters=sum(p.numel() for p in method.parameters()),
        trainable_parameters=sum(p.numel() for p in method.parameters() if p.requires_grad),
        projector_parameters=projector_parameters(method),
        flops_per_step=flops,
        peak_memory_bytes=peak,
        peak_memory_kind=kind,
        compiled_graphs=compiled_graphs,
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
    method: Method, config: RunConfig, source: BatchSource, shelf: DataShelf, not_measured: dict[str, str]
) -> YardstickRunner | None:
    if config.evaluation.num_checks == 0:
        not_measured["yardstick"] = "turned off (evaluation.num_checks: 0)"
        return None
    obstacle = type(method).yardstick_obstacle(type(method).Config.model_validate(config.options))
    if obstacle is not None:
        not_measured["yardstick"] = obstacle
        return None
    images: Tensor = source.held_out(config.evaluation.num_images)
    found = shelf.lpips(config)
    if isinstance(found, str):
        not_measured["lpips"] = found
    perceptual = None if isinstance(found, str) else found
    precision = filling_precision(type(method), config.precision)
    device = torch.device(config.device)
    runner = YardstickRunner(images, config.evaluation, config.seed, device, perceptual, precision)
    runner.checked(method)  # what a method cannot say of itself fails before the training, not after it
    return runner


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
    if not cell.method.is_trained or record.config.get("estimator") == estimator.model_dump(mode="json"):
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
