"""From a suite's folder to its report: tables, figures and one page. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lmd_bench.config import Suite
from lmd_bench.errors import RecordError
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure, Missing, ratio
from lmd_bench.records import CACHED_LATENTS
from lmd_bench.report.cells import Table, number, percent, span, to_csv, to_markdown
from lmd_bench.report.details import details_table, estimators_table
from lmd_bench.report.factors import factors_table
from lmd_bench.report.inference import inference_table, terminal_inference
from lmd_bench.report.load import Results, load_results
from lmd_bench.report.origin import Origin, origin
from lmd_bench.report.quality import has_own_mask, quality_table, yardsticks
from lmd_bench.report.rows import RowResult, row_results
from lmd_bench.report.step_cost import step_cost_table
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


class TerminalTable(NamedTuple):
    """A small table as plain strings, for `cli` to print."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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


def _remove_left_over(folder: Path, written: set[Path]) -> None:
    """Tables and figures of speed runs change their names with the number of runs: older ones would contradict."""
    for pattern in ("step-cost*", "profile-phases*", "inference*", "figure6-*"):
        for path in set(folder.glob(pattern)) - written:
            path.unlink()


def make_tables(suite: Suite, results: Results, rows: dict[str, RowResult]) -> list[Table]:
    """The tables in the order of the page. Where only speed was measured, those of training are left out."""
    only_speed = not any(found.runs for found in rows.values()) and bool(results.profiles or results.inferences)
    tables: list[Table] = []
    if not only_speed:
        tables += [published_table(name, suite, rows) for name in suite.tables]
        if suite.evaluation.num_checks > 0 or any(yardsticks(found) for found in rows.values()):
            tables.append(quality_table(suite, rows))
    if any(row.base for row in suite.methods.values()) and (results.profiles or not only_speed):
        tables.append(factors_table(suite, rows, results.profiles))
    if not only_speed:
        tables += [estimators_table(suite, rows), details_table(suite, rows)]
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


# -- the end of a run on a terminal -----------------------------------------------------------------------------------


def terminal_tables(report: Report) -> list[TerminalTable]:
    """The report's main figures, narrow enough for a terminal: one table for runs, one for each other record."""
    tables = [_terminal_runs(report)] if any(found.runs for found in report.rows.values()) else []
    tables += [_terminal_speed(table) for table in report.tables if table.stem.startswith("step-cost")]
    return tables + [_terminal_inference(table) for table in report.tables if table.stem.startswith("inference")]


def _terminal_runs(report: Report) -> TerminalTable:
    suite = report.suite
    reference = report.rows.get(suite.reference or "")
    against = f"MLT / {suite.reference}" if reference else "MLT ratio"
    columns = ("Method", "MIT, ms", "MLI", "MLT, s", against, "Projector", "PSNR, dB", "Marks")
    percentage = f"{100 * suite.estimator.confidence:g} %"
    seeds = max(len(found.finished) for found in report.rows.values())
    kind = {0: "nothing measured", 1: f"{percentage} intervals within one run", 2: "two seeds: means, no intervals"}
    measured = [found for found in report.rows.values() if found.runs]
    rows = tuple(_terminal_row(found, reference) for found in measured)
    return TerminalTable(f"{suite.title} ({kind.get(seeds, f'{percentage} intervals over seeds')})", columns, rows)


_SPEED_COLUMNS = (
    "row", "step_ms", "projector_share", "reference_ratio", "calibrator_ratio", "calibrator_bare_ratio", "marks_ratio"
)  # fmt: skip


def _terminal_speed(table: Table) -> TerminalTable:
    """The columns of a step-cost table that a terminal has room for."""
    places = [next(i for i, column in enumerate(table.columns) if name in column.csv) for name in _SPEED_COLUMNS]
    chosen = [table.columns[i] for i in places]
    heads = tuple(f"{column.group}, {column.title}" if column.group else column.head for column in chosen)
    rows = tuple((row[0].lines[0], *("\n".join(row[i].lines) for i in places[1:])) for row in table.rows)
    return TerminalTable(table.title, heads, rows)


def _terminal_inference(table: Table) -> TerminalTable:
    columns, rows = terminal_inference(table)
    return TerminalTable(table.title, columns, tuple(rows))


def _terminal_row(found: RowResult, reference: RowResult | None) -> tuple[str, ...]:
    if found.why_nothing:
        return (found.label, *["-"] * 6, found.why_nothing)
    return (
        found.label,
        _terminal_figure(found, lambda e: e.mit_ms, 1.0, interval=False) or _whole_run(found),
        _terminal_figure(found, lambda e: e.headline.mli, 1.0, interval=False) or "no decrease",
        _terminal_figure(found, lambda e: e.headline.mlt_ms, 1e-3) or "no decrease",
        _terminal_ratio(found, reference),
        _terminal_projector(found),
        _terminal_psnr(found),
        "; ".join(found.marks).replace("still falling: ", "") or "none",
    )


def _terminal_psnr(found: RowResult) -> str:
    psnrs = [yardstick.checks[-1].psnr_db for yardstick in yardsticks(found)]
    own = " (own mask)" if has_own_mask(found) else ""
    return f"{sum(psnrs) / len(psnrs):.2f}{own}" if psnrs else "not measured"


def _terminal_projector(found: RowResult) -> str:
    if found.latent_cache is not None:
        return CACHED_LATENTS
    share = found.share(lambda phases: phases.projector_share)
    return "none" if not found.has_projector else "not measured" if share is None else percent(share)


def _terminal_figure(
    found: RowResult, pick: Callable[[RunEfficiency], Figure], scale: float, *, interval: bool = True
) -> str | None:
    figure = found.figure(pick, "efficiency")
    if isinstance(figure, Missing):
        return None
    value = figure.value * scale
    if figure.low is None or figure.high is None or not interval:
        return number(value)
    return f"{number(value)} {span(value, figure.low * scale, figure.high * scale)}"


def _whole_run(found: RowResult) -> str:
    whole = found.mit_whole_ms
    return "not measured" if whole is None else f"{number(whole)} (whole run)"


def _terminal_ratio(found: RowResult, reference: RowResult | None) -> str:
    if reference is None:
        return "no reference"
    if reference.row == found.row:
        return "reference"
    figures = [one.figure(lambda e: e.headline.mlt_ms, "mlt") for one in (found, reference)]
    against = ratio(figures[0], figures[1], found.confidence)
    return "no ratio" if isinstance(against, Missing) else f"{number(against.value)} {against.verdict}"
