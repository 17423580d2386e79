"""The inference table: seconds of an image, paired ratios, the projector's share, and reasons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lmd_bench.config import Suite
from lmd_bench.records import InferenceRecord, InferenceRound, InferenceRow, NotMeasured, write_json
from lmd_bench.report import build_report, terminal_tables
from lmd_bench.report.cells import Cell, Table
from lmd_bench.report.inference import inference_table
from tests.report.conftest import ENVIRONMENT

ALL_LEVELS = "reconstruct, all levels, random"
# Row, task -> milliseconds of an image at batch 1, function evaluations
COSTS: dict[tuple[str, str], tuple[float, int]] = {
    ("lmd-cs", "reconstruct"): (20.0, 1),
    ("lmd-cs", ALL_LEVELS): (80.0, 12),
    ("lmd-cs", "sample"): (60.0, 10),
    ("mae", "reconstruct"): (40.0, 1),
    ("ddpm", "reconstruct"): (400.0, 50),
    ("ddpm", "sample"): (300.0, 50),
}
LABELS = {"lmd-cs": "LMD-CS", "mae": "MAE", "ddpm": "DDPM"}


def make_record(suite: Suite, rounds: int = 6, **changes: Any) -> InferenceRecord:
    """Rounds that differ by 10 % as wholes and by 1 % within; ddpm runs out of memory at batch 64."""
    parts = []
    for number in range(rounds):
        for (row, task), (ms, evaluations) in COSTS.items():
            for size, gain in ((1, 1.0), (64, 0.5)):
                if (row, size) == ("ddpm", 64):
                    continue
                call = ms * size * gain * (1 + 0.1 * number) * (1 + 0.01 * math.sin(number * 7 + len(row)))
                latent = row == "lmd-cs"
                parts.append(
                    InferenceRound(
                        round=number,
                        row=row,
                        task=task,
                        batch_size=size,
                        calls_ms=[0.9 * call, 1.1 * call],
                        encode_ms=0.3 * 20 * size * gain if latent else None,
                        decode_ms=0.1 * 20 * size * gain if latent else None,
                        function_evaluations=evaluations,
                        peak_memory_bytes=size * 2**20,
                    )
                )
    values: dict[str, Any] = {
        "suite": suite.name,
        "command": "lmd-bench inference",
        "started_at": "2026-01-02T03:04:05+00:00",
        "environment": dict(ENVIRONMENT),
        "reference": "mae",
        "precision": "fp32",
        "batch_sizes": [1, 64],
        "unit_px": 16,
        "keep": 0.25,
        "peak_memory_kind": "resident set of the process",
        "rows": {
            row: InferenceRow(
                label=label, method=row, parameters=1000, image_size=64, projector="kl" if row == "lmd-cs" else None
            )
            for row, label in LABELS.items()
        },
        "rounds": parts,
        "not_measured": [
            NotMeasured(row="mae", task="sample", batch_size=1, reason="MAE does not generate images"),
            NotMeasured(row="mae", task="sample", batch_size=64, reason="MAE does not generate images"),
            NotMeasured(row="ddpm", task=None, batch_size=64, reason="the process ended with code -9"),
            NotMeasured(row="simmim", task=None, batch_size=None, reason="left to another suite"),
        ],
        **changes,
    }
    return InferenceRecord.model_validate(values)


def cells_of(table: Table, row: str, task: str) -> dict[str, Cell]:
    cells = next(
        cells for cells in table.rows if (cells[0].parts["row"], cells[0].parts["task"]) == (row, task)
    )  # fmt: skip
    return {column.csv[0]: cell for column, cell in zip(table.columns, cells, strict=True)}


def test_seconds_of_an_image_stand_by_batch_size(suite: Suite) -> None:
    table = inference_table(make_record(suite), 0.95)
    cells = cells_of(table, "lmd-cs", "reconstruct")
    seconds = [cells[f"s_per_image_b{size}"].parts[f"s_per_image_b{size}"] for size in (1, 64)]
    assert seconds == [pytest.approx(0.020 * 1.25, rel=0.02), pytest.approx(0.010 * 1.25, rel=0.02)]
    assert [section.heading for section in table.sections] == [
        "Reconstruction, as each row is configured",
        "Reconstruction, all levels, random",
        "Sampling",
    ]
    assert cells["function_evaluations"].lines == ("1",)
    assert cells_of(table, "lmd-cs", ALL_LEVELS)["function_evaluations"].lines == ("12",)
    assert cells["peak_memory_mib_b64"].parts["peak_memory_mib_b64"] == 64


def test_ratios_are_taken_within_rounds_and_carry_a_verdict(suite: Suite) -> None:
    table = inference_table(make_record(suite), 0.95)
    parts = cells_of(table, "lmd-cs", "reconstruct")["reference_b1_ratio"].parts
    assert parts["reference_b1_ratio"] == pytest.approx(0.5, rel=0.02)
    assert parts["reference_b1_verdict"] == "faster"
    low, high = parts["reference_b1_ratio_low"], parts["reference_b1_ratio_high"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert high / low < 1.05  # rounds differ by 50 %
    assert cells_of(table, "mae", "reconstruct")["reference_b1_ratio"].lines == ("reference",)
    levels = cells_of(table, "lmd-cs", ALL_LEVELS)["reference_b1_ratio"]
    assert levels.parts["reference_b1_ratio"] == pytest.approx(2.0, rel=0.02)
    sampling = cells_of(table, "ddpm", "sample")["reference_b1_ratio"]
    assert sampling.text == "no ratio: mae: not measured: MAE does not generate images"


def test_the_projectors_share_is_both_ways_for_reconstruction_and_decoding_for_samples(suite: Suite) -> None:
    table = inference_table(make_record(suite, rounds=1), 0.95)
    name = "projector_share_b1"
    assert cells_of(table, "lmd-cs", "reconstruct")[name].parts[name] == pytest.approx(0.4, rel=0.02)
    assert cells_of(table, "lmd-cs", "sample")[name].parts[name] == pytest.approx(2 / 60, rel=0.02)
    assert cells_of(table, "mae", "reconstruct")[name].lines == ("none",)


def test_what_cannot_be_done_says_why(suite: Suite) -> None:
    table = inference_table(make_record(suite), 0.95)
    assert cells_of(table, "mae", "sample")["s_per_image_b64"].text == "not measured: MAE does not generate images"
    assert cells_of(table, "ddpm", "sample")["s_per_image_b64"].text == "not measured: the process ended with code -9"
    listed_only = cells_of(table, "simmim", "reconstruct")
    assert {cell.text for name, cell in listed_only.items() if name != "row"} == {"not measured: left to another suite"}
    assert len(table.sections[1].rows) == 1  # only rows that have levels


def test_one_round_gives_values_without_intervals(suite: Suite) -> None:
    cells = cells_of(inference_table(make_record(suite, rounds=1), 0.95), "lmd-cs", "reconstruct")
    assert cells["s_per_image_b1"].lines[1] == "no interval: one round"
    assert cells["reference_b1_ratio"].lines[1] == "a ratio needs 3 rounds, there are 1"


def test_without_a_reference_the_ratios_say_so(suite: Suite) -> None:
    cells = cells_of(inference_table(make_record(suite, reference=None), 0.95), "mae", "reconstruct")
    assert cells["reference_b1_ratio"].text == "not measured: no reference row was measured"


def test_an_inference_record_alone_makes_a_report_with_its_table(tmp_path: Path, suite: Suite) -> None:
    folder = tmp_path / suite.name
    write_json(folder / "inference-fp32.json", make_record(suite))
    report = build_report(folder, suite, command="lmd-bench report")
    assert report.problems == ()
    assert {"inference.md", "inference.csv"} <= {path.name for path in report.paths}
    page = report.page.read_text()
    assert "Inference: batch 1 and 64, fp32" in page
    assert "MAE does not generate images" in page
    (terminal,) = [table for table in terminal_tables(report) if table.title.startswith("Inference")]
    assert len({len(row) for row in terminal.rows} | {len(terminal.columns)}) == 1
    write_json(folder / "inference-fp32-2.json", make_record(suite))
    again = {path.name for path in build_report(folder, suite, command="lmd-bench report").paths}
    assert {"inference-fp32.md", "inference-fp32-2.md"} <= again
    assert not (folder / "report" / "inference.md").exists()
