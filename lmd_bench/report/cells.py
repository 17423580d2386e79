"""Tables as values: columns with units, cells that always say something, written as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["label", "value", "published", "missing"]
Number = float | int


@dataclass(frozen=True)
class Column:
    """One column as readers see it, and the columns of the CSV that hold its parts."""

    title: str
    csv: tuple[str, ...]
    """Names of its parts in the CSV, units included ("mit_ms", "mit_ms_low", ...)."""
    unit: str | None = None
    group: str | None = None
    """Heading above neighbouring columns that belong together."""

    @property
    def head(self) -> str:
        """Title with unit, as it stands above the column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Cell:
    """One cell: the lines that readers see and the parts that the CSV holds."""

    lines: tuple[str, ...]
    kind: Kind = "value"
    parts: Mapping[str, Number | str] = field(default_factory=dict)
    """CSV column -> value. Columns that are not named here get the cell's text."""

    def __post_init__(self) -> None:
        if not self.lines or not all(line.strip() for line in self.lines):
            raise ValueError(f"a cell must say something, got {self.lines!r}")
        for name, part in self.parts.items():
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{name}: {part} in a table")

    @property
    def text(self) -> str:
        """All lines as one."""
        return " ".join(self.lines)


@dataclass(frozen=True)
class Section:
    """Rows under a heading of their own; None: no heading."""

    heading: str | None
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table with what a reader must know beside it."""

    stem: str
    """File name without ending."""
    title: str
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for section in self.sections:
            for row in section.rows:
                if len(row) != len(self.columns):
                    raise ValueError(f"{self.stem}: {len(row)} cells under {len(self.columns)} columns")

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """All rows, sections one after the other."""
        return [row for section in self.sections for row in section.rows]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Runs of columns of one group as (heading, width); the heading is empty outside groups."""
        runs: list[tuple[str, int]] = []
        for place, column in enumerate(self.columns):
            name = column.group or ""
            if place > 1 and runs[-1][0] == name:  # the first column, which names rows, stands alone
                runs[-1] = (name, runs[-1][1] + 1)
            else:
                runs.append((name, 1))
        return runs


def label(*lines: str) -> Cell:
    """Text that names or describes a row."""
    return Cell(lines, "label")


def missing(reason: str) -> Cell:
    """A cell without a figure says why."""
    return Cell((reason,), "missing")


# -- numbers as text --------------------------------------------------------------------------------------------------


def decimals_for(value: Number, digits: int = 3) -> int:
    """Decimal places that show `digits` significant digits of a finite value."""
    if value == 0:
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def number(value: Number, digits: int = 3) -> str:
    """Three significant digits, whole numbers in full, powers of ten only below 0.0001."""
    if isinstance(value, int):
        return str(value)
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{decimals_for(value, digits)}f}"


def span(value: Number, low: Number, high: Number) -> str:
    """An interval as "[low, high]", with as many decimals as its width needs and at least those of `value`."""
    if 0 < abs(value) < 1e-4:
        return f"[{low:.2e}, {high:.2e}]"
    places = decimals_for(value)
    if high > low:
        places = min(max(places, decimals_for(high - low, 1)), places + 2)
    return f"[{low:.{places}f}, {high:.{places}f}]"


def percent(share: Number) -> str:
    """A share as a percentage with three significant digits at most, e.g. "12.3 %"."""
    value = 100 * share
    if 0 < value < 0.005:
        return "< 0.01 %"
    return f"{value:.{min(2, decimals_for(value))}f} %"


def plain(text: str, limit: int = 160) -> str:
    """One line of text, cut at `limit` characters, for error messages inside cells."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


# -- files ------------------------------------------------------------------------------------------------------------


def to_csv(table: Table, provenance: Sequence[str]) -> str:
    """The table with one part a column; `provenance` stands above it in lines that begin with "#"."""
    names = [name for column in table.columns for name in column.csv]
    rows = []
    for row in table.rows:
        values: list[Number | str] = []
        for column, cell in zip(table.columns, row, strict=True):
            values += [cell.parts.get(name, _without_hash(cell.text)) for name in column.csv]
        rows.append(values)
    return rows_to_csv([table.title, *provenance, *table.notes], names, rows)


def rows_to_csv(comments: Iterable[str], names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV with leading "# " lines; floats are written to be read back equal."""
    out = io.StringIO()
    for comment in comments:
        out.write(f"# {' '.join(comment.split())}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return out.getvalue()


def _without_hash(text: str) -> str:
    return text.replace("#", "no. ")  # readers take "#" for the beginning of a comment, wherever it stands


def to_markdown(table: Table, provenance: Sequence[str]) -> str:
    """The table in GitHub's Markdown, notes below it, `provenance` as its footer."""
    heads = [f"{column.group}: {column.head}" if column.group else column.head for column in table.columns]
    lines = [f"# {table.title}", ""]
    for section in table.sections:
        if not section.rows:
            continue
        if section.heading:
            lines += [f"**{section.heading}**", ""]
        lines.append(_markdown_row(heads))
        lines.append("|" + "---|" * len(heads))
        lines += [_markdown_row(["<br>".join(map(_escape, cell.lines)) for cell in row]) for row in section.rows]
        lines.append("")
    lines += [f"- {_escape(note)}" for note in table.notes]
    lines += ["", "---", *(f"{_escape(line)}  " for line in provenance)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
