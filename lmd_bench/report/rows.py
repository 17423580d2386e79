"""One row of a suite over its seeds: which figures there are, and why others are missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmd_bench.config import RowConfig, Suite
from lmd_bench.lmd.mask_schedule import mask_levels
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure, Interval, Missing, over_seeds
from lmd_bench.records import Phases
from lmd_bench.report.cells import number, percent, plain
from lmd_bench.report.load import Results, Run

NOT_BUILT_MAT = "fine-tuning is not built yet"


@dataclass(frozen=True)
class RowResult:
    """A row with the runs that were found for it."""

    row: str
    label: str
    config: RowConfig | None
    """None for records of a row that the suite no longer has."""
    runs: tuple[Run, ...]
    confidence: float

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
        """Why the row has no finished run, as a cell says it; None where it has one."""
        if self.finished:
            return None
        if self.runs:
            first = self.runs[0].record
            return f"failed: {plain(first.error or 'no message was recorded')}"
        if self.config and self.config.planned:
            return f"not measured: planned: {plain(self.config.planned)}"
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

    def recorded_reason(self, *names: str) -> str:
        """The first reason the records give for any of `names`."""
        for run in self.finished:
            for name in names:
                if name in run.record.not_measured:
                    return plain(run.record.not_measured[name])
        return "the record does not hold it"

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
        for run in self.runs:
            if run.record.status == "failed" and self.finished:
                marks.append(f"seed {run.record.seed} failed: {plain(run.record.error or 'no message', 80)}")
        return marks

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
        )
        for row, runs in results.runs.items()
    }


def short_kind(kind: str) -> str:
    """An interval's kind as a table has room for it."""
    return "within this run" if kind.startswith("block bootstrap within this run") else kind


def points_text(figure: Interval) -> str | None:
    """Single seeds' values, None for one run."""
    return "points: " + ", ".join(number(point) for point in figure.points) if figure.points else None


def _finite(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]
