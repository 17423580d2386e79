"""The paper's Table 4 beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.records import QualityBounds
from lmd_bench.report.cells import Cell, Column, Section, Table, missing
from lmd_bench.report.image_quality import (
    QUALITY_NAME,
    TABLE4,
    Measured,
    bounds_named,
    images_cell_of,
    quality_name_cell,
)
from lmd_bench.report.published import PublishedTable, load_published
from lmd_bench.report.rows import RowResult

Rows = Mapping[str, RowResult]


def table4(suite: Suite, rows: Rows, bounds: QualityBounds | None) -> Table:
    """The paper's Table 4 beside ours. Published figures have neither ratio nor verdict: they are of other work."""
    return _Table4(suite, rows, bounds).build()


class _Table4:
    def __init__(self, suite: Suite, rows: Rows, bounds: QualityBounds | None) -> None:
        self.paper: PublishedTable = load_published("table4")
        self.suite, self.rows, self.bounds = suite, rows, bounds
        self.measured = Measured(suite, rows, bounds, TABLE4)
        self.in_paper = {row: name for row, found in rows.items() if (name := self.paper.find(found.published))}

    def build(self) -> Table:
        columns = (
            QUALITY_NAME,
            Column("row", ("published_row",), group=_PAPER_GROUP),
            *(Column(title, (f"published_{key}",), group=_PAPER_GROUP) for key, title in _PAPER_FIGURES.items()),
            *self.measured.columns(group="Measured: hidden part filled"),
            Column("Images", ("num_images", "image_size_px", "what"), group="Measured: hidden part filled"),
        )
        standing = [line for name in self.paper.rows for line in self._paper_rows(name)]
        others = [self._row(row, None) for row in self.rows if row not in self.in_paper]
        sections = [
            Section(None, tuple(standing)),
            Section("Rows that are not in the paper", tuple(others)),
            Section("Bounds: what the columns are at most and at least", tuple(self._bounds())),
        ]
        return Table(
            "table4",
            f"Table 4: quality of the filled images ({self.suite.title})",
            columns,
            tuple(section for section in sections if section.rows),
            (self._paper_note(), *self.measured.notes()),
        )

    def _paper_rows(self, name: str) -> list[tuple[Cell, ...]]:
        """The suite's rows beside one of the paper's; without any, the paper's figures alone."""
        rows = [row for row, published in self.in_paper.items() if published == name]
        if rows:
            return [self._row(row, name) for row in rows]
        nothing = missing("no such row in this suite")
        here = Cell((name,), "label", {"row": "none", "label": name, "seeds": 0})
        return [(here, *self._published(name), *[nothing] * (len(self.measured.keys) + 1))]

    def _row(self, row: str, name: str | None) -> tuple[Cell, ...]:
        found = self.rows[row]
        cells = (*self.measured.cells(found), self.measured.images_cell(found))
        return (quality_name_cell(found), *self._published(name), *cells)

    def _published(self, name: str | None) -> tuple[Cell, ...]:
        if name is None:
            return (missing("not in the paper"),) * (1 + len(_PAPER_FIGURES))
        cells = [Cell((name,), "published", {"published_row": name})]
        for key in _PAPER_FIGURES:
            value = self.paper.value(name, key)
            if value is None:
                cells.append(missing("not stated in the paper"))
            else:
                cells.append(Cell((self.paper.rows[name][key],), "published", {f"published_{key}": value}))
        return tuple(cells)

    def _bounds(self) -> list[tuple[Cell, ...]]:
        if self.bounds is None:
            return []
        return [
            (name, *self._published(None), *self.measured.bound_cells(quality), images_cell_of([quality]))
            for name, quality in bounds_named(self.bounds)
        ]

    def _paper_note(self) -> str:
        return (
            f"Paper columns: {self.paper.source}, Table 4 ({self.paper.title}). The paper does not say how its methods "
            "were compared, and its figures for SD-v1.4 and Muse-base look like those of text-to-image generation. "
            "Ours are of filling the hidden part of the same images, the visible part pasted back: other work, so "
            "neither ratios nor verdicts are given."
        )


_PAPER_GROUP: Final = "Paper (other work: no ratios)"
_PAPER_FIGURES: Final = {"fid": "FID", "clip_score": "CLIP-score", "lpips": "LPIPS"}
