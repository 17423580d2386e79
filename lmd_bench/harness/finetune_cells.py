"""Fine-tuning encoders that are on disk: finished cells, and authors' checkpoints that were imported."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmd_bench.config import AugmentationConfig, DataConfig, ImportedConfig, RowConfig, RunConfig, Suite, near
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.scenes import num_scene_classes
from lmd_bench.data.source import BatchSource, open_source
from lmd_bench.errors import ConfigError
from lmd_bench.harness.environment import machine_name
from lmd_bench.harness.finetune import FinetuneJob, FinetuneOutcome, OnTuned, fine_tune, named, with_finetune
from lmd_bench.harness.finetune_plan import check_finetune, resolve_finetune
from lmd_bench.harness.optim import check_optimizer
from lmd_bench.harness.plan import resolve_device
from lmd_bench.harness.weights import WEIGHTS_FILE, load_method_weights, read_weights_config
from lmd_bench.method import Method
from lmd_bench.records import (
    FINETUNE_FILE,
    TUNED_ELSEWHERE,
    TUNED_ON_OTHERS,
    FinetuneRecord,
    RunRecord,
    find_runs,
    read_finetune,
    read_run,
    write_json,
)
from lmd_bench.registry import load_method
from lmd_bench.suite_files import SUITE_FILE, apply_settings, load_suite, parse_suite

_IMPORTED_ROW = "imported"
_SETTABLE = ("finetune.", "finetune_recipes.")


@dataclass(frozen=True)
class FinetuneRequest:
    """What is asked for on the command line."""

    path: Path
    """A finished or imported cell, or OUT/<suite>: all its finished cells."""
    suite: str | None = None
    """Whose fine-tuning is done; None: that of the suite beside the cells."""
    recipe: str | None = None
    """One of its fine-tuning recipes; None: each row's own."""
    data: Path | None = None
    settings: tuple[str, ...] = ()
    device: str = "auto"
    force: bool = False
    added: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderJob:
    """One encoder on disk and what is to be done to it."""

    name: str
    """In words."""
    folder: Path
    image_size: int
    job: FinetuneJob
    source: RunRecord | ImportedConfig
    """Where it comes from: a cell, or a checkpoint that was imported."""


@dataclass
class FinetunePlan:
    """All that will be done, checked."""

    suite: Suite
    """What is asked for. The suite beside the cells stays as it is: it says how they were run."""
    suite_folder: Path | None
    """Where the report is made again; None for an imported encoder."""
    data: DataConfig
    index: FolderIndex | None
    jobs: list[EncoderJob] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Training images of the data."""
        if self.index is not None:
            return self.index.num_train
        assert self.data.num_train is not None  # held by DataConfig
        return self.data.num_train

    @property
    def num_classes(self) -> int | None:
        """Classes of the data."""
        return num_scene_classes(self.data.labels) if self.index is None else self.index.num_classes


def plan_finetune(request: FinetuneRequest) -> FinetunePlan:
    """Check everything before any encoder is loaded. Raises a BenchError for what cannot be done."""
    path = request.path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a finished cell, OUT/<suite>/<row>/seed-<n>, or OUT/<suite>")
    if (path / SUITE_FILE).is_file():
        plan = _open_plan(request, path, {})
        _add_cells(plan, request)
    elif (path / "record.json").is_file():
        suite_folder = path.resolve().parents[1]
        plan = _open_plan(request, suite_folder if (suite_folder / SUITE_FILE).is_file() else None, {})
        plan.jobs.append(_cell_job(plan, request, read_run(path / "record.json"), path))
    else:
        config = read_weights_config(path)
        if not isinstance(config, ImportedConfig):
            raise ConfigError(f"{path}: holds weights of a run without its record.json; give the cell's folder")
        if not request.force and _is_tuned(path / FINETUNE_FILE):
            raise ConfigError(f"{path}: is fine-tuned already ({FINETUNE_FILE}); --force does it again")
        row = RowConfig(method=config.method, label=config.method, options=config.options)
        plan = _open_plan(request, None, {_IMPORTED_ROW: row})
        plan.jobs.append(_imported_job(plan, request, config, path))
    return plan


def fine_tune_all(
    plan: FinetunePlan,
    request: FinetuneRequest,
    *,
    command: str,
    environment: Mapping[str, Any],
    on_began: Callable[[EncoderJob], None],
    on_tuned: OnTuned,
) -> dict[str, str]:
    """Everything in the plan, one after the other. Returns the names of those that failed, with the reason."""
    failed: dict[str, str] = {}
    shelf = ImageShelf(plan)
    try:
        for job in sorted(plan.jobs, key=lambda job: job.image_size):
            on_began(job)
            try:
                outcome = fine_tune_encoder(
                    plan, job, shelf, request, command=command, environment=environment, on_tuned=on_tuned
                )
            except Exception as error:  # what came of it cannot be written: the other cells are tuned all the same
                failed[job.name] = named(error)
                continue
            if outcome.finetune is None:
                failed[job.name] = outcome.not_measured["finetune"]
    finally:
        shelf.close()
    return failed


@dataclass
class ImageShelf:
    """The images that encoders are fine-tuned on, of one size at a time: scenes are drawn, which is slow."""

    plan: FinetunePlan
    _source: BatchSource | None = None
    _size: int = 0

    def source(self, job: EncoderJob) -> BatchSource:
        """Images of the encoder's size. Raises DataError."""
        if self._source is None or self._size != job.image_size:
            self.close()
            plan, device = self.plan, job.job.device
            self._source = open_source(plan.data, job.image_size, AugmentationConfig(), device, index=plan.index)
            self._size = job.image_size
        return self._source

    def describe(self) -> dict[str, Any]:
        """Of the images opened last, for the record."""
        return {} if self._source is None else self._source.describe()

    def close(self) -> None:
        """Stop workers, and let go of the images."""
        if self._source is not None:
            self._source.close()
        self._source = None


def fine_tune_encoder(
    plan: FinetunePlan,
    job: EncoderJob,
    shelf: ImageShelf,
    request: FinetuneRequest,
    *,
    command: str,
    environment: Mapping[str, Any],
    on_tuned: OnTuned,
) -> FinetuneOutcome:
    """Fine-tune one encoder from its saved weights and write what came of it beside them.

    What fails becomes a reason in the outcome, its traceback goes to `error.txt`; where an earlier result stands, it
    is left standing. Raises OSError where nothing can be written.
    """
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    outcome = FinetuneOutcome()

    def tune() -> None:
        nonlocal outcome
        images = shelf.source(job)
        method, _ = load_method_weights(job.folder, request.added)
        outcome = fine_tune(method.to(job.job.device).train(), images, job.job, on_tuned)

    outcome.attempt(tune, "finetune")
    outcome.write_details(job.folder)
    if outcome.finetune is not None:
        outcome.finetune.notes.append(f"fine-tuned from saved weights: {command}")
    if isinstance(job.source, RunRecord):
        if outcome.finetune is not None or job.source.finetune is None:
            _write_cell(plan, job, job.source, outcome, environment)
    elif outcome.finetune is not None or not _is_tuned(job.folder / FINETUNE_FILE):
        record = FinetuneRecord(
            method=job.source.method,
            config=job.source.model_dump(mode="json"),
            data=shelf.describe(),
            command=command,
            started_at=started_at,
            environment=dict(environment),
            finetune=outcome.finetune,
            probes=outcome.probes,
            not_measured=outcome.not_measured,
        )
        write_json(job.folder / FINETUNE_FILE, record)
    return outcome


def _is_tuned(path: Path) -> bool:
    """Whether a result of fine-tuning stands there, not merely why there is none. Raises RecordError."""
    return path.exists() and read_finetune(path).finetune is not None


def _write_cell(
    plan: FinetunePlan, job: EncoderJob, record: RunRecord, outcome: FinetuneOutcome, environment: Mapping[str, Any]
) -> None:
    config = RunConfig.model_validate({**record.config, "finetune": job.job.settings.model_dump(mode="json")})
    if outcome.finetune is not None:
        here, there = machine_name(dict(environment)), machine_name(record.environment)
        if here != there:
            outcome.finetune.notes.append(f"{TUNED_ELSEWHERE}{here}")
        if plan.data.path != config.data.path:
            outcome.finetune.notes.append(f"{TUNED_ON_OTHERS}{plan.data.path}")
    changed = with_finetune(record, outcome)
    write_json(job.folder / "record.json", changed.model_copy(update={"config": config.model_dump(mode="json")}))


# -- what is asked for ------------------------------------------------------------------------------------------------


def _open_plan(request: FinetuneRequest, suite_folder: Path | None, rows: Mapping[str, RowConfig]) -> FinetunePlan:
    """The suite with the fine-tuning that is asked for, and its data; `rows` are added to it."""
    if suite_folder is None and request.suite is None:
        raise ConfigError(f"{request.path}: no {SUITE_FILE} says how to fine-tune it: name a suite with --suite")
    own = None if suite_folder is None else load_suite(str(suite_folder / SUITE_FILE))
    suite = _with_recipes(own, None if request.suite is None else load_suite(request.suite))
    if rows:
        suite = suite.model_copy(update={"methods": {**suite.methods, **rows}})
    if request.settings:
        _check_settings(request.settings)
        values = apply_settings(suite.model_dump(mode="json"), request.settings, {})
        suite = parse_suite(values, f"suite {suite.name} with --set")
    if suite.finetune is None:
        raise ConfigError(f"suite {suite.name}: has no finetune section; name a suite that has with --suite")
    if request.recipe is not None and request.recipe not in suite.finetune_recipes:
        hint = near(request.recipe, suite.finetune_recipes)
        raise ConfigError(f"--recipe {request.recipe}: no such fine-tuning recipe in suite {suite.name}{hint}")
    data = suite.data
    if request.data is not None:
        changed = {"name": "folder", "path": str(request.data), "num_train": None}
        data = DataConfig.model_validate({**data.model_dump(), **changed})
    index = None
    if data.name == "folder":
        if data.path is None:
            raise ConfigError(f"suite {suite.name} trains on a folder of images: name it with --data DIR")
        index = scan_folder(Path(data.path), data)
    return FinetunePlan(suite, suite_folder, data, index)


def _check_settings(settings: Sequence[str]) -> None:
    for setting in settings:
        if not setting.startswith(_SETTABLE):
            raise ConfigError(
                f"--set {setting}: encoders are fine-tuned as they were trained; only finetune.* and "
                "finetune_recipes.* can be set here"
            )


def _with_recipes(own: Suite | None, other: Suite | None) -> Suite:
    """The cells' suite with the fine-tuning of another, row by row; either may be missing, not both."""
    if own is None or other is None:
        found = own or other
        assert found is not None  # held by the caller
        return found
    methods = {
        name: row.model_copy(update={"finetune": other.methods[name].finetune if name in other.methods else None})
        for name, row in own.methods.items()
    }
    return own.model_copy(
        update={"finetune": other.finetune, "finetune_recipes": other.finetune_recipes, "methods": methods}
    )


def _add_cells(plan: FinetunePlan, request: FinetuneRequest) -> None:
    """All finished cells of a suite that can be fine-tuned; the others are noted. Raises where none is left."""
    assert plan.suite_folder is not None
    for path in find_runs(plan.suite_folder):
        record = read_run(path)
        name = f"{record.row} seed {record.seed}"
        reason = _obstacle(record, request) or _suite_obstacle(plan, request, record)
        if reason is None:
            plan.jobs.append(_cell_job(plan, request, record, path.parent))
        else:
            plan.notes.append(f"{name}: {reason}")
    if not plan.jobs:
        reasons = "; ".join(plan.notes) or "it holds no finished cell"
        raise ConfigError(f"{plan.suite_folder}: nothing to fine-tune: {reasons}")


def _obstacle(record: RunRecord, request: FinetuneRequest) -> str | None:
    """Why a cell cannot be fine-tuned, whatever the suite says; None where it can."""
    if record.status == "failed":
        return f"failed when it ran ({record.error}): run it again"
    if record.finetune is not None and not request.force:
        return "is fine-tuned already; --force does it again"
    return "left no weights" if record.weights is None else None


def _suite_obstacle(plan: FinetunePlan, request: FinetuneRequest, record: RunRecord) -> str | None:
    """Why a finished cell is left out where all of a suite's are asked for; None where it is not."""
    if record.row not in plan.suite.methods:
        return "is no row of the suite any more"
    if request.recipe is None and plan.suite.methods[record.row].finetune is None:
        return "names no fine-tuning recipe"
    config = RunConfig.model_validate(record.config)
    method = load_method(config.method, request.added)
    return method.classifier_obstacle(method.Config.model_validate(config.options))


def _cell_job(plan: FinetunePlan, request: FinetuneRequest, record: RunRecord, folder: Path) -> EncoderJob:
    name = f"{record.row} seed {record.seed}"
    if (obstacle := _obstacle(record, request)) is not None:
        raise ConfigError(f"{folder}: {obstacle}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ConfigError(f"{folder}: holds no {WEIGHTS_FILE}: run the cell again and keep its weights")
    if record.row not in plan.suite.methods:
        raise ConfigError(f"{folder}: suite {plan.suite.name} has no row {record.row!r}")
    config = RunConfig.model_validate(record.config)
    method = load_method(config.method, request.added)
    job = _job(plan, request, record.row, method, config.options, config.seed, config)
    return EncoderJob(name, folder, config.image_size, job, record)


def _imported_job(plan: FinetunePlan, request: FinetuneRequest, config: ImportedConfig, folder: Path) -> EncoderJob:
    method = load_method(config.method, request.added)
    job = _job(plan, request, _IMPORTED_ROW, method, config.options, 0, None)
    return EncoderJob(f"{config.method} from {config.source}", folder, config.image_size, job, config)


def _job(
    plan: FinetunePlan,
    request: FinetuneRequest,
    row: str,
    method: type[Method],
    options: Mapping[str, Any],
    seed: int,
    config: RunConfig | None,
) -> FinetuneJob:
    """The job of one encoder, checked. `config` is that of its training, None where there was none here."""
    suite = plan.suite
    recipe = request.recipe or suite.methods[row].finetune
    if recipe is None:
        names = ", ".join(suite.finetune_recipes) or "the suite has none"
        raise ConfigError(f"{request.path}: row {row} names no fine-tuning recipe: choose with --recipe ({names})")
    rows = {**suite.methods, row: suite.methods[row].model_copy(update={"finetune": recipe})}
    settings = resolve_finetune(suite.model_copy(update={"methods": rows}), row, plan.num_images)
    assert settings is not None  # the suite has a finetune section, and the row a recipe
    device = resolve_device(request.device)
    check_optimizer(settings.recipe.optimizer, device)
    checked = method.Config.model_validate(options)
    obstacle = check_finetune(
        method, checked, settings, row=row, seed=plan.data.seed, num_classes=plan.num_classes, index=plan.index
    )
    if obstacle is not None:
        raise ConfigError(f"{request.path}: {obstacle}")
    return FinetuneJob(
        settings,
        seed,
        torch.device(device),
        suite.precision if config is None else config.precision,
        suite.compile if config is None else config.compile,
        min(suite.untimed_steps, settings.steps),
        suite.log_every_steps,
    )
