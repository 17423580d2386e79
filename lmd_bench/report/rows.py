"""One row of a suite over its seeds: which figures there are, and why others are missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmd_bench.config import RowConfig, Suite
from lmd_bench.lmd.mask_schedule import mask_levels
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import NO_INTERVAL, Figure, Interval, Missing, over_seeds
from lmd_bench.metrics.quality import NO_INCREASE
from lmd_bench.records import Finetune, ImageQuality, Phases
from lmd_bench.report.cells import number, percent, plain
from lmd_bench.report.load import Results, Run
from lmd_bench.report.tuning import other_settings

NOT_FINE_TUNED = "this row is not fine-tuned"
NOTHING_FINE_TUNED = "the suite fine-tunes nothing"
_TUNED_DIFFERENTLY = "seeds fine-tuned differently"
_INVALID = "invalid: "
"""Begins a note of fine-tuning that a mark says in other words."""
ONE_SEED = f"{NO_INTERVAL}: one seed"


@dataclass(frozen=True)
class RowResult:
    """A row with the runs that were found for it."""

    row: str
    label: str
    config: RowConfig | None
    """None for records of a row that the suite no longer has."""
    runs: tuple[Run, ...]
    confidence: float
    suite_fine_tunes: bool

    @property
    def finished(self) -> list[Run]:
        """Runs that ended well, in order of seed."""
        return [run for run in self.runs if run.record.status == "finished"]

    @property
    def published(self) -> str | None:
        """The row of the published tables this one stands beside."""
        return self.config.published if self.config else None

    @property
    def why_nothing(self) -> str | None:
        """Why the row has no finished run, as a cell says it; None where it has one.

        Of missing weights only which; `why_nothing_in_full` says what can be done about it.
        """
        text = self.why_nothing_in_full
        if text is None or self.runs or not (self.config and self.config.missing):
            return text
        return f"not measured: {plain(in_short(self.config.missing))}"

    @property
    def why_nothing_in_full(self) -> str | None:
        """Why the row has no finished run, in one sentence; None where it has one."""
        if self.finished:
            return None
        if self.runs:
            first = self.runs[0].record
            return f"failed: {plain(first.error or 'no message was recorded')}"
        if self.config and self.config.listed_only:
            return f"not measured: {plain(self.config.listed_only)}"
        if self.config and self.config.missing:
            return f"not measured: {' '.join(self.config.missing.split())}"
        return "not run"

    @property
    def efficiencies(self) -> list[RunEfficiency]:
        """What the finished runs say of time, seeds without such figures left out."""
        return [
            RunEfficiency.from_dict(run.record.efficiency) for run in self.finished if run.record.efficiency is not None
        ]

    def figure(self, pick: Callable[[RunEfficiency], Figure], name: str) -> Figure:
        """One figure over seeds; Missing carries the whole text of the cell. `name` is looked up in not_measured."""
        if self.why_nothing:
            return Missing(self.why_nothing)
        found = self.efficiencies
        if not found:
            return Missing(f"not measured: {self.recorded_reason(name, 'efficiency')}")
        figure = over_seeds([pick(one) for one in found], self.confidence)
        if isinstance(figure, Missing):
            said = figure.reason.startswith("no valid decrease")
            return Missing(figure.reason if said else f"not measured: {figure.reason}")
        return figure

    @property
    def comes_trained(self) -> bool:
        """Whether nothing was trained: the method's weights are published ones."""
        return bool(self.finished) and all(run.record.num_steps == 0 for run in self.finished)

    @property
    def finetunes(self) -> list[Finetune]:
        """What the finished runs say of fine-tuning, seeds without it left out."""
        return [run.record.finetune for run in self.finished if run.record.finetune is not None]

    @property
    def image_qualities(self) -> list[ImageQuality]:
        """What the finished runs say of the images they filled, seeds without it left out."""
        return [run.record.image_quality for run in self.finished if run.record.image_quality is not None]

    @property
    def no_finetune(self) -> str:
        """Why no finished run was fine-tuned, as a cell says it."""
        if self.why_nothing:
            return self.why_nothing
        named = self.config is None or self.config.finetune is not None
        otherwise = NOTHING_FINE_TUNED if not self.suite_fine_tunes else None if named else NOT_FINE_TUNED
        return f"not measured: {self.recorded_reason('finetune', otherwise=otherwise)}"

    def seed_figure(self, pick: Callable[[Run], float | Missing]) -> Figure:
        """A figure of fine-tuning, one value a run, over seeds. Missing carries the cell's text.

        One seed has no interval, nor have seeds that were fine-tuned differently. Positive values only: means and
        intervals are on the log scale.
        """
        if self.why_nothing:
            return Missing(self.why_nothing)
        picked = [pick(run) for run in self.finished]
        values = [
            Interval(value, None, None, ONE_SEED) if isinstance(value, int | float) else value for value in picked
        ]
        figure = over_seeds(values, self.confidence)
        if isinstance(figure, Missing) or not self.tuned_differently:
            return figure
        return Interval(figure.value, None, None, f"{NO_INTERVAL}: {_TUNED_DIFFERENTLY}")

    @property
    def tuned_differently(self) -> list[str]:
        """What seeds of one row must share in fine-tuning, and the finished ones do not."""
        return other_settings(self.finished)

    def mat(self, run: Run, k: int) -> float | Missing:
        """A run's MAT@k in seconds per percentage point, k 1 or 5; Missing carries the whole text of the cell."""
        finetune, name = run.record.finetune, f"mat_at_{k}"
        if finetune is None:
            return Missing(self.no_finetune)
        value = finetune.mat_at_1 if k == 1 else finetune.mat_at_5
        if value is not None:
            return value
        reason = plain(run.record.not_measured.get(name, "the record does not hold it"))
        return Missing(reason if reason.startswith(NO_INCREASE) else f"not measured: {reason}")

    def recorded_reason(self, *names: str, otherwise: str | None = None) -> str:
        """The first reason the records give for any of `names`.

        Without one: `otherwise`; of a row that comes trained, why it has no figures of training.
        """
        if self.comes_trained and otherwise is None:
            names += ("efficiency",)
        for run in self.finished:
            for name in names:
                if name in run.record.not_measured:
                    return plain(run.record.not_measured[name])
        return otherwise or "the record does not hold it"

    def mean(self, pick: Callable[[Run], float | None]) -> float | None:
        """Plain mean over finished runs of a figure that some may lack; None where all do."""
        found = [value for run in self.finished if (value := pick(run)) is not None and math.isfinite(value)]
        return sum(found) / len(found) if found else None

    def share(self, pick: Callable[[Phases], float]) -> float | None:
        """Plain mean over finished runs of a share of the step."""
        return self.mean(lambda run: pick(run.record.phases) if run.record.phases else None)

    @property
    def has_projector(self) -> bool:
        """Whether the row encodes images before it trains on them."""
        return any(run.record.cost is not None and run.record.cost.projector_parameters > 0 for run in self.finished)

    @property
    def latent_cache(self) -> Mapping[str, Any] | None:
        """What the records say of the cache the row read its latents from; None where every step encodes."""
        return next((cache for run in self.finished if (cache := run.record.data.get("latent_cache"))), None)

    @property
    def mit_whole_ms(self) -> float | None:
        """Mean period over all measured steps and seeds, ms."""
        values = [one.mit_whole_ms.value for one in self.efficiencies if isinstance(one.mit_whole_ms, Interval)]
        return sum(values) / len(values) if values else None

    @property
    def instrument_share(self) -> float | None:
        """Cost of the instrument over the mean period, from runs that timed it."""
        cost = self.mean(lambda run: run.record.timing.instrument_us_per_step if run.record.timing else None)
        return cost / 1e3 / self.mit_whole_ms if cost is not None and self.mit_whole_ms else None

    @property
    def mask_levels(self) -> int | None:
        """Steps of one token between the most and the fewest visible tokens of a run, e.g. 29 for 41 to 12.

        A network that computes hidden tokens too has a constant length: its levels follow from its mask ratios.
        """
        for run in self.finished:
            tokens, ratios = (_finite(run.steps.get(name, ())) for name in ("tokens", "mask_ratio"))
            if tokens and ratios and min(tokens) == max(tokens) and min(ratios) < max(ratios):
                return len(mask_levels(round(tokens[0]), min(ratios), max(ratios))) - 1
            if tokens:
                return round(max(tokens) - min(tokens))
        return None

    @property
    def mask_range(self) -> tuple[float, float] | None:
        """Mask ratio of the first and the last measured step; None for methods that do not mask."""
        for run in self.finished:
            ratios = _finite(run.steps.get("mask_ratio", ()))
            if ratios:
                return ratios[0], ratios[-1]
        return None

    @property
    def marks(self) -> list[str]:
        """What a reader must know before using the row's figures."""
        marks = []
        falling = [str(run.record.seed) for run, e in self._with_efficiency() if e.still_falling]
        if falling:
            marks.append(f"still falling: lower bound{self._which(falling)}")
        for run in self.finished:
            timing = run.record.timing
            if timing is not None and not timing.valid:
                share = percent(timing.residual_share)
                marks.append(f"timing invalid: {share} of wall time not accounted for (seed {run.record.seed})")
        return marks + self._failures

    @property
    def tuning_marks(self) -> list[str]:
        """What a reader must know before using the row's figures of fine-tuning."""
        marks = [
            f"timing invalid: {percent(tuned.timing.residual_share)} of wall time not accounted for "
            f"(seed {run.record.seed})"
            for run in self.finished
            if (tuned := run.record.finetune) is not None and not tuned.timing.valid
        ]
        if self.tuned_differently:
            marks.append(f"{_TUNED_DIFFERENTLY}: {', '.join(self.tuned_differently)}")
        caveats: dict[str, list[str]] = {}
        for run in self.finished:
            for note in run.record.finetune.notes if run.record.finetune else []:
                if not note.startswith(_INVALID):
                    caveats.setdefault(in_short(note), []).append(str(run.record.seed))
        return marks + [f"{text}{self._which(seeds)}" for text, seeds in caveats.items()] + self._failures

    @property
    def _failures(self) -> list[str]:
        return [
            f"seed {run.record.seed} failed: {plain(run.record.error or 'no message', 80)}"
            for run in self.runs
            if run.record.status == "failed" and self.finished
        ]

    def _with_efficiency(self) -> Iterable[tuple[Run, RunEfficiency]]:
        kept = [run for run in self.finished if run.record.efficiency is not None]
        return zip(kept, self.efficiencies, strict=True)

    def _which(self, seeds: list[str]) -> str:
        return "" if len(seeds) == len(self.finished) else f" (seed {', '.join(seeds)})"

    @property
    def seeds_text(self) -> str:
        """How many runs stand behind the figures."""
        if not self.runs:
            return "no run"
        if len(self.runs) == len(self.finished):
            return f"{len(self.finished)} seed{'s' if len(self.finished) > 1 else ''}"
        return f"{len(self.finished)} of {len(self.runs)} seeds"


def row_results(suite: Suite, results: Results) -> dict[str, RowResult]:
    """Every row of the suite in its order, then rows that only the records know."""
    return {
        row: RowResult(
            row,
            suite.methods[row].label if row in suite.methods else runs[0].record.label,
            suite.methods.get(row),
            tuple(runs),
            suite.estimator.confidence,
            suite.finetune is not None,
        )
        for row, runs in results.runs.items()
    }


def in_short(reason: str) -> str:
    """A reason without what can be done about it: "no AlexNet weights" of "no AlexNet weights: put ...".

    One that begins with a file's path and a colon stays whole: the path alone says nothing.
    """
    head = reason.partition(": ")[0]
    return reason if "/" in head else head


def short_kind(kind: str) -> str:
    """An interval's kind as a table has room for it."""
    return "within this run" if kind.startswith("block bootstrap within this run") else kind


def points_text(figure: Interval) -> str | None:
    """Single seeds' values, None for one run."""
    return "points: " + ", ".join(number(point) for point in figure.points) if figure.points else None


def _finite(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]
