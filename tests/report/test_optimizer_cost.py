"""The optimizer-cost table: medians, ratios within rounds, reasons."""

from __future__ import annotations

import pytest

from lmd_bench.records import OptimizerCostRecord, OptimizerCostRound
from lmd_bench.report.cells import Cell, Table, to_markdown
from lmd_bench.report.optimizer_cost import optimizer_cost_table

STEPS_MS = {"AdamW loop": 150.0, "AdamW fused": 55.0, "Adan compiled": 100.0}


def record(rounds: int) -> OptimizerCostRecord:
    parts = [
        OptimizerCostRound(
            round=number,
            optimizer=name,
            step_ms=[ms * (1 + 0.1 * number) * jitter for jitter in (0.99, 1.0, 1.5)],
            untimed_ms=[9 * ms, ms],
            compiled_graphs=int(name == "Adan compiled"),
            peak_memory_bytes=2**30,
        )
        for number in range(rounds)
        for name, ms in STEPS_MS.items()
    ]
    return OptimizerCostRecord(
        command="lmd-bench profile-optimizers", started_at="now", environment={"switches": {"threads": 2}},
        model="latent-vit-b4", num_tensors=252, num_parameters=110_753_856, untimed_steps=2, rounds=parts,
        not_measured={"AdamW foreach": "out of memory"},
    )  # fmt: skip


def cells_of(table: Table, name: str) -> dict[str, Cell]:
    cells = next(cells for cells in table.rows if cells[0].parts["optimizer"] == name)
    return {column.csv[0]: cell for column, cell in zip(table.columns, cells, strict=True)}


def test_steps_and_ratios_are_those_of_the_rounds() -> None:
    table = optimizer_cost_table(record(5))
    cells = cells_of(table, "Adan compiled")
    assert cells["step_ms"].parts["step_ms"] == pytest.approx(120)  # the middle round's median
    ratio = cells["adamw_fused_ratio"].parts
    assert ratio["adamw_fused_ratio"] == pytest.approx(100 / 55)
    assert ratio["adamw_fused_verdict"] == "slower"
    assert cells["adamw_loop_ratio"].lines[-1] == "faster"
    assert cells["first_step_ms"].parts["first_step_ms"] == 900
    assert cells["compiled_graphs"].lines == ("1",)
    assert cells_of(table, "AdamW fused")["adamw_fused_ratio"].lines == ("reference",)
    assert "110.8 M parameters, float32, 2 threads" in to_markdown(table, [])


def test_what_was_not_measured_says_why_in_every_cell() -> None:
    table = optimizer_cost_table(record(5))
    missed = cells_of(table, "AdamW foreach")
    assert {cell.text for name, cell in missed.items() if name != "optimizer"} == {"not measured: out of memory"}
    assert "no round has both" in cells_of(table, "Adan compiled")["adamw_foreach_ratio"].text


def test_few_rounds_give_values_without_intervals() -> None:
    cells = cells_of(optimizer_cost_table(record(1)), "Adan compiled")
    assert cells["step_ms"].lines[1] == "no interval: one round"
    assert cells["adamw_fused_ratio"].lines[1] == "a ratio needs 3 rounds, there are 1"
