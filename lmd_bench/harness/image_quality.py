"""Image quality of a suite's cells: every method fills the same held-out images, measured off the training clock.

What all cells share is made once for a suite: the real images, their features (kept on disk for later processes), and
what the columns can be at least and at most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from lmd_bench.config import DataConfig, EvaluationConfig, ImageQualityConfig, RunConfig
from lmd_bench.data.folders import FolderIndex
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import BenchError, DataError, RecordError, WeightsError
from lmd_bench.evaluation.fill import Chunk, chunks, fill, grey_filled
from lmd_bench.evaluation.held_out import HeldOut, open_held_out
from lmd_bench.evaluation.merge import SAMPLES, compare, merged
from lmd_bench.evaluation.needs import needed_weights
from lmd_bench.evaluation.pictures import generates, sample_tiles, save_pictures
from lmd_bench.harness.evaluate import evaluating
from lmd_bench.harness.loop import filling_precision
from lmd_bench.harness.timer import clock_for
from lmd_bench.method import Method
from lmd_bench.metrics.image_metrics import EvaluatorSet
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import (
    PICTURES,
    QUALITY_BOUNDS,
    STATISTICS,
    EvaluatorFacts,
    ImageQuality,
    QualityBounds,
    RunRecord,
    read_bounds,
    write_json,
)

if TYPE_CHECKING:
    from lmd_bench.harness.plan import Plan

_BOUNDS_SEED = 0
_FIGURE = "image_quality"
"""Its key in a record's `not_measured`."""
_NOTE = "image quality: "
"""Begins a record's notes on the same."""
SCENES_NOTE = (
    "the scenes evaluators are small networks that know the generated scenes of this package alone: on photographs and "
    "other images their figures mean little, and they are nowhere the published FID, KID or CLIP-score"
)
_Result = TypeVar("_Result")
OnFilled = Callable[[int, int], None]
"""Told at every quarter of a row's images: how many are filled, of how many."""


@dataclass
class _Side:
    """What all cells of one image size share."""

    held_out: HeldOut
    masks: Tensor
    evaluators: EvaluatorSet | None = None
    """Open only while something is measured."""
    statistics: FeatureStatistics | None = None
    """Of the real images; None until they were measured."""
    unsaved: dict[Path, str] = field(default_factory=dict)
    """File for later cells -> why it could not be written."""


@dataclass
class ImageQualityRunner:
    """Measures the methods of a suite, each on the same images under the same masks."""

    folder: Path
    """Of the suite: statistics and bounds are kept there."""
    settings: ImageQualityConfig
    evaluation: EvaluationConfig
    """Its `unit_px` and `keep` make the masks."""
    data: DataConfig
    weights: WeightsStore
    device: torch.device
    index: FolderIndex | None = None
    """Of `data`'s folder, where it was scanned before."""
    replaces_bounds: bool = True
    """Whether the suite's bounds may be replaced by those of other images, masks or networks: not by a cell that is
    measured otherwise than its suite says."""
    _sides: dict[int, _Side] = field(default_factory=dict)

    @classmethod
    def from_plan(cls, plan: Plan, config: RunConfig) -> ImageQualityRunner:
        """For the cells of a plan, whose `config` has settings for image quality."""
        assert config.image_quality is not None
        folder = plan.out / plan.suite.name
        device = torch.device(config.device)
        return cls(
            folder, config.image_quality, config.evaluation, config.data, plan.weights, device, plan.folder_index
        )

    def fetch_weights(self) -> None:
        """Download what is allowed and can be had, so that no training ends before it is known."""
        for name in needed_weights(self.settings, self.weights):
            with suppress(WeightsError):  # told where the figure would stand
                self.weights.find(name, download=self.settings.download)

    def measure(
        self,
        method: Method,
        image_size: int,
        seed: int,
        folder: Path,
        on_filled: OnFilled | None = None,
        precision: str = "fp32",
    ) -> ImageQuality:
        """Fill with a method on `device`, measure, and leave pictures in the cell's `folder`.

        Pictures that cannot be made or saved, and files for later cells that cannot be written, are a reason or a note.
        seed: of KID's subsets and of what the method draws. precision: in which it fills. Raises BenchError where it
        cannot be done.
        """
        side, evaluators = self._open(image_size)
        captions = side.held_out.captions
        if method.wants_captions and captions is None:
            raise DataError("it fills what captions say, and the held-out images have none")
        if image_size == self.data.image_size:
            self._keep_bounds(side, evaluators)
        masks = method.own_masks(side.masks)
        parts = chunks(side.held_out.images, masks, captions, self.settings.batch_size)
        what = _what("filled", masks, image_size) + _of_method(method, with_captions=captions is not None)
        filled: list[Tensor] = []
        fill_s = 0.0

        def fill_one(chunk: Chunk) -> Tensor:
            nonlocal fill_s
            result, seconds = self._timed(lambda: fill(method, chunk, seed, self.device, precision))
            fill_s += seconds
            done, total = chunk.start + len(result), len(side.held_out.images)
            if on_filled is not None and 4 * done // total > 4 * chunk.start // total:
                on_filled(done, total)
            if chunk.start < self.settings.num_pictures:
                filled.append(result)
            return result

        with evaluating(method):
            quality = self._compare(side, evaluators, parts, fill_one, seed, what)
            without = self._save_pictures(method, parts, filled, seed, folder)
        return quality.model_copy(
            update={
                "fill_s": fill_s,
                "not_measured": {**quality.not_measured, **without},
                "notes": [*quality.notes, *(f"{path.name}: {why}" for path, why in side.unsaved.items())],
            }
        )

    def expected(self, image_size: int, seed: int) -> ImageQuality:
        """What `measure` would give now, without values and without what was compared in words."""
        return self._record(*self._open(image_size), {}, seed, "")

    def close_evaluators(self) -> None:
        """Give back the memory of the networks that measure, so that it does not count for the next row's training."""
        for side in self._sides.values():
            side.evaluators = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- what cells share ---------------------------------------------------------------------------------------------

    def _open(self, image_size: int) -> tuple[_Side, EvaluatorSet]:
        side = self._sides.get(image_size)
        if side is None:
            side = self._sides[image_size] = self._make_side(image_size)
        if side.evaluators is None:
            others = (other.evaluators for other in self._sides.values())
            side.evaluators = EvaluatorSet.open(
                self.settings,
                self.weights,
                self.device,
                image_size=image_size,
                has_captions=side.held_out.captions is not None,
                num_images=len(side.held_out.images),
                shared=next((found for found in others if found is not None), None),
            )
            side.statistics = side.statistics or self._read_statistics(side)
        return side, side.evaluators

    def _make_side(self, image_size: int) -> _Side:
        held_out = open_held_out(self.data, image_size, self.settings.num_images, self.index)
        evaluation = self.evaluation
        masks = yardstick_masks(len(held_out.images), image_size, evaluation.unit_px, evaluation.keep)
        return _Side(held_out, masks)

    def _keep_bounds(self, side: _Side, evaluators: EvaluatorSet) -> None:
        """The columns' ceiling and floor, on disk, unless they are there and of the same images and networks.

        Figures that they lack are added. Those of other images or networks are replaced where `replaces_bounds` says
        so, else left as they are. All this comes first: the real images' features are then measured as those of the
        ceiling, and never again.
        """
        path = self.folder / QUALITY_BOUNDS
        size = side.held_out.images.shape[-1]
        parts = chunks(side.held_out.images, side.masks, side.held_out.captions, self.settings.batch_size)
        expected = self._record(side, evaluators, {}, _BOUNDS_SEED, _what("mid-grey", side.masks, size))
        found = _read_bounds(path)
        if found is not None:
            overlap = compare(found.grey, expected, drawn=False)
            if not (self.replaces_bounds if overlap.obstacle else overlap.lacking):
                return
        truth = self._compare(
            side, evaluators, parts, lambda chunk: chunk.images, _BOUNDS_SEED, "the real images in place of filled ones"
        )
        grey = self._compare(side, evaluators, parts, grey_filled, _BOUNDS_SEED, expected.what)
        if found is not None:
            truth, grey = merged(found.truth, truth, drawn=False), merged(found.grey, grey, drawn=False)
        _save(side, path, lambda: write_json(path, QualityBounds(truth=truth, grey=grey)))

    def _compare(
        self,
        side: _Side,
        evaluators: EvaluatorSet,
        parts: Sequence[Chunk],
        make: Callable[[Chunk], Tensor],
        seed: int,
        what: str,
    ) -> ImageQuality:
        """Measure what `make` gives for every chunk against the real images."""
        metrics = evaluators.metrics(side.statistics, seed)
        for chunk in parts:
            metrics.update(chunk.images, make(chunk), captions=chunk.captions, mask=chunk.mask)
        values = metrics.compute()
        known = metrics.real_statistics
        if side.statistics is None and known is not None:
            side.statistics = known
            path, identity = self._statistics_file(side, evaluators)
            _save(side, path, lambda: known.save(path, identity))
        return self._record(side, evaluators, values, seed, what)

    def _record(
        self, side: _Side, evaluators: EvaluatorSet, values: dict[str, float], seed: int, what: str
    ) -> ImageQuality:
        return ImageQuality(
            num_images=len(side.held_out.images),
            image_size=side.held_out.images.shape[-1],
            what=what,
            values=values,
            evaluators=evaluators.facts,
            real_digest=side.held_out.digest,
            captions_digest=side.held_out.captions_digest,
            seed=seed,
            settings=self.settings.model_dump(mode="json"),
            not_measured=dict(evaluators.not_measured),
            notes=[SCENES_NOTE] if self.settings.evaluators == "scenes" and self.data.name != "scenes" else [],
        )

    # -- the real side's statistics -----------------------------------------------------------------------------------

    def _statistics_file(self, side: _Side, evaluators: EvaluatorSet) -> tuple[Path, dict[str, str]]:
        identity = statistics_identity(evaluators.facts["features"], side.held_out.digest, len(side.held_out.images))
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / STATISTICS / f"{name}.safetensors", identity

    def _read_statistics(self, side: _Side) -> FeatureStatistics | None:
        assert side.evaluators is not None
        if side.evaluators.extractor is None:
            return None
        path, identity = self._statistics_file(side, side.evaluators)
        try:
            return FeatureStatistics.load(path, identity)
        except RecordError:  # damaged: it is measured again and replaced
            return None

    # -- parts --------------------------------------------------------------------------------------------------------

    def _timed(self, work: Callable[[], _Result]) -> tuple[_Result, float]:
        clock = clock_for(self.device)
        clock.drain()
        begin = clock.host_s()
        result = work()
        clock.drain()
        return result, clock.host_s() - begin

    def _save_pictures(
        self, method: Method, parts: Sequence[Chunk], filled: list[Tensor], seed: int, folder: Path
    ) -> dict[str, str]:
        """Which pictures are not there -> why: what fails here must not lose the figures."""
        settings = self.settings
        reasons: dict[str, str] = {}
        tiles: dict[str, Tensor] = {}
        if settings.num_pictures:
            shown = parts[: len(filled)]
            tiles["original"] = torch.cat([chunk.images for chunk in shown])[: settings.num_pictures]
            tiles["masked"] = torch.cat([grey_filled(chunk) for chunk in shown])[: settings.num_pictures]
            tiles["filled"] = torch.cat(filled)[: settings.num_pictures]
        if settings.num_samples and generates(method):
            try:
                tiles[SAMPLES] = sample_tiles(method, settings.num_samples, settings.batch_size, seed, self.device)
            except Exception as error:  # a method's own code
                reasons[SAMPLES] = reason_of(error)
        try:
            if tiles:
                save_pictures(folder / PICTURES, tiles)
        except Exception as error:  # a full disk, or what Pillow says of one
            lost = {SAMPLES if name == SAMPLES else PICTURES for name in tiles}
            reasons |= dict.fromkeys(sorted(lost), reason_of(error))
        return reasons


def statistics_identity(facts: EvaluatorFacts, digest: str, num_images: int) -> dict[str, str]:
    """What makes features of real images the same: network, weights, resize rule, and pixels (`pixel_digest`)."""
    return {
        "extractor": facts.name,
        "sha256": facts.sha256,
        "resize": facts.resize,
        "images": digest,
        "num_images": str(num_images),
    }


def measure_quality(
    runner: ImageQualityRunner,
    method: Method,
    config: RunConfig,
    folder: Path,
    on_filled: OnFilled | None = None,
) -> tuple[ImageQuality | None, str | None]:
    """A cell's image quality, or None and why. Never raises: what fails here must not lose a training."""
    obstacle = type(method).yardstick_obstacle(type(method).Config.model_validate(config.options))
    if obstacle is not None:
        return None, obstacle
    precision = filling_precision(type(method), config.precision)
    try:
        return runner.measure(method, config.image_size, config.seed, folder, on_filled, precision), None
    except Exception as error:  # the training is done: whatever fails here is a reason in the record
        return None, reason_of(error)


def reason_of(error: Exception) -> str:
    """An exception in one line, its class before all but the user's own errors."""
    words = " ".join(str(error).split())[:500]
    return words if isinstance(error, BenchError) and words else f"{type(error).__name__}: {words}"


def with_quality(record: RunRecord, quality: ImageQuality | None, reason: str | None) -> RunRecord:
    """The record with what was measured now, or why nothing was, in place of what it said of that before."""
    not_measured = {figure: why for figure, why in record.not_measured.items() if figure != _FIGURE}
    notes = [note for note in record.notes if not note.startswith(_NOTE)]
    notes += [f"{_NOTE}{note}" for note in (quality.notes if quality is not None else [])]
    if reason is not None:
        not_measured[_FIGURE] = reason
        notes.append(f"{_NOTE}not measured: {reason}")
    return record.model_copy(update={"image_quality": quality, "not_measured": not_measured, "notes": notes})


def _what(subject: str, masks: Tensor, image_size: int) -> str:
    """What was compared, in words."""
    hidden = 100 * float(masks.float().mean())
    return f"{subject} against real, {hidden:.0f} % hidden in units of {image_size // masks.shape[-1]} px"


def _of_method(method: Method, *, with_captions: bool) -> str:
    """What sets a method's filling apart: whether one that reads captions had them, and masks of its own."""
    text = ""
    if type(method).reconstruct_captioned is not Method.reconstruct_captioned:
        text = ", with captions" if with_captions else ", without captions"
    return text if method.mask_pattern is None else f"{text}, own masks: {method.mask_pattern}"


def _read_bounds(path: Path) -> QualityBounds | None:
    """The bounds on disk; None where there are none, or damaged ones."""
    try:
        return read_bounds(path) if path.exists() else None
    except RecordError:
        return None


def _save(side: _Side, path: Path, write: Callable[[], None]) -> None:
    """Write a file for later cells; one that cannot be written is no reason to lose the figures of this one."""
    try:
        write()
        side.unsaved.pop(path, None)
    except (OSError, SafetensorError) as error:  # safetensors says of a full disk what it says of a damaged file
        side.unsaved[path] = f"not saved: {reason_of(error)}"
