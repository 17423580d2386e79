"""The step-cost table: medians of rounds, paired ratios, the instrument's share."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from lmd_bench.config import Suite
from lmd_bench.metrics.intervals import ratio_of_rounds
from lmd_bench.records import CALIBRATOR
from lmd_bench.report.cells import Cell, Table, number
from lmd_bench.report.step_cost import median_of_rounds, step_cost_table
from tests.report.conftest import make_profile


def cells_of(table: Table, name: str) -> dict[str, Cell]:
    cells = next(cells for cells in table.rows if cells[0].parts["row"] == name)
    return {column.csv[0]: cell for column, cell in zip(table.columns, cells, strict=True)}


def test_medians_lie_between_the_order_statistics_that_cover_them() -> None:
    six = median_of_rounds([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (six.value, six.low, six.high) == (3.5, 1.0, 6.0)
    assert six.coverage == pytest.approx(1 - 2 / 64)
    nine = median_of_rounds([float(i) for i in range(1, 10)])
    assert (nine.low, nine.high) == (2.0, 8.0)  # 1 - 2 (1 + 9) / 512 = 0.961; one further in covers 0.820
    assert nine.coverage == pytest.approx(1 - 20 / 512)
    assert median_of_rounds([7.0]).coverage == 0


def test_steps_ratios_and_costs_are_those_of_the_rounds(suite: Suite) -> None:
    record = make_profile(suite)
    table = step_cost_table(record, 0.95)
    periods = {
        name: [statistics.fmean(r.period_ms) for r in record.rounds if r.row == name]
        for name in ("lmd-cs", "mae", CALIBRATOR)
    }
    cells = cells_of(table, "lmd-cs")
    median = statistics.median(periods["lmd-cs"])
    against: Any = ratio_of_rounds(periods["lmd-cs"], periods["mae"])
    calibrated: Any = ratio_of_rounds(periods["lmd-cs"], periods[CALIBRATOR])
    assert cells["step_ms"].parts["step_ms"] == pytest.approx(median)
    assert cells["reference_ratio"].lines == (
        number(against.value), f"[{against.low:.3f}, {against.high:.3f}]", "faster"
    )  # fmt: skip
    assert cells["calibrator_ratio"].parts["calibrator_ratio"] == calibrated.value
    assert cells["gflop_per_s"].parts["gflop_per_s"] == pytest.approx(12.0 / median * 1e3)
    assert cells["instrument_share"].parts["instrument_share"] == pytest.approx(0.031 / median)
    assert cells_of(table, "mae")["reference_ratio"].lines == ("reference",)
    bare = cells["bare_ms"].parts["bare_ms"]
    assert isinstance(bare, float)
    assert bare < median


def test_pairing_by_round_cancels_what_slows_a_whole_round(suite: Suite) -> None:
    table = step_cost_table(make_profile(suite), 0.95)
    parts = cells_of(table, "lmd-cs")["reference_ratio"].parts
    low, high = parts["reference_ratio_low"], parts["reference_ratio_high"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert high / low < 1.05  # rounds differ by 10 %


def test_the_instruments_limit_is_checked_on_the_smallest_step(suite: Suite) -> None:
    cheap, dear = (step_cost_table(make_profile(suite, instrument_us_per_step=us), 0.95) for us in (31.0, 500.0))
    assert any("0.09 % of the smallest step (LMD-CS): within the limit of 0.30 %" in note for note in cheap.notes)
    assert any("ABOVE the limit" in note for note in dear.notes)
    assert cells_of(cheap, "mae")["marks_ratio"].lines[2].startswith("holds 1.000")
    assert cells_of(dear, "lmd-cs")["marks_ratio"].lines[2].startswith("misses 1.01")


def test_rows_that_could_not_be_profiled_say_why(suite: Suite) -> None:
    record = make_profile(suite, not_measured={"my-row": "out of memory"})
    table = step_cost_table(record, 0.95)
    cells = cells_of(table, "my-row")
    assert {cell.text for name, cell in cells.items() if name != "row"} == {"not measured: out of memory"}


def test_few_rounds_give_values_without_intervals(suite: Suite) -> None:
    one = cells_of(step_cost_table(make_profile(suite, rounds=1), 0.95), "lmd-cs")
    assert one["step_ms"].lines[1] == "no interval: one round"
    assert one["reference_ratio"].lines[1] == "a ratio needs 3 rounds, there are 1"
    three = cells_of(step_cost_table(make_profile(suite, rounds=3), 0.95), "lmd-cs")
    assert three["step_ms"].lines[2] == "range, covers 75.0 %"


def test_without_reference_or_calibrator_the_ratios_say_so(suite: Suite) -> None:
    record = make_profile(suite, reference=None)
    rows = {name: about for name, about in record.rows.items() if name != CALIBRATOR}
    rounds = [part for part in record.rounds if part.row != CALIBRATOR]
    table = step_cost_table(record.model_copy(update={"rows": rows, "rounds": rounds}), 0.95)
    cells = cells_of(table, "mae")
    assert cells["reference_ratio"].lines == ("not measured: no reference row was profiled",)
    assert cells["calibrator_bare_ratio"].lines == ("not measured: the calibrator was not profiled",)


def test_the_table_says_how_freed_host_memory_was_handled(suite: Suite) -> None:
    record = make_profile(suite)
    record.environment["host_memory"] = "glibc, keeping freed memory"
    assert "Freed host memory: glibc, keeping freed memory." in step_cost_table(record, 0.95).notes


def test_the_table_says_that_a_data_workers_work_is_within_the_step(suite: Suite) -> None:
    note = next(note for note in step_cost_table(make_profile(suite), 0.95).notes if "Method.collate" in note)
    assert "made within the step here: in the phase data, and so in the share of the stall" in note


def test_parameters_are_the_methods_own_and_those_of_a_frozen_projector_stand_apart(suite: Suite) -> None:
    table = step_cost_table(make_profile(suite), 0.95)
    with_projector, without = (cells_of(table, name)["parameters_m"] for name in ("lmd-cs", "mae"))
    assert with_projector.lines == ("2.60", "+ 1.40 frozen projector")
    assert dict(with_projector.parts) == {"parameters_m": 2.6, "projector_parameters_m": 1.4}
    assert without.lines == ("2.60",)
    assert without.parts["projector_parameters_m"] == 0
