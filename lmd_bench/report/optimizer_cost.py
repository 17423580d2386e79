"""The table "optimizer cost": steps of optimizers alone, over the tensors of one model."""

from __future__ import annotations

import statistics
from typing import Final

from lmd_bench.metrics.intervals import Missing, ratio_of_rounds
from lmd_bench.records import OptimizerCostRecord, OptimizerCostRound
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, missing, number, percent, plain, span
from lmd_bench.report.row_cells import ratio_lines
from lmd_bench.report.step_cost import median_of_rounds

REFERENCES: Final = ("AdamW loop", "AdamW foreach", "AdamW fused")
"""Optimizers that the others are compared with."""


def optimizer_cost_table(record: OptimizerCostRecord, confidence: float = 0.95) -> Table:
    """Every optimizer's step with its interval, and paired ratios to three forms of AdamW."""
    rounds: dict[str, list[OptimizerCostRound]] = {}
    for part in sorted(record.rounds, key=lambda part: part.round):
        rounds.setdefault(part.optimizer, []).append(part)
    rows = [_row(name, rounds, confidence) for name in rounds]
    rows += [
        (Cell((name,), "label", {"optimizer": name}), *[missing(f"not measured: {plain(reason)}")] * (_WIDTH - 1))
        for name, reason in record.not_measured.items()
        if name not in rounds
    ]
    threads = (record.environment.get("switches") or {}).get("threads")
    notes = (
        f"{record.num_tensors} tensors of {record.model}, {record.num_parameters / 1e6:.1f} M parameters, float32"
        + (f", {threads} threads" if threads else "")
        + ". Interleaved rounds, every optimizer of a round in a fresh process.",
        "Step: median over rounds of the round's median. Ratios: Student's t on the logs of ratios within a round.",
        f"First step: memory touched for the first time and compilation, if any; {record.untimed_steps} steps of each "
        "process are not timed.",
    )
    title = f"Optimizer cost: {record.model}, {record.num_parameters / 1e6:.1f} M parameters"
    return Table("optimizer-cost", title, _COLUMNS, (Section(None, tuple(rows)),), notes)


def _key(reference: str) -> str:
    return reference.lower().replace(" ", "_")


def _ratio_parts(reference: str) -> tuple[str, ...]:
    return tuple(f"{_key(reference)}_{part}" for part in ("ratio", "ratio_low", "ratio_high", "verdict"))


_COLUMNS: Final = (
    Column("Optimizer", ("optimizer", "num_rounds")),
    Column("Step", ("step_ms", "step_ms_low", "step_ms_high", "step_ms_coverage"), "ms"),
    *(Column(name, _ratio_parts(name), None, "Ratio to") for name in REFERENCES),
    Column("First step", ("first_step_ms",), "ms"),
    Column("Graphs", ("compiled_graphs",), "compiled"),
    Column("Peak memory", ("peak_memory_mib",), "MiB"),
)
_WIDTH: Final = len(_COLUMNS)


def _row(name: str, rounds: dict[str, list[OptimizerCostRound]], confidence: float) -> tuple[Cell, ...]:
    parts = rounds[name]
    peaks = [part.peak_memory_bytes / 2**20 for part in parts if part.peak_memory_bytes is not None]
    firsts = [part.untimed_ms[0] for part in parts if part.untimed_ms]
    return (
        Cell((name, f"{len(parts)} rounds"), "label", {"optimizer": name, "num_rounds": len(parts)}),
        _step(parts, confidence),
        *(_ratio(parts, rounds.get(other, []), other, confidence) for other in REFERENCES),
        _plain("first_step_ms", statistics.median(firsts) if firsts else None, "all steps were timed"),
        _plain("compiled_graphs", max(part.compiled_graphs for part in parts)),
        _plain("peak_memory_mib", max(peaks) if peaks else None, "this system cannot tell"),
    )


def _plain(name: str, value: Number | None, why: str = "") -> Cell:
    return missing(f"not measured: {why}") if value is None else Cell((number(value),), "value", {name: value})


def _step(parts: list[OptimizerCostRound], confidence: float) -> Cell:
    median = median_of_rounds([statistics.median(part.step_ms) for part in parts])
    values: dict[str, Number | str] = {"step_ms": median.value, "step_ms_coverage": median.coverage}
    if median.coverage == 0:
        why = "no interval: one round"
        return Cell((number(median.value), why), "value", values | {"step_ms_low": why, "step_ms_high": why})
    lines = [number(median.value), span(median.value, median.low, median.high)]
    if median.coverage < confidence:
        lines.append(f"range, covers {percent(median.coverage)}")
    return Cell(tuple(lines), "value", values | {"step_ms_low": median.low, "step_ms_high": median.high})


def _ratio(parts: list[OptimizerCostRound], base_parts: list[OptimizerCostRound], name: str, confidence: float) -> Cell:
    if parts is base_parts:
        return Cell(("reference",), "label")
    base = {part.round: statistics.median(part.step_ms) for part in base_parts}
    pairs = [(statistics.median(part.step_ms), base[part.round]) for part in parts if part.round in base]
    if not pairs:
        return missing(f"not measured: no round has both ({name})")
    against = ratio_of_rounds([mine for mine, _ in pairs], [other for _, other in pairs], confidence)
    if isinstance(against, Missing):
        value = statistics.median(mine / other for mine, other in pairs)
        reasons: dict[str, Number | str] = dict.fromkeys(_ratio_parts(name), against.reason)
        return Cell((number(value), against.reason), "value", reasons | {f"{_key(name)}_ratio": value})
    lines, values = ratio_lines(against, name, _key(name))
    return Cell((number(against.value), *lines[1:]), "value", values)
