"""Image quality of cells that have run already, from their weights: nothing is trained again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from lmd_bench.config import DataConfig, EvaluationConfig, ImageQualityConfig, RunConfig, Suite
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.errors import BenchError, ConfigError, DataError, RecordError, WeightsError
from lmd_bench.evaluation.merge import compare, dropped_note, merged
from lmd_bench.evaluation.needs import missing_weights
from lmd_bench.harness.execute import build_method
from lmd_bench.harness.image_quality import ImageQualityRunner, measure_quality, reason_of, with_quality
from lmd_bench.harness.weights import WEIGHTS_FILE, load_method_weights
from lmd_bench.method import DataSpec, Method
from lmd_bench.pretrained import WeightsStore
from lmd_bench.reconstruct.checkpoint import open_cell
from lmd_bench.records import ImageQuality, RunRecord, find_runs, read_run, write_json
from lmd_bench.registry import load_method
from lmd_bench.suite_files import SUITE_FILE, find_suites, load_suite

IMAGE_QUALITY_FILE = "image-quality.json"
"""Beside imported weights, which have no record of a run: `ImageQuality`."""
_IMPORTED_SEED = 0


@dataclass(frozen=True)
class RunsRequest:
    """What is asked for."""

    path: Path
    """A cell's folder, OUT/<suite>, an OUT with several suites, or the folder of an imported checkpoint."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values of `ImageQualityConfig` in place of the suite's."""
    data: Path | None = None
    """Folder of images: of an imported checkpoint, or where that of a run lies now."""
    force: bool = False
    """Measure cells that have been measured."""
    added: Mapping[str, str] = field(default_factory=dict)
    """A user's own methods, name -> file.py:Class."""


@dataclass(frozen=True)
class Outcome:
    """What became of one cell."""

    name: str
    quality: ImageQuality | None
    """None where nothing was measured now."""
    reason: str | None
    """Why not."""
    failed: bool = False
    """Whether it should have been measured and could not be."""
    note: str | None = None
    """Figures that had to go for those that were measured."""


def suites_of(path: Path) -> list[tuple[Path, Suite]]:
    """The suites whose reports change with the cells in `path`; none for an imported checkpoint."""
    if (path / "record.json").is_file():
        folder = path.resolve().parents[1]
        return [(folder, load_suite(str(folder / SUITE_FILE)))] if (folder / SUITE_FILE).is_file() else []
    if (path / WEIGHTS_FILE).is_file():
        return []
    return find_suites(path)


def evaluate_runs(request: RunsRequest, weights: WeightsStore, device: torch.device) -> Iterator[Outcome]:
    """Measure every finished cell with weights, one after the other; records are written as each is done.

    A cell that has all figures that are asked for, and can be had, is left alone. Those that it lacks are added where
    images, masks, captions, seed and constants are those of the figures that it has; where they are not, the outcome
    says so. With `force` what is asked for is measured in any case: figures that are not asked for stay where they can
    stand beside it, and are replaced otherwise. Raises BenchError, before anything is measured, for a path without
    cells, settings that do not fit, or published weights that are there and wrong.
    """
    path = request.path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a cell's folder, or OUT/<suite>")
    if (path / WEIGHTS_FILE).is_file() and not (path / "record.json").is_file():
        missing_weights(merged_settings({}, request.changes), weights)
        return iter([_evaluate_imported(request, weights, device)])
    suites = {folder.resolve(): suite for folder, suite in suites_of(path)}
    files = [path / "record.json"] if (path / "record.json").is_file() else find_runs(path)
    if not files:
        raise ConfigError(f"{path}: no records of cells below it (seed-*/record.json)")
    cells = [(file.parent, read_run(file)) for file in files]
    shelf = _Runners(request, weights, device)
    bases = [_base_settings(record, suites.get(folder.resolve().parents[1])) for folder, record in cells]
    for base in bases:  # missing weights are told by their figures, wrong ones are refused here
        missing_weights(merged_settings(base, request.changes), weights)
    settings = [_Wanted(merged_settings(base, request.changes), _replaces_bounds(request, base)) for base in bases]
    return _evaluate_cells(cells, settings, shelf)


# -- cells --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """How a cell is to be measured."""

    settings: ImageQualityConfig
    replaces_bounds: bool
    """`ImageQualityRunner.replaces_bounds`."""


def _evaluate_cells(
    cells: Sequence[tuple[Path, RunRecord]], settings: Sequence[_Wanted], shelf: _Runners
) -> Iterator[Outcome]:
    try:
        for cell, wanted in zip(cells, settings, strict=True):
            yield _evaluate_cell(*cell, wanted, shelf)
    finally:
        shelf.close()


def _evaluate_cell(folder: Path, record: RunRecord, wanted: _Wanted, shelf: _Runners) -> Outcome:
    name = f"{record.row} seed {record.seed}"
    if record.status != "finished":
        return Outcome(name, None, f"failed when it ran: {record.error}")
    try:
        config = RunConfig.model_validate(record.config)
        method_class = load_method(config.method, dict(shelf.request.added))
        if record.weights is None and method_class.is_trained:
            return Outcome(name, None, "its weights were not kept (--no-save-weights): run the cell again")
        runner = shelf.runner(folder, record, config, wanted)
        found = None if shelf.request.force else record.image_quality
        overlap = compare(found, runner.expected(config.image_size, config.seed)) if found is not None else None
        if overlap is not None and overlap.obstacle is not None:
            return Outcome(name, None, overlap.obstacle, failed=True)
        if overlap is not None and not overlap.lacking:
            return Outcome(name, None, "measured before; --force measures it again")
        method = _open(folder, config, method_class, shelf)
    except (
        Exception
    ) as error:  # a method's own code, or memory that is short: the other cells are measured all the same
        return Outcome(name, None, reason_of(error), failed=True)
    quality, reason = measure_quality(runner, method, config, folder)
    if quality is None:
        assert reason is not None
        unwritten = None
        if record.image_quality is None:
            unwritten = _written(folder / "record.json", with_quality(record, None, reason))
        return Outcome(name, None, unwritten or reason, failed=True)
    if found is not None and (obstacle := compare(found, quality).obstacle) is not None:  # masks, known by now
        return Outcome(name, None, obstacle, failed=True)
    whole = merged(record.image_quality, quality)
    unwritten = _written(folder / "record.json", with_quality(record, whole, None))
    if unwritten is not None:
        return Outcome(name, None, unwritten, failed=True)
    return Outcome(name, whole, None, note=dropped_note(record.image_quality, whole))


def _written(path: Path, value: BaseModel) -> str | None:
    """Write what was measured; why that is impossible, None where it is done."""
    try:
        write_json(path, value)
    except OSError as error:
        return f"measured, but {path} cannot be written: {(error.strerror or str(error)).lower()}"
    return None


def _open(folder: Path, config: RunConfig, method_class: type[Method], shelf: _Runners) -> Method:
    if method_class.is_trained:
        return load_method_weights(folder, shelf.request.added)[0].to(shelf.device)
    options = method_class.Config.model_validate(config.options)
    try:
        method_class.check(options, DataSpec(config.image_size))
        same = method_class.inputs_digest(options) == config.inputs
    except BenchError as error:
        raise WeightsError(f"its weights cannot be used: {error}; put them back, or run the cell again") from error
    if not same:
        raise WeightsError("its weights are others than when the cell ran; put them back, or run the cell again")
    here = config.model_copy(update={"device": str(shelf.device)})
    return build_method(here, method_class, None).eval()


def _base_settings(record: RunRecord, suite: Suite | None) -> Mapping[str, Any]:
    """The suite's settings, or those of the run; none where neither has any."""
    of_suite = None if suite is None or suite.image_quality is None else suite.image_quality.model_dump(mode="json")
    return of_suite or record.config.get("image_quality") or {}


def _replaces_bounds(request: RunsRequest, base: Mapping[str, Any]) -> bool:
    """Whether cells are measured as their suite says, or, where it says nothing, are measured anew."""
    if not base:
        return request.force
    return all(name in base and base[name] == value for name, value in request.changes.items() if name != "batch_size")


def merged_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> ImageQualityConfig:
    """Settings with some values changed. Raises ConfigError for values that cannot be."""
    try:
        settings = ImageQualityConfig.model_validate({**base, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        place = "-".join(str(part) for part in first["loc"][:1]).replace("_", "-")
        raise ConfigError(f"--{place}: {first['msg']}, got {first['input']!r}") from error
    of_clip = [f"--{name.replace('_', '-')}" for name in ("clip_model", "clip_pretrained") if name in changes]
    if of_clip and settings.evaluators == "scenes":
        raise ConfigError(f"{', '.join(of_clip)}: the scenes evaluators have a CLIP of their own; leave it out")
    if of_clip and "clip_score" not in settings.metrics:
        raise ConfigError(f"{', '.join(of_clip)}: clip_score is not among the metrics; leave it out")
    return settings


@dataclass
class _Runners:
    """Runners already made, so that cells of one suite share the real side."""

    request: RunsRequest
    weights: WeightsStore
    device: torch.device
    _runners: dict[str, ImageQualityRunner] = field(default_factory=dict)
    _indices: dict[str, FolderIndex] = field(default_factory=dict)

    def runner(self, folder: Path, record: RunRecord, config: RunConfig, wanted: _Wanted) -> ImageQualityRunner:
        """The runner for a cell; the networks of all others are closed.

        Raises DataError where its images are no longer those of the run, ConfigError for more than it holds out.
        """
        data, settings = config.data, wanted.settings
        index = None
        if data.name == "folder":
            if self.request.data is not None:
                data = data.model_copy(update={"path": str(self.request.data)})
            index = self._index(data)
            if record.data.get("digest") != index.digest:
                raise DataError(
                    f"{index.root}: holds other images than when the run was trained, so held-out ones may be among "
                    "those it saw; name the run's images with --data"
                )
            settings = _fitting(settings, index, self.request.changes)
        suite_folder = folder.resolve().parents[1]
        parts = (data.model_dump(), settings.model_dump(), config.evaluation.model_dump(), wanted.replaces_bounds)
        key = json.dumps([str(suite_folder), *parts])
        if key not in self._runners:
            self.close()
            self._runners[key] = ImageQualityRunner(
                suite_folder,
                settings,
                config.evaluation,
                data,
                self.weights,
                self.device,
                index,
                replaces_bounds=wanted.replaces_bounds,
            )
        return self._runners[key]

    def close(self) -> None:
        """Close all networks that measure; runners open them again when they are needed."""
        for runner in self._runners.values():
            runner.close_evaluators()

    def _index(self, data: DataConfig) -> FolderIndex:
        key = data.model_dump_json()
        if key not in self._indices:
            if data.path is None:
                raise DataError("the run's folder of images is not named in its record; give --data DIR")
            self._indices[key] = scan_folder(data.path, data)
        return self._indices[key]


def _fitting(settings: ImageQualityConfig, index: FolderIndex, changes: Mapping[str, Any]) -> ImageQualityConfig:
    """On as many images as are there, unless a number was asked for in so many words: then ConfigError for fewer."""
    there = len(index.held_out)
    if "num_images" in changes and there < settings.num_images:
        raise ConfigError(f"--num-images {settings.num_images}: {index.root} has {there} images for it; ask for fewer")
    return settings.model_copy(update={"num_images": min(settings.num_images, there)})


# -- imported checkpoints -----------------------------------------------------------------------------------------


def _evaluate_imported(request: RunsRequest, weights: WeightsStore, device: torch.device) -> Outcome:
    """Measure imported weights on a folder of images; figures and pictures go beside the weights.

    Nothing was trained on these images here, so all of them can be used, or all of `val/` where there is one.
    """
    path = request.path
    if request.data is None:
        raise ConfigError(f"{path}: imported weights have no images of their own: name a folder with --data DIR")
    try:
        return _measure_imported(request, request.data, weights, device)
    except BenchError:
        raise
    except Exception as error:  # as for cells: a method's own code, or memory that is short
        return Outcome(path.resolve().name, None, reason_of(error), failed=True)


def _measure_imported(request: RunsRequest, images: Path, weights: WeightsStore, device: torch.device) -> Outcome:
    path = request.path
    name = path.resolve().name
    settings = merged_settings({}, request.changes)
    there = _read_quality(path / IMAGE_QUALITY_FILE, request)
    checkpoint = open_cell(path, device, dict(request.added))
    data = DataConfig(
        name="folder", path=str(images), image_size=checkpoint.image_size, num_held_out=settings.num_images
    )
    index = scan_folder(images, data, trains=False)
    settings = _fitting(settings, index, request.changes)
    evaluation = EvaluationConfig(unit_px=checkpoint.unit_px, keep=checkpoint.keep)
    runner = ImageQualityRunner(path, settings, evaluation, data, weights, device, index)
    if there is not None and not request.force:
        overlap = compare(there, runner.expected(checkpoint.image_size, _IMPORTED_SEED))
        if overlap.obstacle is not None or not overlap.lacking:
            before = f"measured before ({IMAGE_QUALITY_FILE}); --force measures it again"
            raise RecordError(f"{path}: {overlap.obstacle or before}")
    quality = runner.measure(checkpoint.method, checkpoint.image_size, _IMPORTED_SEED, path)
    runner.close_evaluators()
    whole = merged(there, quality)
    unwritten = _written(path / IMAGE_QUALITY_FILE, whole)
    if unwritten is not None:
        return Outcome(name, None, unwritten, failed=True)
    return Outcome(name, whole, None, note=dropped_note(there, whole))


def _read_quality(file: Path, request: RunsRequest) -> ImageQuality | None:
    """What was measured of imported weights before. Raises RecordError for a damaged file, unless it is replaced."""
    if not file.exists():
        return None
    try:
        return ImageQuality.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        if request.force:
            return None
        raise RecordError(f"{file}: cannot be read as figures; --force replaces it") from None
