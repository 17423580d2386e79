"""Plans: which finished cells count as the experiment that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.captioned import shard_folder
from helpers.official import CASES

from lmd_bench.errors import ConfigError
from lmd_bench.harness.plan import Cell, Plan
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.projector.config import ProjectorConfig, weights_digest
from lmd_bench.records import RunRecord, write_json
from tests.harness.test_cached_run import planned, suite_values
from tests.projector.test_projector import tiny_autoencoder


def finish(cell: Cell) -> None:
    """The record that a cell leaves when it has run."""
    config = cell.config
    record = RunRecord(
        suite=config.suite, row=config.row, label=config.label, method=config.method, seed=config.seed,
        status="finished", config=config.model_dump(mode="json"), config_hash=config.digest(), command="c",
        started_at="now", environment={}, num_steps=config.steps,
    )  # fmt: skip
    write_json(cell.folder / "record.json", record)


def plan_plain(weights: Path, out: Path) -> Plan:
    values = suite_values(weights)
    values["methods"] = {"plain": values["methods"]["plain"]}
    return planned(values, out)


def test_a_finished_cell_is_another_experiment_once_its_projectors_weights_have_changed(tmp_path: Path) -> None:
    weights, out = tmp_path / "autoencoder", tmp_path / "out"
    tiny_autoencoder().save_pretrained(weights)
    finish(plan_plain(weights, out).cells[0])
    assert [cell.config.row for cell in plan_plain(weights, out).finished] == ["plain"]
    tiny_autoencoder(seed=1).save_pretrained(weights)
    words = (
        r"finished with other settings \(contents of the files that the options name, such as the projector's weights: "
        r"digest '[0-9a-f]{16}', now '[0-9a-f]{16}'\): choose another --out, or --force"
    )
    with pytest.raises(ConfigError, match=words):
        plan_plain(weights, out)


def test_a_method_that_cannot_be_compiled_is_refused_before_anything_runs(tmp_path: Path) -> None:
    values = suite_values(tmp_path)
    values["methods"] = {
        "green": {"method": "greenmim", "label": "GreenMIM", "recipe": "flips", "options": CASES["greenmim"].options}
    }
    values["data"]["image_size"] = 64
    assert len(planned(values, tmp_path / "out").cells) == 1
    with pytest.raises(
        ConfigError,
        match=r"^--compile: row green cannot be compiled: each mask packs visible tokens into groups of other numbers "
        r"and sizes; leave out --compile or the row$",
    ):
        planned({**values, "compile": True}, tmp_path / "out")


def test_the_inputs_of_a_row_are_its_projectors_weights_and_pixels_have_none() -> None:
    projector = ProjectorConfig(kind="kl", path="shipped:scenes-kl-f8")
    assert LMD.inputs_digest(LMDConfig(projector=projector)) == weights_digest(projector)
    assert LMD.inputs_digest(LMDConfig(projector=ProjectorConfig(kind="pixels"))) is None


def test_shards_of_a_test_split_are_passed_over_with_a_note(tmp_path: Path) -> None:
    data = shard_folder(tmp_path / "data", 48)
    (data / "00000.tar").rename(data / "train-0.tar")
    (data / "00001.tar").rename(data / "test-0.tar")
    values = suite_values(tmp_path)
    values["methods"] = {
        "green": {"method": "greenmim", "label": "GreenMIM", "recipe": "flips", "options": CASES["greenmim"].options}
    }
    values["data"] = {"name": "folder", "path": str(data), "image_size": 64, "num_held_out": 4}
    notes = planned(values, tmp_path / "out").notes
    assert f"--data {data}: 1 shard of a test split passed over: test-0.tar" in notes
