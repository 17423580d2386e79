"""From a suite to cells that are known to be runnable: every problem is found here, together, before anything runs."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lmd_bench.config import (
    LATER_PARTS,
    NOT_TRAINED,
    DataConfig,
    EvaluationConfig,
    ImageQualityConfig,
    Json,
    RecipeConfig,
    RunConfig,
    Suite,
    near,
    resolve_crop,
)
from lmd_bench.errors import BenchError, ConfigError
from lmd_bench.harness.finetune_plan import check_finetune, resolve_finetune, warmup_steps
from lmd_bench.harness.image_quality_plan import (
    has_other_captions,
    image_quality_bytes,
    image_quality_notes,
    require_captions,
    resolve_image_quality,
)
from lmd_bench.harness.published_weights import ResolvedRows, download_note, download_weights, resolve_weights
from lmd_bench.option_tree import option_names
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import RunRecord, cell_folder, read_run
from lmd_bench.registry import check_added, code_digest, load_method, method_name
from lmd_bench.suite_files import describe_validation

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex
    from lmd_bench.method import Method
    from lmd_bench.projector.cache import CacheNeed

BYTES_PER_STEP_ROW = 160
BYTES_PER_CELL = 64 * 1024
REPORT_BYTES = 8 * 1024 * 1024
UNKNOWN_WEIGHTS_BYTES = 512 * 1024 * 1024
"""Allowed for the weights of a cell whose method cannot be built without its tensors."""


@dataclass(frozen=True)
class Cell:
    """One (row, seed), ready to run."""

    config: RunConfig
    method: type[Method]
    folder: Path


@dataclass
class Plan:
    """What a run will do."""

    suite: Suite
    out: Path
    cells: list[Cell] = field(default_factory=list)
    """To be run, in order: all rows of the first seed, then of the next."""
    finished: list[Cell] = field(default_factory=list)
    """Already on disk with the same settings: left alone."""
    listed_only: dict[str, str] = field(default_factory=dict)
    """Rows that the suite lists and does not run -> why."""
    missing: dict[str, str] = field(default_factory=dict)
    """Rows whose published weights are not there -> why. They are noted in the suite too, for its report."""
    options: dict[str, Json] = field(default_factory=dict)
    """Row -> its options, with paths in place of published weights' names."""
    folder_index: FolderIndex | None = None
    save_weights: bool = True
    """Whether every cell keeps its trained weights."""
    weights_bytes: dict[str, int] = field(default_factory=dict)
    """Row -> bytes of one cell's weights, where they are kept."""
    weights: WeightsStore = field(default_factory=WeightsStore)
    """Where published weights are looked for."""
    image_quality: ImageQualityConfig | None = None
    """As the cells measure it; None where the suite does not ask for it."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before it starts."""
    inputs: dict[str, str | None] = field(default_factory=dict)
    """Row -> digest of the files that its options name, read once for all seeds."""
    caches: dict[str, CacheNeed] = field(default_factory=dict)
    """Row -> the latent cache it reads, checked, or to be made before its first cell; rows that encode are left out."""

    @property
    def disk_bytes(self) -> int:
        """Upper estimate of what the cells and the report will write."""
        steps = sum(cell.config.steps + cell.config.untimed_steps for cell in self.cells)
        latents = sum({need.folder: need.num_bytes for need in self.caches.values()}.values())
        weights = sum(self.weights_bytes.get(cell.config.row, 0) for cell in self.cells)
        quality = image_quality_bytes(self.image_quality, [cell.config.image_size for cell in self.cells])
        cells = len(self.cells) * BYTES_PER_CELL
        return steps * BYTES_PER_STEP_ROW + cells + weights + latents + quality + REPORT_BYTES


def add_rows(values: dict[str, Any], added: Sequence[str]) -> dict[str, str]:
    """Give every `file.py:Class` a row of its own in valid raw suite values, under the reference row's recipe.

    A row that already names the method keeps its values. Returns method name -> target. Raises ConfigError for a
    name that is taken.
    """
    names: dict[str, str] = {}
    rows = values["methods"]
    trained = {row: settings for row, settings in rows.items() if settings.get("recipe") is not None}
    if not trained:
        raise ConfigError("--add: no row of the suite has a recipe that the method could be trained by")
    recipe = trained.get(values.get("reference"), next(iter(trained.values())))["recipe"]
    for target in added:
        check_added(target)
        name = method_name(target)
        if name in names:
            raise ConfigError(f"--add {target}: {names[name]} is named {name!r} too; give one class another name")
        if rows.get(name, {}).get("method", name) != name:
            raise ConfigError(f"--add {target}: the suite has a row {name!r} of another method; rename the class")
        names[name] = target
        rows.setdefault(name, {"method": name, "label": name, "recipe": recipe})
    return names


def method_options(suite: Suite, added: Mapping[str, str], rows: Sequence[str]) -> dict[str, list[str]]:
    """Dotted names of the options that the methods of these rows know, for `--set`. Unknown methods give none."""
    names: dict[str, list[str]] = {}
    for row in rows:
        try:
            names[row] = option_names(load_method(suite.methods[row].method, added).Config)
        except (BenchError, KeyError):
            names[row] = []
    return names


def select_rows(suite: Suite, methods: str | None) -> list[str]:
    """The rows that `--methods a,b` names; None takes all that the suite runs. Raises ConfigError for unknown ones."""
    if methods is None:
        run_here = [name for name, row in suite.methods.items() if row.listed_only is None]
        if not run_here:
            raise ConfigError(f"suite {suite.name}: all of its rows are only listed")
        return run_here
    names = list(dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()))
    if not names:
        raise ConfigError("--methods names no method")
    problems = []
    for name in names:
        if name not in suite.methods:
            problems.append(f"--methods: suite {suite.name} has no row {name!r}{near(name, suite.methods)}")
        elif (reason := suite.methods[name].listed_only) is not None:
            problems.append(f"--methods {name}: cannot be run: {reason}")
    if problems:
        raise ConfigError("\n".join(problems))
    return names


def make_plan(
    suite: Suite,
    rows: Sequence[str],
    *,
    device: str,
    out: Path,
    added: Mapping[str, str],
    force: bool,
    reads_data: bool = True,
    save_weights: bool = True,
    weights: WeightsStore | None = None,
    named: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Check everything that can be checked without training. Raises ConfigError with all problems, one a line.

    named: whether the user asked for these very rows; one that lacks published weights is then an error. Otherwise it
    is left out, with the reason in `Plan.missing`.
    weights: where published weights are looked for; None: where the libraries keep theirs. What rows lack and the suite
    allows to download is downloaded last, once nothing else is wrong; in a dry run a note says so instead, and those
    rows have no cells.
    Speed runs read no data, so that latent caches made of it are no concern of theirs, and download nothing.
    """
    problems: list[str] = []
    listed_only = {n: r.listed_only for n, r in suite.methods.items() if r.listed_only is not None}
    plan = Plan(suite, out, listed_only=listed_only, save_weights=save_weights, weights=weights or WeightsStore())
    found = _resolve_weights(plan, rows, problems, named=named, download=reads_data)
    suite = plan.suite
    rows = [row for row in rows if row in {*found.rows, *found.to_download}]
    if not reads_data:
        suite = suite.model_copy(update={"finetune": None, "image_quality": None})
    device_name = _attempt(problems, lambda: resolve_device(device)) or "cpu"
    _attempt(problems, lambda: _check_writable(out))
    classes = {row: _attempt(problems, lambda row=row: load_method(suite.methods[row].method, added)) for row in rows}
    num_train = _attempt(problems, lambda: _open_data(suite, rows, plan))
    if suite.evaluation.num_checks and suite.evaluation.num_images > suite.data.num_held_out:
        problems.append(
            f"evaluation.num_images: {suite.evaluation.num_images} images, but data.num_held_out holds back only "
            f"{suite.data.num_held_out}"
        )
    if num_train is not None:
        wanting = [row for row, method in classes.items() if method is not None and method.wants_captions]
        _attempt(problems, lambda: _plan_image_quality(plan, suite, wanting))

    def add_cells(some: Sequence[str]) -> None:
        for seed, row in itertools.product(suite.seeds, some):
            method = classes[row]
            if method is None or num_train is None:
                continue
            cell = _attempt(
                problems,
                lambda row=row, seed=seed, m=method: _cell(suite, row, seed, m, device_name, num_train, plan, added),
            )
            if cell is not None:
                _attempt(problems, lambda cell=cell: _sort_in(plan, cell, force))
        new = {cell.config.row: cell for cell in plan.cells if cell.config.row in some}
        for cell in new.values() if reads_data else ():
            _attempt(problems, lambda cell=cell: _plan_cache(plan, cell))
            _attempt(problems, lambda cell=cell: _note_seen_images(plan, cell))
            _attempt(problems, lambda cell=cell: _check_finetune(plan, cell))

    add_cells(found.rows)
    for row in found.to_download:
        if (method := classes[row]) is not None:
            _attempt(problems, lambda row=row, m=method: _settings(suite, row, m, plan))
    if reads_data:
        _attempt(problems, lambda: _check_lpips(plan))
    if not problems and found.to_download:
        if dry_run:
            plan.notes += [download_note(row, suite.methods[row].options, plan.weights) for row in found.to_download]
        else:
            _attempt(problems, lambda: _download(plan, found.to_download))
            add_cells([row for row in found.to_download if row in plan.options])
            _attempt(problems, lambda: _check_lpips(plan))
            for cells in (plan.cells, plan.finished):
                cells.sort(key=lambda cell: (suite.seeds.index(cell.config.seed), rows.index(cell.config.row)))
    if not problems:
        plan.weights_bytes = _weights_bytes(plan)
        _attempt(problems, lambda: _check_disk(plan))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return plan


def _resolve_weights(
    plan: Plan, rows: Sequence[str], problems: list[str], *, named: bool, download: bool
) -> ResolvedRows:
    """Which rows have their published weights; the plan's suite gets `missing` set."""
    quality = plan.suite.image_quality
    download = download and quality is not None and quality.download
    found = resolve_weights(plan.suite, rows, plan.weights, named=named, download=download)
    problems += found.problems
    plan.suite, plan.options = found.suite, found.options
    plan.missing = {name: row.missing for name, row in plan.suite.methods.items() if row.missing is not None}
    return found


def _download(plan: Plan, rows: Sequence[str]) -> None:
    """Fetch what rows lack; ends at the first that cannot be had."""
    for row in rows:
        plan.options[row] = download_weights(row, plan.suite.methods[row].options, plan.weights)


def _check_lpips(plan: Plan) -> None:
    """Raise WeightsError for AlexNet weights that are there and wrong, where the yardstick would measure with them."""
    if any(
        cell.config.evaluation.num_checks
        and cell.method.yardstick_obstacle(cell.method.Config.model_validate(cell.config.options)) is None
        for cell in plan.cells
    ):
        plan.weights.obstacle("alexnet")


def _attempt(problems: list[str], action: Any) -> Any:
    """The action's result; a BenchError is noted instead, and None returned."""
    try:
        return action()
    except BenchError as error:
        problems.append(str(error))
        return None


def resolve_device(name: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there. Raises ConfigError otherwise."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if count else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        there = f"{count} CUDA device{'s' if count != 1 else ''}"
        raise ConfigError(f"--device {name}: this machine has {there}; use --device cpu or another number")
    return f"cuda:{index or 0}"


def _check_writable(out: Path) -> None:
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"--out {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: no permission to write in {existing}")


def _weights_bytes(plan: Plan) -> dict[str, int]:
    """What one cell of every row that will run keeps; nothing where weights are not saved."""
    from lmd_bench.harness.weights import expected_bytes
    from lmd_bench.method import DataSpec

    found: dict[str, int] = {}
    for cell in plan.cells if plan.save_weights else ():
        config = cell.config
        if config.row not in found and cell.method.is_trained:
            options = cell.method.Config.model_validate(config.options)
            spec = DataSpec(config.image_size, _num_classes(plan.suite.data, plan))
            found[config.row] = expected_bytes(cell.method, options, spec) or UNKNOWN_WEIGHTS_BYTES
    return found


def _check_disk(plan: Plan) -> None:
    existing = plan.out
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < plan.disk_bytes:
        raise ConfigError(
            f"--out {plan.out}: {free / 2**20:.0f} MiB free, about {plan.disk_bytes / 2**20:.0f} MiB needed: "
            "free some space or choose another --out"
        )


def _open_data(suite: Suite, rows: Sequence[str], plan: Plan) -> int:
    """Number of training images; scans a folder once."""
    data = suite.data
    if data.name == "scenes":
        assert data.num_train is not None  # held by DataConfig
        _check_batches(suite, rows, data.num_train, "data.num_train")
        return data.num_train
    if data.path is None:
        raise ConfigError(f"suite {suite.name} trains on a folder of images: name it with --data DIR")
    from lmd_bench.data.folders import scan_folder

    plan.folder_index = scan_folder(Path(data.path), data)
    for path, reason in plan.folder_index.skipped:
        plan.notes.append(f"{path}: skipped: {reason}")
    if (passed_over := plan.folder_index.passed_over_note()) is not None:
        plan.notes.append(passed_over)
    _check_batches(suite, rows, plan.folder_index.num_train, f"--data {data.path}")
    return plan.folder_index.num_train


def _check_batches(suite: Suite, rows: Sequence[str], num_train: int, place: str) -> None:
    for row in rows:
        batch_size = _recipe(suite, row).batch_size
        if num_train < batch_size:
            raise ConfigError(
                f"{place}: {num_train} training images do not fill one batch of {batch_size} (row {row}); "
                f"use more images or --set recipes.{suite.methods[row].recipe}.batch_size=N"
            )


def _recipe(suite: Suite, row: str) -> RecipeConfig:
    name = suite.methods[row].recipe
    return NOT_TRAINED if name is None else suite.recipes[name]


def _cell(
    suite: Suite,
    row: str,
    seed: int,
    method: type[Method],
    device: str,
    num_train: int,
    plan: Plan,
    added: Mapping[str, str],
) -> Cell:
    settings = suite.methods[row]
    image_size = settings.image_size or suite.data.image_size
    place = f"methods.{row}.options"
    options = _settings(suite, row, method, plan)
    from lmd_bench.method import DataSpec

    spec = DataSpec(image_size, _num_classes(suite.data, plan))
    try:
        method.check(options, spec)
        token_px = method.token_px(options, spec)
        text = method.plan_text(options, spec)
        if row not in plan.inputs:
            plan.inputs[row] = method.inputs_digest(options)
    except BenchError as error:
        raise type(error)(f"{place}: {error}") from error
    compiles = suite.compile and method.is_trained
    if compiles and (obstacle := method.compile_obstacle(options)) is not None:
        raise ConfigError(f"--compile: row {row} cannot be compiled: {obstacle}; leave out --compile or the row")
    if suite.evaluation.num_checks and method.yardstick_obstacle(options) is None:
        _check_masks(suite, image_size, row, token_px, suite.evaluation.num_images)
    if plan.image_quality is not None and method.yardstick_obstacle(options) is None:
        _check_masks(suite, image_size, row, token_px, plan.image_quality.num_images)
    if text is not None and f"{row}: {text}" not in plan.notes:
        plan.notes.append(f"{row}: {text}")
    from lmd_bench.harness.optim import check_optimizer

    recipe = _recipe(suite, row)
    check_optimizer(recipe.optimizer, device)
    recipe = recipe.model_copy(update={"augmentation": resolve_crop(recipe.augmentation, suite.data)})
    steps_per_epoch = num_train // recipe.batch_size
    steps = suite.steps if suite.steps is not None else max(1, round((suite.epochs or 0) * steps_per_epoch))
    steps = steps if method.is_trained else 0
    warmup = warmup_steps(recipe, steps, steps_per_epoch)
    if warmup > steps // 2:
        plan.notes.append(
            f"{row}: the learning rate warms up for {warmup} of {steps} steps; in so short a run the loss says little"
        )
    config = RunConfig(
        suite=suite.name,
        row=row,
        label=settings.label,
        method=settings.method,
        code=code_digest(added[settings.method]) if settings.method in added else None,
        options=options.model_dump(mode="json"),
        inputs=plan.inputs[row],
        image_size=image_size,
        data=suite.data,
        recipe=recipe,
        steps=steps,
        lr_warmup_steps=warmup,
        untimed_steps=min(suite.untimed_steps, steps),
        precision=suite.precision,
        compile=compiles,
        seed=seed,
        device=device,
        log_every_steps=suite.log_every_steps,
        evaluation=_evaluation(suite, plan),
        finetune=resolve_finetune(suite, row, num_train),
        image_quality=plan.image_quality,
        estimator=suite.estimator,
    )
    return Cell(config, method, cell_folder(plan.out, suite.name, row, seed))


def _settings(suite: Suite, row: str, method: type[Method], plan: Plan) -> Any:
    """A row's options as the method's own, whatever files they name; its recipe is checked too."""
    try:
        options = method.Config.model_validate(plan.options.get(row, suite.methods[row].options))
    except ValidationError as error:
        raise ConfigError(describe_validation(error, method.Config, f"methods.{row}.options")) from error
    _check_recipe(suite, row, method)
    return options


def _check_recipe(suite: Suite, row: str, method: type[Method]) -> None:
    """A method that is trained needs a recipe; one that comes trained takes none."""
    name = suite.methods[row].recipe
    if method.is_trained and name is None:
        known = ", ".join(suite.recipes) or "the suite has none"
        raise ConfigError(f"methods.{row}.recipe: {suite.methods[row].method} is trained: name a recipe ({known})")
    if not method.is_trained and name is not None:
        raise ConfigError(f"methods.{row}.recipe: {suite.methods[row].method} comes trained: leave out {name!r}")


def _plan_cache(plan: Plan, cell: Cell) -> None:
    """Check the cache that a row reads its latents from, or note that it has to be made."""
    config = cell.config
    projector = cell.method.latent_cache(cell.method.Config.model_validate(config.options))
    if projector is None:
        return
    from lmd_bench.projector.cache import plan_cache

    augmentation = config.recipe.augmentation
    try:
        need = plan_cache(
            projector, config.data, augmentation, config.image_size, plan.folder_index, plan.out / plan.suite.name
        )
    except BenchError as error:
        raise type(error)(f"methods.{config.row}.options.projector: {error}") from error
    plan.caches[config.row] = need
    if need.num_bytes:
        plan.notes.append(
            f"{config.row}: {need.views} view{'s' if need.views > 1 else ''} of {need.contents.num_images} images are "
            f"encoded first, off the clock, into {need.folder} ({need.num_bytes / 2**20:.1f} MiB)"
        )


def _check_finetune(plan: Plan, cell: Cell) -> None:
    """Refuse a fine-tuning that cannot be, and note one that is left out for want of labels."""
    config = cell.config
    if config.finetune is None:
        return
    note = check_finetune(
        cell.method,
        cell.method.Config.model_validate(config.options),
        config.finetune,
        row=config.row,
        seed=config.data.seed,
        num_classes=_num_classes(config.data, plan),
        index=plan.folder_index,
    )
    if note is not None:
        plan.notes.append(note)


def _note_seen_images(plan: Plan, cell: Cell) -> None:
    """Say where a row's projector may have been trained on images that are held out here."""
    projector = cell.config.options.get("projector")
    path = projector.get("path") if isinstance(projector, Mapping) else None
    if plan.folder_index is None or not isinstance(path, str):
        return
    from lmd_bench.projector.training_split import seen_in_training

    seen = seen_in_training(Path(path).expanduser(), plan.folder_index)
    if seen is not None:
        plan.notes.append(f"{cell.config.row}: {seen}; train it with this run's data.seed and data.num_held_out")


def _evaluation(suite: Suite, plan: Plan) -> EvaluationConfig:
    """The suite's yardstick, on as many images as a small folder can hold out."""
    there = suite.data.num_held_out if plan.folder_index is None else len(plan.folder_index.held_out)
    if there >= suite.evaluation.num_images:
        return suite.evaluation
    note = f"the yardstick uses the {there} images that can be held out, not {suite.evaluation.num_images}"
    if note not in plan.notes:
        plan.notes.append(note)
    return suite.evaluation.model_copy(update={"num_images": there})


def _plan_image_quality(plan: Plan, suite: Suite, wanting: Sequence[str]) -> None:
    """Settle on which images image quality is measured, and note what it cannot measure.

    wanting: rows that fill what captions say.
    """
    plan.image_quality, note = resolve_image_quality(suite, plan.folder_index)
    if note is not None:
        plan.notes.append(note)
    if plan.image_quality is not None:
        plan.notes += image_quality_notes(plan.image_quality, suite, plan.folder_index, plan.weights)
        require_captions(wanting, suite, plan.folder_index)


def _num_classes(data: DataConfig, plan: Plan) -> int | None:
    if data.name == "scenes":
        from lmd_bench.data.scenes import num_scene_classes

        return num_scene_classes(data.labels)
    assert plan.folder_index is not None
    return plan.folder_index.num_classes


def _check_masks(suite: Suite, image_size: int, row: str, token_px: int | None, num_images: int) -> None:
    """The yardstick's own masks must tile the images and leave every method a token to see."""
    from lmd_bench.data.yardstick import yardstick_masks
    from lmd_bench.nn.masking import pixel_mask, token_mask

    evaluation = suite.evaluation
    masks = yardstick_masks(num_images, image_size, evaluation.unit_px, evaluation.keep)
    if token_px is not None and evaluation.unit_px % token_px:  # else a visible unit always holds whole tokens
        try:
            for some in masks.split(256):  # pixels of thousands of masks at once would take gigabytes
                token_mask(pixel_mask(some, image_size), token_px)
        except BenchError as error:
            raise ConfigError(f"evaluation.unit_px: row {row} cannot take the yardstick's masks: {error}") from error


def _sort_in(plan: Plan, cell: Cell, force: bool) -> None:
    """Put a cell among those to run or those finished; a finished one with other settings is a problem."""
    path = cell.folder / "record.json"
    if force or not path.exists():
        plan.cells.append(cell)
        return
    record = read_run(path)
    if record.status == "failed":
        plan.cells.append(cell)
        plan.notes.append(f"{cell.config.row} seed {cell.config.seed}: failed before ({record.error}), runs again")
    elif record.config_hash == cell.config.digest():
        if plan.folder_index is not None and record.data.get("digest") != plan.folder_index.digest:
            raise ConfigError(
                f"{cell.folder}: finished on other images than {cell.config.data.path} holds now: "
                "choose another --out, or --force to run it again"
            )
        if plan.image_quality is not None and has_other_captions(record, plan.folder_index):
            raise ConfigError(
                f"{cell.folder}: its image quality was measured with other captions than {cell.config.data.path} has "
                f"now: `lmd-bench evaluate {cell.folder} --force` measures it again, or choose another --out"
            )
        plan.finished.append(cell)
        plan.notes += [note for note in (_finetune_note(record, cell), _quality_note(record, cell)) if note is not None]
    else:
        now = cell.config.model_dump(mode="json", exclude=set(LATER_PARTS))
        then = {key: value for key, value in record.config.items() if key not in LATER_PARTS}
        raise ConfigError(
            f"{cell.folder}: finished with other settings ({_difference(then, now)}): "
            "choose another --out, or --force to run it again"
        )


def _finetune_note(record: RunRecord, cell: Cell) -> str | None:
    """What makes up for a finished cell's fine-tuning that is not the one asked for; None where nothing is to be done.

    One that nothing asks for stands.
    """
    if cell.config.finetune is None:
        return None
    then, now = record.config.get("finetune"), cell.config.finetune.model_dump(mode="json")
    name, command = f"{cell.config.row} seed {cell.config.seed}", f"`lmd-bench finetune {cell.folder}"
    if then is None:
        return f"{name}: was not asked to be fine-tuned when it ran: {command}` does so"
    then, now = ({**settings, "recipe": {**settings["recipe"], "source": ""}} for settings in (then, now))
    if then == now:
        return None
    force = " --force" if record.finetune is not None else ""
    return f"{name}: fine-tuned with other settings ({_difference(then, now)}): {command}{force}` does it again"


_SHOWN_ONLY = {"download", "num_pictures", "num_samples"}
"""Of image quality's settings: those that no figure depends on."""


def _quality_note(record: RunRecord, cell: Cell) -> str | None:
    """The same for its image quality."""
    if cell.config.image_quality is None:
        return None
    found = record.image_quality
    then = record.config.get("image_quality") if found is None else found.settings
    now = cell.config.image_quality.model_dump(mode="json", exclude=_SHOWN_ONLY)
    name, command = f"{cell.config.row} seed {cell.config.seed}", f"`lmd-bench evaluate {cell.folder}"
    if then is None:
        return f"{name}: its image quality was not asked for when it ran: {command}` measures it"
    then = {key: value for key, value in then.items() if key not in _SHOWN_ONLY}
    if set(now["metrics"]) <= set(then["metrics"]):
        now["metrics"] = then["metrics"]
    if then == now:
        return None
    return (
        f"{name}: its image quality was measured with other settings ({_difference(then, now)}): {command}` adds what "
        "can stand beside it, with --force replaces it"
    )


_NAMES = {"inputs": "contents of the files that the options name, such as the projector's weights: digest"}


def _difference(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first few values in which a record's settings differ from the wanted ones."""
    then, now = _flat(settings), _flat(wanted)
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    shown = [f"{_NAMES.get(key, key)} {then.get(key)!r}, now {now.get(key)!r}" for key in keys[:3]]
    return "; ".join(shown) + (f"; {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
