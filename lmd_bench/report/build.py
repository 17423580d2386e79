"""From a suite's folder to its report: tables, figures and one page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmd_bench.config import Suite
from lmd_bench.errors import RecordError
from lmd_bench.report.cells import Table, to_csv, to_markdown
from lmd_bench.report.details import details_table, estimators_table
from lmd_bench.report.evaluators import all_qualities, evaluators_table
from lmd_bench.report.factors import factors_table
from lmd_bench.report.finetune import finetune_table, has_finetuning
from lmd_bench.report.image_quality import has_image_quality, image_quality_table
from lmd_bench.report.inference import inference_table
from lmd_bench.report.load import Results, load_results
from lmd_bench.report.origin import Origin, origin
from lmd_bench.report.quality import quality_table, yardsticks
from lmd_bench.report.rows import RowResult, row_results
from lmd_bench.report.step_cost import step_cost_table
from lmd_bench.report.table4 import table4
from lmd_bench.report.tables import published_table


@dataclass(frozen=True)
class Report:
    """A report that has been written."""

    suite: Suite
    folder: Path
    page: Path
    """The page to open first."""
    paths: tuple[Path, ...]
    """Every file written."""
    problems: tuple[str, ...]
    """Records that could not be read or used, one line each."""
    warnings: tuple[str, ...]
    tables: tuple[Table, ...]
    rows: dict[str, RowResult] = field(repr=False)


def build_report(folder: Path, suite: Suite, *, command: str) -> Report:
    """Read all records under `folder` (OUT/<suite>) and write `folder`/report: tables, figures, index.html.

    `command` is the command line that asked for the report; it stands in every file beside the commands of the
    runs. Records that cannot be read are listed in `Report.problems`. Raises RecordError where none can be read or
    the report cannot be written.
    """
    from lmd_bench.report.figures import Drawing
    from lmd_bench.report.page import write_page

    results = load_results(folder, suite)
    rows = row_results(suite, results)
    source = origin(suite, results, command)
    target = folder / "report"
    tables = make_tables(suite, results, rows)
    try:
        target.mkdir(parents=True, exist_ok=True)
        paths = _write_tables(tables, target, source)
        figures = Drawing(suite, results, rows, target, source.lines).draw()
        page = write_page(target / "index.html", suite, results, rows, tables, figures, source)
    except OSError as error:
        raise RecordError(f"{target}: the report cannot be written: {error}") from error
    drawn = [path for figure in figures for path in (figure.png, figure.csv)]
    _remove_left_over(target, {*paths, *drawn})
    return Report(
        suite, target, page, (page, *paths, *drawn), tuple(results.problems), source.warnings, tuple(tables), rows
    )


_OWN_FILES = (
    "table[1-5].*", "fine-tuning*", "ttq.*", "image-quality.*", "factors.*", "estimators.*", "details.*",
    "evaluators.*", "step-cost*", "inference*",
    "loss-curves.*", "mask-schedules.*", "yardstick.*", "reconstructions.*", "samples.*", "phases.*",
    "profile-phases*", "figure6-*",
)  # fmt: skip
"""Every table and figure that a report can have."""


def _remove_left_over(folder: Path, written: set[Path]) -> None:
    """What an earlier report left and this one has not, such as a table that the suite no longer has, is gone."""
    for pattern in _OWN_FILES:
        for path in set(folder.glob(pattern)) - written:
            path.unlink()


def make_tables(suite: Suite, results: Results, rows: dict[str, RowResult]) -> list[Table]:
    """The tables in the order of the page. Where only speed was measured, those of training are left out."""
    only_speed = not any(found.runs for found in rows.values()) and bool(results.profiles or results.inferences)
    tables: list[Table] = []
    if not only_speed:
        for name in suite.tables:
            four = name == "table4"
            tables.append(table4(suite, rows, results.bounds) if four else published_table(name, suite, rows))
        if has_finetuning(rows):
            tables.append(finetune_table(suite, rows))
        if suite.evaluation.num_checks > 0 or any(yardsticks(found) for found in rows.values()):
            tables.append(quality_table(suite, rows))
        if has_image_quality(rows, results.bounds):
            tables.append(image_quality_table(suite, rows, results.bounds))
    if any(row.base for row in suite.methods.values()) and (results.profiles or not only_speed):
        tables.append(factors_table(suite, rows, results.profiles))
    if not only_speed:
        tables += [estimators_table(suite, rows), details_table(suite, rows)]
        if any(quality.evaluators for quality in all_qualities(rows, results.bounds)):
            tables.append(evaluators_table(suite, rows, results.bounds))
    for profile in results.profiles:
        tables.append(step_cost_table(profile.record, suite.estimator.confidence, f"step-cost{profile.tag}"))
    for inference in results.inferences:
        tables.append(inference_table(inference.record, suite.estimator.confidence, f"inference{inference.tag}"))
    return tables


def _write_tables(tables: Sequence[Table], folder: Path, source: Origin) -> list[Path]:
    paths = []
    for table in tables:
        for ending, text in (("md", to_markdown(table, source.lines)), ("csv", to_csv(table, source.lines))):
            path = folder / f"{table.stem}.{ending}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths
