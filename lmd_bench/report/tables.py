"""The paper's tables with our figures beside them. Published numbers stand in columns of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure, Interval, Missing
from lmd_bench.report.cells import Cell, Column, Section, Table, label, missing, number
from lmd_bench.report.finetune import GAIN_COLUMN, gain_cell, tuning_notes, tuning_setup
from lmd_bench.report.load import Run
from lmd_bench.report.published import PublishedTable, load_published
from lmd_bench.report.row_cells import (
    DIFFUSION_STEPS,
    NAME_COLUMN,
    decreases_cell,
    diffusion_steps_cell,
    mask_ratio_cell,
    measured_cell,
    measured_parts,
    name_cell,
    setup,
    shares_cell,
    tuning_name_cell,
)
from lmd_bench.report.rows import RowResult
from lmd_bench.report.tuning import other_conditions

Rows = Mapping[str, RowResult]
NOT_IN_PAPER: Final = "not in the paper"


@dataclass(frozen=True)
class Measure:
    """A figure that a table shows beside its published namesake."""

    key: str
    """Column of the published table."""
    title: str
    unit: str
    csv_unit: str
    scale: float
    """Stored unit -> shown unit."""
    figure: Callable[[RowResult], Figure]
    """Over the row's seeds; Missing carries the whole text of the cell."""
    of_tuning: bool = False
    """Whether fine-tuning is in it."""


def mean_of_five(found: RowResult, run: Run) -> float | Missing:
    """Table 5's overall mean of one run: MIT and MLT in s, MLI, MAT@1 and MAT@5 in s per percentage point."""
    efficiency = run.record.efficiency
    if efficiency is None:
        return Missing(f"not measured: {found.recorded_reason('efficiency')}")
    figures = RunEfficiency.from_dict(efficiency)
    five: dict[str, tuple[Figure | float, float]] = {
        "MIT": (figures.mit_ms, 1e-3),
        "MLT": (figures.headline.mlt_ms, 1e-3),
        "MLI": (figures.headline.mli, 1.0),
        "MAT@1": (found.mat(run, 1), 1.0),
        "MAT@5": (found.mat(run, 5), 1.0),
    }
    total = 0.0
    for name, (figure, scale) in five.items():
        if isinstance(figure, Missing):
            return Missing(f"needs {name}: {figure.reason.removeprefix('not measured: ')}")
        total += scale * (figure.value if isinstance(figure, Interval) else figure)
    return total / len(five)


def _overall(found: RowResult) -> Figure:
    return found.seed_figure(lambda run: mean_of_five(found, run))


MIT: Final = Measure("mit", "MIT", "ms per iteration", "_ms", 1.0, lambda r: r.figure(lambda e: e.mit_ms, "mit"))
MLT: Final = Measure(
    "mlt", "MLT", "s per valid decrease", "_s", 1e-3, lambda r: r.figure(lambda e: e.headline.mlt_ms, "mlt")
)
MLI: Final = Measure(
    "mli", "MLI", "iterations per valid decrease", "", 1.0, lambda r: r.figure(lambda e: e.headline.mli, "mli")
)
MAT_AT_1: Final = Measure(
    "mat_at_1", "MAT@1", "s per point", "_s", 1.0, lambda r: r.seed_figure(lambda run: r.mat(run, 1)), True
)
MAT_AT_5: Final = Measure(
    "mat_at_5", "MAT@5", "s per point", "_s", 1.0, lambda r: r.seed_figure(lambda run: r.mat(run, 5)), True
)
OVERALL: Final = Measure("overall_mean", "Overall mean", "mixed units", "", 1.0, _overall, True)

_MEASURES: Final = {
    "table1": (MIT, MLT, MLI),
    "table2": (MAT_AT_1, MAT_AT_5),
    "table3": (MIT, MLT, MLI),
    "table5": (OVERALL, MIT, MLT, MLI, MAT_AT_1, MAT_AT_5),
}
_TITLES: Final = {
    "table1": "Table 1: cost of pre-training",
    "table2": "Table 2: cost of fine-tuning",
    "table3": "Table 3: cost of training generative methods",
    "table5": "Table 5: ablation of LMD",
}


def published_table(name: str, suite: Suite, rows: Rows) -> Table:
    """One of the paper's tables in its shape, published and measured figures side by side."""
    return _PublishedTableBuilder(load_published(name), suite, rows).build()


class _PublishedTableBuilder:
    def __init__(self, paper: PublishedTable, suite: Suite, rows: Rows) -> None:
        self.paper = paper
        self.suite = suite
        self.measures = _MEASURES[paper.name]
        self.timed = MIT in self.measures
        """Whether the table is of pre-training; Table 2 is of fine-tuning alone."""
        in_paper = {row: name for row, found in rows.items() if (name := paper.find(found.published))}
        order = list(paper.rows)
        self.standing = sorted(in_paper, key=lambda row: order.index(in_paper[row]))
        self.in_paper = in_paper
        self.others = [row for row, found in rows.items() if found.published is None]
        self.rows = rows
        self.reference = self._reference()

    def _reference(self) -> str | None:
        """The measured row that ratios are taken against: the one beside the published reference row."""
        candidates = [row for row in self.standing if self.in_paper[row] == self.paper.reference]
        if self.suite.reference in candidates:
            return self.suite.reference
        return candidates[0] if candidates else None

    def build(self) -> Table:
        sections = [
            Section(None, tuple(self._row(row) for row in self.standing)),
            Section("Rows that are not in the paper", tuple(self._row(row) for row in self.others)),
        ]
        return Table(
            self.paper.name,
            f"{_TITLES[self.paper.name]} ({self.suite.title})",
            tuple(self._columns()),
            tuple(section for section in sections if section.rows),
            tuple(self._notes()),
        )

    # -- columns --------------------------------------------------------------------------------------------------

    def _columns(self) -> list[Column]:
        columns = [
            NAME_COLUMN,
            Column("paper", ("published_row", "published_setup"), group="Set-up"),
            Column("this run", ("setup",), group="Set-up"),
        ]
        if "mask_ratio" in self.paper.columns:
            columns += [
                Column("paper", ("published_mask_ratio",), group="Mask ratio"),
                Column("this run", ("mask_ratio_first", "mask_ratio_last"), group="Mask ratio"),
            ]
        if "diffusion_steps" in self.paper.columns:
            columns += [
                Column("paper", ("published_diffusion_steps",), group="Diffusion steps"),
                Column("this run", DIFFUSION_STEPS, group="Diffusion steps"),
            ]
        for measure in self.measures:
            columns += self._measure_columns(measure)
            if measure is OVERALL:
                columns += self._delta_columns()
        if self.timed:
            columns += [
                Column("Projector, stall", ("projector_share", "stall_share"), "shares of the step"),
                Column(
                    "N", ("num_decreases", "t90_step", "mask_ratio_at_t90"), "valid decreases to t90, mask ratio there"
                ),
            ]
        else:
            columns.append(GAIN_COLUMN)
        return columns

    def _delta_columns(self) -> list[Column]:
        group = f"Overall mean less {self.paper.reference}'s"
        return [
            Column("paper", ("published_overall_mean_delta",), "no unit", group),
            Column("measured", ("overall_mean_delta",), "mixed units", group),
        ]

    def _measure_columns(self, measure: Measure) -> list[Column]:
        key = measure.key
        return [
            Column(
                "paper",
                (f"published_{key}", f"published_{key}_ratio"),
                f"no unit; ratio to {self.paper.reference}",
                group=measure.title,
            ),
            Column("measured", measured_parts(key, measure.csv_unit), measure.unit, group=measure.title),
        ]

    # -- cells ----------------------------------------------------------------------------------------------------

    def _row(self, row: str) -> tuple[Cell, ...]:
        found = self.rows[row]
        if self.timed:
            cells = [name_cell(found, tuning=MAT_AT_1 in self.measures), self._published_setup(row), setup(found)]
        else:
            name = tuning_name_cell(found, self.measures[0].figure(found))
            cells = [name, self._published_setup(row), tuning_setup(found)]
        if "mask_ratio" in self.paper.columns:
            cells += [self._published_text(row, "mask_ratio"), mask_ratio_cell(found)]
        if "diffusion_steps" in self.paper.columns:
            cells += [self._published_text(row, "diffusion_steps"), diffusion_steps_cell(found)]
        for measure in self.measures:
            cells += [self._published_measure(row, measure), self._measured(row, measure)]
            if measure is OVERALL:
                cells += [self._published_delta(row), self._measured_delta(row)]
        cells += [shares_cell(found), decreases_cell(found)] if self.timed else [gain_cell(found)]
        return tuple(cells)

    def _published_setup(self, row: str) -> Cell:
        name = self.in_paper.get(row)
        if name is None:
            return Cell((NOT_IN_PAPER,), "missing")
        lines = [name + (f" ({year})" if (year := self._maybe(name, "year")) else "")]
        lines += [text] if (text := self._maybe(name, "backbone")) else []
        size, patch = self._maybe(name, "image_size"), self._maybe(name, "patch_size")
        if size:
            lines.append(f"{size} px" + (f", patch {patch}" if patch else ""))
        parts = {"published_row": name, "published_setup": ", ".join(lines[1:]) or "not stated in this table"}
        return Cell(tuple(lines), "published", parts)

    def _maybe(self, name: str, column: str) -> str | None:
        return self.paper.text(name, column) if column in self.paper.columns else None

    def _published_text(self, row: str, column: str) -> Cell:
        name = self.in_paper.get(row)
        if name is None:
            return missing(NOT_IN_PAPER)
        return Cell((self.paper.text(name, column) or "not stated",), "published")

    def _published_measure(self, row: str, measure: Measure) -> Cell:
        name = self.in_paper.get(row)
        if name is None:
            return missing(NOT_IN_PAPER)
        value, share = self.paper.value(name, measure.key), self.paper.ratio(name, measure.key)
        if value is None or share is None:
            return missing("not stated in the paper")
        against = "reference" if name == self.paper.reference else f"{number(share)} × {self.paper.reference}"
        parts = {f"published_{measure.key}": value, f"published_{measure.key}_ratio": share}
        return Cell((self.paper.rows[name][measure.key], against), "published", parts)

    def _measured(self, row: str, measure: Measure) -> Cell:
        reference = self.rows[self.reference] if self.reference else None
        obstacle = self._obstacle(row) if measure.of_tuning else None
        return measured_cell(
            self.rows[row], reference, measure.figure, measure.key, measure.csv_unit, measure.scale, obstacle
        )

    def _obstacle(self, row: str) -> str | None:
        """Why figures of a row's fine-tuning cannot be compared with the reference row's; None where they can."""
        reference = self.rows[self.reference].finished if self.reference else []
        names = other_conditions([*self.rows[row].finished, *reference])
        return f"fine-tuned otherwise ({', '.join(names)})" if names else None

    def _published_delta(self, row: str) -> Cell:
        name = self.in_paper.get(row)
        if name is None:
            return missing(NOT_IN_PAPER)
        if name == self.paper.reference:
            return Cell(("reference",), "published")
        value, text = self.paper.value(name, "delta"), self.paper.text(name, "delta")
        if value is None:
            return missing("not stated in the paper")
        return Cell((f"+{text}" if value > 0 else f"{text}",), "published", {"published_overall_mean_delta": value})

    def _measured_delta(self, row: str) -> Cell:
        """The overall mean less the reference row's."""
        figure = OVERALL.figure(self.rows[row])
        if isinstance(figure, Missing):
            return missing(figure.reason)
        if self.reference is None:
            return missing("no reference row")
        if row == self.reference:
            return label("reference")
        base = OVERALL.figure(self.rows[self.reference])
        if isinstance(base, Missing):
            return missing(f"no difference: {self.reference}: {base.reason}")
        if obstacle := self._obstacle(row):
            return missing(f"no difference: {self.reference}: {obstacle}")
        delta = figure.value - base.value
        text = f"{'+' if delta > 0 else ''}{number(delta)}"
        return Cell((text,), "value", {"overall_mean_delta": delta})

    # -- notes ----------------------------------------------------------------------------------------------------

    def _notes(self) -> list[str]:
        paper = self.paper
        notes = [
            f"Paper columns: {paper.source}, Table {paper.number} ({paper.title}). The paper states no units and "
            f"used other machines, images and sizes, so only ratios to {paper.reference} may be compared with ours."
        ]
        if self.reference:
            notes.append(
                f"Measured ratios are to the row {self.reference!r}; verdicts (faster, slower, not distinguishable) "
                f"are on the {100 * self.suite.estimator.confidence:g} % interval of the ratio."
            )
        else:
            notes.append(f"No measured ratios: the suite has no row beside the paper's {paper.reference}.")
        absent = [name for name in paper.rows if name not in self.in_paper.values()]
        if absent:
            notes.append(f"In the paper's table but without a row in this suite: {', '.join(absent)}.")
        if "diffusion_steps" in paper.columns:
            notes.append(
                "Diffusion steps, this run: for diffusion methods T in training, and the reverse steps of one "
                "reconstruction on the yardstick (passes of the network); for masked ones the mask levels walked in "
                "training, that is, tokens between the longest and the shortest encoder input. The paper's LMD: 29."
            )
        if MAT_AT_1 in self.measures:
            notes.append(
                "MAT@k: seconds of fine-tuning, evaluation off the clock, per percentage point that the best check has "
                "gained in top-k accuracy over the one before any step. A value of one seed has no interval."
            )
            notes += tuning_notes(self._shown())
        if OVERALL in self.measures:
            notes.append(
                "Overall mean: the plain mean of the five columns beside it, as in the paper. Ours takes MIT and MLT "
                "both in seconds (the paper's numbers obey MLT = MIT x MLI in one unit), MLI in iterations and MAT in "
                "seconds per point: units are mixed, so it orders rows and means nothing else. Missing where one of "
                "the five is missing; its differences are between means and carry no interval."
            )
        by_text: dict[str, list[str]] = {}
        for found in self._shown():
            if found.config and found.config.note:
                by_text.setdefault(found.config.note, []).append(found.label)
        return notes + [f"{', '.join(labels)}: {text}" for text, labels in by_text.items()]

    def _shown(self) -> list[RowResult]:
        return [self.rows[row] for row in (*self.standing, *self.others)]
