"""The paper's tables with our figures beside them. Published numbers stand in columns of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure
from lmd_bench.report.cells import Cell, Column, Section, Table, missing, number
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
)
from lmd_bench.report.rows import NOT_BUILT_MAT, RowResult

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
    pick: Callable[[RunEfficiency], Figure] | None
    """None: cannot be measured yet."""
    why_not: str = ""


MIT: Final = Measure("mit", "MIT", "ms per iteration", "_ms", 1.0, lambda e: e.mit_ms)
MLT: Final = Measure("mlt", "MLT", "s per valid decrease", "_s", 1e-3, lambda e: e.headline.mlt_ms)
MLI: Final = Measure("mli", "MLI", "iterations per valid decrease", "", 1.0, lambda e: e.headline.mli)
MAT_AT_1: Final = Measure("mat_at_1", "MAT@1", "s per point", "_s", 1.0, None, NOT_BUILT_MAT)
MAT_AT_5: Final = Measure("mat_at_5", "MAT@5", "s per point", "_s", 1.0, None, NOT_BUILT_MAT)
OVERALL: Final = Measure("overall_mean", "Overall mean", "mixed units", "", 1.0, None, "needs MAT")

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
        self.timed = any(measure.pick for measure in self.measures)
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
        if self.timed:
            columns += [
                Column("Projector, stall", ("projector_share", "stall_share"), "shares of the step"),
                Column(
                    "N", ("num_decreases", "t90_step", "mask_ratio_at_t90"), "valid decreases to t90, mask ratio there"
                ),
            ]
        return columns

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
        cells = [name_cell(found), self._published_setup(row), setup(found)]
        if "mask_ratio" in self.paper.columns:
            cells += [self._published_text(row, "mask_ratio"), mask_ratio_cell(found)]
        if "diffusion_steps" in self.paper.columns:
            cells += [self._published_text(row, "diffusion_steps"), diffusion_steps_cell(found)]
        for measure in self.measures:
            cells += [self._published_measure(row, measure), self._measured(row, measure)]
        if self.timed:
            cells += [shares_cell(found), decreases_cell(found)]
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
        found = self.rows[row]
        if measure.pick is None:
            return missing(found.why_nothing or f"not measured: {measure.why_not}")
        reference = self.rows[self.reference] if self.reference else None
        return measured_cell(found, reference, measure.pick, measure.key, measure.csv_unit, measure.scale)

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
        by_text: dict[str, list[str]] = {}
        for found in self._shown():
            if found.config and found.config.note:
                by_text.setdefault(found.config.note, []).append(found.label)
        return notes + [f"{', '.join(labels)}: {text}" for text, labels in by_text.items()]

    def _shown(self) -> list[RowResult]:
        return [self.rows[row] for row in (*self.standing, *self.others)]
