"""The paper's own numbers (arXiv:2312.07971), one sourced number a cell, and their ratios to a reference row.

The paper states no units, so a published number is only ever compared with another of the same table.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Final

from lmd_bench.errors import ConfigError

REFERENCES: Final = MappingProxyType({"table1": "MAE", "table2": "MAE", "table3": "DDPM", "table5": "LMD"})
"""The row of each published table that its ratios are taken against."""

# Table 5's first row carries the numbers of LMD-CS in Tables 1 and 2, and Table 3 lists one LMD, the cosine default.
_SAME_ROW: Final = MappingProxyType(
    {
        "table1": {"LMD": "LMD-CS"},
        "table2": {"LMD": "LMD-CS"},
        "table3": {"LMD-CS": "LMD"},
        "table5": {"LMD-CS": "LMD"},
    }
)


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper, its cells as printed there."""

    name: str
    """`table1` to `table5`."""
    number: int
    title: str
    source: str
    """Authors, title and arXiv number."""
    columns: tuple[str, ...]
    """Without the first, which names the row."""
    rows: Mapping[str, Mapping[str, str]]
    """Row name -> column -> text; an empty text where the paper has none."""

    @property
    def reference(self) -> str | None:
        """The row that ratios are taken against, None for Table 4."""
        return REFERENCES.get(self.name)

    def find(self, published: str | None) -> str | None:
        """This table's name for the row a suite calls `published`, or None where it is not in the table."""
        if published is None:
            return None
        name = _SAME_ROW.get(self.name, {}).get(published, published)
        return name if name in self.rows else None

    def text(self, row: str, column: str) -> str | None:
        """A cell as printed in the paper, None where the paper leaves it empty."""
        return self.rows[row][column] or None

    def value(self, row: str, column: str) -> float | None:
        """A cell as a number, None where the paper has no number."""
        try:
            return float(self.rows[row][column])
        except ValueError:
            return None

    def ratio(self, row: str, column: str) -> float | None:
        """The cell over the reference row's cell of the same column; None where either is missing."""
        if self.reference is None:
            return None
        value, base = self.value(row, column), self.value(self.reference, column)
        return None if value is None or not base else value / base


def load_published(name: str) -> PublishedTable:
    """Table `table1` ... `table5` of the paper. Raises ConfigError for another name."""
    file = resources.files("lmd_bench") / "published" / f"{name}.csv"
    if not file.is_file():
        raise ConfigError(f"no published table {name!r}; there is: table1, table2, table3, table4, table5")
    lines = file.read_text(encoding="utf-8").splitlines()
    source, about = (line.removeprefix("# ") for line in lines[:2])
    reader = csv.DictReader(lines[2:])
    key, *columns = reader.fieldnames or ()
    heading, _, rest = about.partition(": ")
    return PublishedTable(
        name=name,
        number=int(heading.removeprefix("Table ")),
        title=rest.partition(". ")[0],
        source=source,
        columns=tuple(columns),
        rows={row[key]: {column: row[column] for column in columns} for row in reader},
    )
