"""Records on disk: complete or not there, read back equal, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmd_bench.errors import RecordError
from lmd_bench.records import (
    SCHEMA,
    STEP_COLUMNS,
    RunRecord,
    StepWriter,
    Timing,
    cell_folder,
    find_runs,
    read_run,
    read_steps,
    write_json,
)


def record() -> RunRecord:
    return RunRecord(
        suite="demo",
        row="mae",
        label="MAE",
        method="mae",
        seed=0,
        status="finished",
        config={"steps": 3},
        config_hash="abc",
        command="lmd-bench run",
        started_at="2024-01-01T00:00:00+00:00",
        environment={},
        num_steps=3,
        timing=Timing(
            train_s=1 / 3,
            pauses_s={"log": 0.1},
            wall_s=0.5,
            residual_share=0.1,
            valid=False,
            untimed_s=0.0,
            compile_s=None,
            instrument_us_per_step=12.5,
        ),
    )


def test_a_record_reads_back_equal_and_names_its_schema(tmp_path: Path) -> None:
    path = cell_folder(tmp_path, "demo", "mae", 0) / "record.json"
    write_json(path, record())
    assert read_run(path) == record()
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert find_runs(tmp_path) == [path]
    assert not list(path.parent.glob("*.tmp")), "the temporary file stays behind"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable record"),
        ("[]", "a record of schema None"),
        (json.dumps({"schema": 99}), "a record of schema 99, this version reads schema 1"),
        (json.dumps({"schema": SCHEMA, "suite": "demo"}), "damaged record: row"),
        (json.dumps({**record().model_dump(by_alias=True), "num_steps": "many"}), "damaged record: num_steps"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_its_path(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_run(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_record_never_holds_a_number_that_json_has_no_word_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "record.json", record().model_copy(update={"config": {"loss": float("nan")}}))
    assert not (tmp_path / "record.json").exists()


def test_steps_are_on_disk_when_append_returns_and_floats_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    writer = StepWriter(path)
    rows = [(1, 1, 0.1 + 0.2, None, None, 1e-3, 1 / 3, *[2 / 7] * 5), (2, 1, 1e-300, 0.75, 4, 0.0, 5.0, *[1.0] * 5)]
    writer.append(rows)
    columns = read_steps(path)  # before the writer is closed
    writer.close()
    for number, row in enumerate(rows):
        assert tuple(columns[name][number] for name in STEP_COLUMNS) == row


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    writer = StepWriter(path)
    writer.append([(step, 1, 1.0, None, None, 0.1, 1.0, *[0.2] * 5) for step in (1, 2, 3)])
    writer.close()
    text = path.read_text()
    path.write_text(text[: len(text) - 12])
    assert read_steps(path)["step"] == [1, 2]


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(RecordError, match="columns"):
        read_steps(path)
