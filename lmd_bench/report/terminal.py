"""The end of a run on a terminal: the report's main figures in tables of plain strings."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure, Missing, ratio
from lmd_bench.metrics.quality import NO_INCREASE
from lmd_bench.records import CACHED_LATENTS
from lmd_bench.report.cells import Table, number, percent, span
from lmd_bench.report.finetune import has_finetuning
from lmd_bench.report.image_quality import TABLE4, Measured
from lmd_bench.report.inference import terminal_inference
from lmd_bench.report.quality import has_own_mask, yardsticks
from lmd_bench.report.rows import RowResult

if TYPE_CHECKING:
    from lmd_bench.report.build import Report


class TerminalTable(NamedTuple):
    """A small table as plain strings, for `cli` to print."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def terminal_tables(report: Report) -> list[TerminalTable]:
    """The report's main figures, narrow enough for a terminal: runs, what they are worth, and each other record."""
    tables = [_terminal_runs(report)] if any(found.runs for found in report.rows.values()) else []
    tables += [table for table in [_terminal_worth(report)] if table is not None]
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


def _terminal_worth(report: Report) -> TerminalTable | None:
    """Accuracy after fine-tuning and image quality; None where nothing of either was measured."""
    measured = [found for found in report.rows.values() if found.runs]
    tuned = has_finetuning(report.rows)
    quality = Measured(report.suite, report.rows, None, TABLE4)
    if not tuned and not quality.of_rows:
        return None
    columns = ["Method"]
    if tuned:
        columns += ["Top-1, %", "MAT@1, s per point", "Linear, %", "k-NN, %"]
    if quality.of_rows:
        columns += [shown.title_of(key) for shown, key in quality.keys]
    rows = [
        (
            found.label,
            *(_tuned_texts(found) if tuned else ()),
            *(_quality_texts(quality, found) if quality.of_rows else ()),
        )
        for found in measured
    ]
    return TerminalTable("Fine-tuning and image quality", tuple(columns), tuple(rows))


def _tuned_texts(found: RowResult) -> tuple[str, ...]:
    mat = found.seed_figure(lambda run: found.mat(run, 1))
    best = [max(check.top1 for check in one.checks) for one in found.finetunes if one.checks]
    if isinstance(mat, Missing):
        rise = NO_INCREASE if mat.reason.startswith(NO_INCREASE) else "-"
    else:
        rise = number(mat.value)
    return (f"{fmean(best):.1f}" if best else "-", rise, *(_probe_text(found, name) for name in ("linear", "knn")))


def _probe_text(found: RowResult, name: str) -> str:
    values = [probe.top1 for run in found.finished for probe in run.record.probes if probe.name == name]
    return f"{fmean(values):.1f}" if values else "-"


def _quality_texts(quality: Measured, found: RowResult) -> tuple[str, ...]:
    texts = []
    for shown, key in quality.keys:
        values = [one.values[key] for one in found.image_qualities if key in one.values]
        why = quality.not_ranked(found, shown, key)
        texts.append(f"{shown.text(fmean(values))}{f' ({why})' if why else ''}" if values else "-")
    return tuple(texts)


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
    nothing = "no decrease" if found.efficiencies else "not measured"
    return (
        found.label,
        _terminal_figure(found, lambda e: e.mit_ms, 1.0, interval=False) or _whole_run(found),
        _terminal_figure(found, lambda e: e.headline.mli, 1.0, interval=False) or nothing,
        _terminal_figure(found, lambda e: e.headline.mlt_ms, 1e-3) or nothing,
        _terminal_ratio(found, reference),
        _terminal_projector(found),
        _terminal_psnr(found),
        "; ".join(found.marks).replace("still falling: ", "") or ("comes trained" if found.comes_trained else "none"),
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
