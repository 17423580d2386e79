"""What all figures share: how a row looks, canvases and legends, and the files that a figure leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from lmd_bench.config import Suite
from lmd_bench.report.cells import rows_to_csv
from lmd_bench.report.load import Results, Run
from lmd_bench.report.rows import RowResult

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

# M. Okabe, K. Ito, "Color Universal Design" (2002): eight colours told apart by colour-blind readers; yellow is left
# out, too light for lines on white. Rows beyond the seventh repeat colours with another dash.
_ROW_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: Final = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKERS: Final = "osD^vPX*<>"
_MOST_POINTS: Final = 1000
_LEGEND_LINE_INCHES: Final = 0.19
DPI: Final = 150
WIDTH_INCHES: Final = 9.5
"""Of every figure."""


@dataclass(frozen=True)
class Look:
    """How a row is drawn."""

    colour: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str


@dataclass(frozen=True)
class Figure:
    """A figure on disk with the table it was drawn from."""

    stem: str
    title: str
    caption: str
    png: Path
    csv: Path


class Sheet:
    """The folder that figures are saved in, with the records they are drawn from and the looks of the rows."""

    def __init__(
        self, suite: Suite, results: Results, rows: Mapping[str, RowResult], folder: Path, provenance: Sequence[str]
    ) -> None:
        self.suite = suite
        self.results = results
        self.folder = folder
        self.rows = rows
        self.labels = {row: found.label for row, found in rows.items()}
        self.provenance = list(provenance)
        self.looks = looks(list(rows))
        self.figures: list[Figure] = []

    def label(self, run: Run, runs: Sequence[Run]) -> str:
        """A row's label once: further seeds of the row are drawn without one."""
        first = next(other for other in runs if other.record.row == run.record.row)
        return self.labels[run.record.row] if first is run else "_nolegend_"

    def save(
        self,
        canvas: Canvas,
        stem: str,
        title: str,
        caption: str,
        names: Sequence[str],
        table: Sequence[Sequence[object]],
        *,
        dpi: int = DPI,
    ) -> None:
        """Write `stem`.png and `stem`.csv: the columns `names` of `table` under title and provenance."""
        png, data = self.folder / f"{stem}.png", self.folder / f"{stem}.csv"
        canvas.savefig(png, dpi=dpi, metadata={"Title": title, "Description": " | ".join(self.provenance)})
        data.write_text(rows_to_csv([title, *self.provenance], names, table), encoding="utf-8")
        self.figures.append(Figure(stem, title, caption, png, data))


def looks(rows: Sequence[str]) -> dict[str, Look]:
    """One look for each row, the same in every figure."""
    count = len(_ROW_COLOURS)
    return {
        row: Look(_ROW_COLOURS[i % count], _DASHES[(i // count) % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, row in enumerate(rows)
    }


def new_canvas(rows: int, columns: int, *, height: float, sharey: bool = False) -> tuple[Canvas, list[Axes]]:
    """A figure of the common width and its axes, without pyplot and so without global state. `height` in inches."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = list(canvas.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())
    for one in axes:
        one.grid(color="#E4E4E4", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def add_legend(canvas: Canvas, axes: Axes) -> None:
    """One legend above the axes, where it hides no data; the figure grows by the lines it takes."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    inches = 0.6 + 0.07 * max(map(len, names))  # handle, gaps, and letters of 9 points
    columns = max(1, min(len(names), 6, int((canvas.get_figwidth() - 0.2) / inches)))
    canvas.set_figheight(canvas.get_figheight() + _LEGEND_LINE_INCHES * (-(-len(names) // columns) - 1))
    canvas.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def note_level(
    axes: Axes,
    text: str,
    level: float,
    place: float,
    align: Literal["left", "center", "right"],
    *,
    dashed: bool = False,
) -> None:
    """A grey line across the axes at `level`, with `text` above it at `place`, a share of the width."""
    axes.axhline(level, color="#777777", linewidth=1, linestyle=(0, (2, 2)) if dashed else "-", zorder=1)
    axes.annotate(
        text, (place, level), fontsize=8, color="#555555", xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha=align,
    )  # fmt: skip


def thin(count: int) -> list[int]:
    """Evenly spread indices of at most a thousand of `count` points, first and last included."""
    if count <= _MOST_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)})


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The finite ones of `values`."""
    import numpy as np

    return np.asarray(values[np.isfinite(values)])


def logarithmic_if_wide(axes: Axes, values: Sequence[object]) -> None:
    """A logarithmic y axis where positive values span more than a factor of ten."""
    numbers = [value for value in values if isinstance(value, float) and value > 0]
    if numbers and max(numbers) / min(numbers) > 10:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
