"""Tables of this project alone: what stands behind MIT, and the four ways to count a valid decrease."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import ESTIMATORS, Estimator, RunEfficiency
from lmd_bench.metrics.intervals import Figure, Missing
from lmd_bench.report.cells import Cell, Column, Section, Table, missing, number
from lmd_bench.report.row_cells import NAME_COLUMN, figure_lines, name_cell, range_text, share_cell, shares_cell
from lmd_bench.report.rows import RowResult

Rows = Mapping[str, RowResult]


def details_table(suite: Suite, rows: Rows) -> Table:
    """What stands behind MIT: its variants, the shares of the step, memory, operations, and the instrument."""
    variants: tuple[tuple[str, str, Callable[[RunEfficiency], Figure]], ...] = (
        ("to t90", "mit", lambda e: e.mit_ms),
        ("whole run", "mit_whole", lambda e: e.mit_whole_ms),
        ("trimmed 5 %", "mit_trimmed", lambda e: e.mit_trimmed_ms),
        ("median", "mit_median", lambda e: e.mit_median_ms),
        ("95th percentile", "mit_p95", lambda e: e.mit_p95_ms),
        ("last quarter", "mit_last_quarter", lambda e: e.mit_last_quarter_ms),
    )
    columns = [NAME_COLUMN]
    columns += [Column(title, (f"{k}_ms", f"{k}_ms_low", f"{k}_ms_high"), "ms", "MIT") for title, k, _ in variants]
    columns += [
        Column("Projector, stall", ("projector_share", "stall_share"), "shares of the step"),
        Column("Instrument", ("instrument_share",), "share of MIT"),
        Column("Unaccounted", ("residual_share",), "share of wall time"),
        Column("Untimed steps", ("untimed_s",), "s"),
        Column("Operations", ("gflop_per_step",), "GFLOP per step"),
        Column("Peak memory", ("peak_memory_mib",), "MiB"),
    ]
    body = []
    for found in rows.values():
        cells = [name_cell(found)]
        for _, key, pick in variants:
            figure = found.figure(pick, key)
            if isinstance(figure, Missing):
                cells.append(missing(figure.reason))
            else:
                lines, parts = figure_lines(figure, f"{key}_ms")
                cells.append(Cell(tuple(lines), "value", parts))
        body.append((*cells, *_cost_cells(found)))
    return Table(
        "details",
        f"Behind the figures: iteration times, shares and costs ({suite.title})",
        tuple(columns),
        (Section(None, tuple(body)),),
        (
            "MIT to t90 is the one with MLT = MIT x MLI; the others are over all measured steps. "
            "Projector and stall: means over all measured steps.",
            "Instrument: cost of marks, buffers and rows of one step, timed in isolation, over MIT of the whole run. "
            "Unaccounted: |wall - training - pauses| / wall; above 0.5 % a run's timing is invalid.",
        ),
    )


def _cost_cells(found: RowResult) -> list[Cell]:
    residual = found.mean(lambda run: run.record.timing.residual_share if run.record.timing else None)
    untimed = found.mean(lambda run: run.record.timing.untimed_s if run.record.timing else None)
    flops = found.mean(lambda run: run.record.cost.flops_per_step if run.record.cost else None)
    memory = found.mean(lambda run: run.record.cost.peak_memory_bytes if run.record.cost else None)
    return [
        shares_cell(found),
        share_cell(found, found.instrument_share, "instrument_share"),
        share_cell(found, residual, "residual_share"),
        _number_cell(found, untimed, "untimed_s", "timing"),
        _number_cell(found, None if flops is None else flops / 1e9, "gflop_per_step", "flops_per_step"),
        _number_cell(found, None if memory is None else memory / 2**20, "peak_memory_mib", "peak_memory_bytes"),
    ]


def _number_cell(found: RowResult, value: float | None, name: str, reason_name: str) -> Cell:
    if found.why_nothing:
        return missing(found.why_nothing)
    if value is None:
        return missing(f"not measured: {found.recorded_reason(reason_name)}")
    return Cell((number(float(value)),), "value", {name: value})


_ESTIMATOR_HEADS: Final[Mapping[Estimator, str]] = {
    "relative": "relative: each {delta:g} % below the last",
    "fraction": "fraction: each 1/{levels} of its own drop",
    "grid": "grid: each {grid_step:g} of loss",
    "slope": "slope: each percent of the first loss",
}


def estimators_table(suite: Suite, rows: Rows) -> Table:
    """MLI and MLT under all four ways of counting a valid decrease."""
    values = suite.estimator
    columns = [NAME_COLUMN]
    for name in ESTIMATORS:
        head = _ESTIMATOR_HEADS[name].format(delta=100 * values.delta, levels=values.levels, grid_step=values.grid_step)
        per = "percent" if name == "slope" else "decrease"
        mli, mlt = f"mli_{name}", f"mlt_{name}_s"
        columns += [
            Column("MLI", (f"n_{name}", mli, f"{mli}_low", f"{mli}_high"), f"iterations per {per}", head),
            Column("MLT", (mlt, f"{mlt}_low", f"{mlt}_high"), f"s per {per}", head),
        ]
    body = tuple(
        (
            name_cell(found),
            *(cell for name in ESTIMATORS for cell in _estimator_cells(found, name)),
        )
        for found in rows.values()
    )
    return Table(
        "estimators",
        f"Four ways to count a valid loss decrease ({suite.title})",
        tuple(columns),
        (Section(None, body),),
        (
            f"The estimator {values.headline!r} heads the tables above. All four are counted in one window, from the "
            "first measured step to t90; MLT = MIT x MLI holds in each. N is the number of decreases in the window.",
        ),
    )


def _estimator_cells(found: RowResult, name: Estimator) -> list[Cell]:
    mli = found.figure(lambda e: e.estimators[name].mli, "mli")
    mlt = found.figure(lambda e: e.estimators[name].mlt_ms, "mlt")
    if isinstance(mli, Missing) or isinstance(mlt, Missing):
        return [missing(figure.reason if isinstance(figure, Missing) else "see MLI") for figure in (mli, mlt)]
    counts = [n for e in found.efficiencies if (n := e.estimators[name].num_decreases) is not None]
    lines, parts = figure_lines(mli, f"mli_{name}")
    time_lines, time_parts = figure_lines(mlt, f"mlt_{name}_s", 1e-3)
    return [
        Cell((*lines, f"N {range_text(counts)}"), "value", {f"n_{name}": sum(counts) / len(counts)} | parts),
        Cell(tuple(time_lines), "value", time_parts),
    ]
