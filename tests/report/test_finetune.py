"""MAT in Tables 2 and 5, the overall mean, the table of fine-tuning and its figure, from made-up records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Interval, over_seeds, ratio
from lmd_bench.records import TUNED_ELSEWHERE, TUNED_ON_OTHERS, RunRecord
from lmd_bench.report import Report, terminal_tables
from lmd_bench.report.cells import number
from lmd_bench.report.finetune import recipe_text
from tests.report.conftest import (
    FINETUNE_RECIPE,
    SUITE,
    MakeSuite,
    simulated_finetune,
    simulated_probes,
    write_run,
)
from tests.report.test_build import assert_nothing_silent, build, build_tables, row, table
from tests.report.test_image_quality import brightness_spread

NOTHING_TUNED = "the suite fine-tunes nothing"


@pytest.fixture
def tuning(make_suite: MakeSuite) -> Suite:
    """A suite that fine-tunes every row but DDPM."""
    methods = copy.deepcopy(SUITE["methods"])
    for name in methods:
        if name != "ddpm":
            methods[name]["finetune"] = "tune"
    return make_suite(
        tables=["table2", "table5"],
        finetune_recipes={"tune": FINETUNE_RECIPE},
        finetune={"steps": 60},
        methods=methods,
    )


def write_tuned(out: Path, suite: Suite, name: str, seed: int = 0, **changes: Any) -> RunRecord:
    """A finished cell with probes and fine-tuning; `changes` are those of `simulated_finetune`."""
    finetune = simulated_finetune(name, seed, **changes)
    return write_run(out, suite, name, seed, finetune=finetune, probes=simulated_probes(seed))


def overall(record: RunRecord) -> float:
    """Table 5's overall mean by hand."""
    efficiency = RunEfficiency.from_dict(record.efficiency or {})
    figures = (efficiency.mit_ms, efficiency.headline.mlt_ms, efficiency.headline.mli)
    mit, mlt, mli = (figure.value for figure in figures if isinstance(figure, Interval))
    assert record.finetune is not None
    assert record.finetune.mat_at_1 is not None
    assert record.finetune.mat_at_5 is not None
    return (mit / 1e3 + mlt / 1e3 + mli + record.finetune.mat_at_1 + record.finetune.mat_at_5) / 5


# -- Tables 2 and 5 ---------------------------------------------------------------------------------------------------


def test_one_seed_gives_mat_without_an_interval_and_a_ratio_without_a_verdict(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae", gain=40, train_s=2.0)
    write_tuned(tmp_path, tuning, "lmd-cs", gain=40, train_s=1.0)
    report = build_tables(tmp_path, tuning)
    mae, lmd = (row(table(report, "table2"), name) for name in ("MAE", "LMD-CS"))
    assert mae["mat_at_1_s"].lines == ("0.0500", "no interval: one seed", "reference")
    assert mae["mat_at_5_s"].lines[0] == "0.100"
    assert lmd["mat_at_1_s"].lines == ("0.0250", "no interval: one seed", "0.500 × mae", "no interval")
    assert lmd["published_mat_at_1"].lines == ("0.135", "0.361 × MAE")
    assert lmd["row"].lines[1:] == ("lmd-cs, 1 seed", "no interval: one seed")
    assert lmd["top1_first_percent"].lines == ("10.0 to 50.0", "in 1.00 s")
    assert_nothing_silent(report)


def test_marks_of_pre_training_do_not_stand_in_tables_of_fine_tuning(tmp_path: Path, tuning: Suite) -> None:
    record = write_tuned(tmp_path, tuning, "mae")
    assert record.finetune is not None
    timing = record.finetune.timing.model_copy(update={"valid": False, "residual_share": 0.012})
    write_run(tmp_path, tuning, "mae", finetune=record.finetune.model_copy(update={"timing": timing}))
    report = build_tables(tmp_path, tuning)
    invalid = "timing invalid: 1.20 % of wall time not accounted for (seed 0)"
    assert row(table(report, "table2"), "MAE")["row"].lines[3:] == (
        invalid,
        "3 of 500 validation images could not be used",
    )
    assert invalid not in row(table(report, "details"), "MAE")["row"].lines


def test_two_seeds_give_points_and_three_an_interval_with_a_verdict(tmp_path: Path, tuning: Suite) -> None:
    for seed in range(2):
        write_tuned(tmp_path, tuning, "lmd-cs", seed, gain=40 + seed)
    points = row(table(build_tables(tmp_path, tuning), "table2"), "LMD-CS")["mat_at_1_s"]
    assert points.lines[1] == "points: 0.0500, 0.0488"
    records = [
        write_tuned(tmp_path, tuning, name, seed, gain=40 + seed, train_s=seconds)
        for name, seconds in (("lmd-cs", 1.0), ("mae", 3.0))
        for seed in range(3)
    ]
    report = build_tables(tmp_path, tuning)
    mats = [record.finetune.mat_at_1 or 0.0 for record in records if record.finetune]
    lmd, mae = over_seeds(mats[:3]), over_seeds(mats[3:])
    assert isinstance(lmd, Interval)
    against: Any = ratio(lmd, mae)
    cell = row(table(report, "table2"), "LMD-CS")["mat_at_1_s"]
    assert (cell.parts["mat_at_1_s"], cell.parts["mat_at_1_s_low"]) == (lmd.value, lmd.low)
    assert cell.parts["mat_at_1_ratio"] == against.value
    assert cell.lines[-1] == against.verdict == "faster"
    assert_nothing_silent(report)


def test_seeds_without_an_increase_are_counted_and_named(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae", 0)
    flat = {"mat_at_1": "no increase", "mat_at_5": "no increase"}
    write_run(tmp_path, tuning, "mae", 1, finetune=simulated_finetune("mae", 1, gain=0), not_measured=flat)
    cell = row(table(build_tables(tmp_path, tuning), "table2"), "MAE")["mat_at_1_s"]
    assert cell.lines[1] == "no interval: one seed (1 of 2 seeds)"


def test_what_is_missing_says_why(tmp_path: Path, tuning: Suite) -> None:
    flat = {"mat_at_1": "no increase", "mat_at_5": "no increase"}
    write_run(tmp_path, tuning, "mae", finetune=simulated_finetune("mae", gain=0), not_measured=flat)
    write_run(
        tmp_path, tuning, "lmd-cs", not_measured={"finetune": "no labels: the images do not lie in class folders"}
    )
    write_tuned(tmp_path, tuning, "lmd-ps")
    write_run(tmp_path, tuning, "ddpm")
    report = build_tables(tmp_path, tuning)
    two, five, tuned = (table(report, stem) for stem in ("table2", "table5", "fine-tuning"))
    no_labels = "no labels: the images do not lie in class folders"
    assert row(two, "MAE")["mat_at_1_s"].lines == ("no increase",)
    assert row(two, "LMD-CS")["mat_at_5_s"].lines == (f"not measured: {no_labels}",)
    assert row(two, "LMD-PS")["mat_at_1_s"].lines[-1] == "no ratio: mae: no increase"
    assert row(two, "LMD-US")["mat_at_1_s"].lines == ("not run",)
    assert row(five, "LMD-CS")["overall_mean"].lines == (f"needs MAT@1: {no_labels}",)
    assert row(tuned, "MAE")["mat_at_1_s"].lines == ("no increase",)
    assert row(tuned, "LMD-CS")["top1_best_percent"].lines == (f"not measured: {no_labels}",)
    assert row(tuned, "LMD-CS")["linear_top1_percent"].lines == (f"not measured: {no_labels}",)
    assert "DDPM" not in [cells[0].lines[0] for cells in tuned.rows]
    assert "Rows that name no recipe for fine-tuning are left out: DDPM." in tuned.notes
    assert_nothing_silent(report)


def test_a_suite_without_fine_tuning_says_so_in_every_cell_and_has_no_table_of_it(
    tmp_path: Path, make_suite: MakeSuite
) -> None:
    suite = make_suite(tables=["table2", "table5"])
    write_run(tmp_path, suite, "mae")
    write_run(tmp_path, suite, "lmd-cs")
    report = build_tables(tmp_path, suite)
    assert row(table(report, "table2"), "MAE")["mat_at_1_s"].lines == (f"not measured: {NOTHING_TUNED}",)
    lmd = row(table(report, "table5"), "LMD-CS")
    assert lmd["overall_mean"].lines == (f"needs MAT@1: {NOTHING_TUNED}",)
    assert lmd["overall_mean_delta"].lines == (f"needs MAT@1: {NOTHING_TUNED}",)
    assert lmd["published_overall_mean"].lines == ("2.48", "reference")
    assert "fine-tuning" not in {one.stem for one in report.tables}
    absent = "In the paper's table but without a row in this suite: w/o LSP, w/o MAE, w/o MDS."
    assert absent in table(report, "table5").notes
    assert_nothing_silent(report)


def test_the_overall_mean_is_the_plain_mean_of_five_and_its_difference_is_to_lmd(
    tmp_path: Path, make_suite: MakeSuite, tuning: Suite
) -> None:
    values = tuning.model_dump()
    values["methods"]["lmd-ps"]["published"] = "w/o MDS"
    suite = make_suite(**{key: values[key] for key in ("methods", "finetune_recipes", "finetune")}, tables=["table5"])
    lmd, other = (write_tuned(tmp_path, suite, name, gain=40) for name in ("lmd-cs", "lmd-ps"))
    report = build(tmp_path, suite)
    cells = row(table(report, "table5"), "LMD-PS")
    assert cells["overall_mean"].parts["overall_mean"] == pytest.approx(overall(other), rel=1e-12)
    assert cells["overall_mean"].lines[1] == "no interval: one seed"
    assert cells["overall_mean_delta"].parts["overall_mean_delta"] == pytest.approx(overall(other) - overall(lmd))
    assert cells["published_overall_mean_delta"].lines == ("+1.27",)
    assert row(table(report, "table5"), "LMD-CS")["overall_mean_delta"].lines == ("reference",)
    assert any("takes MIT and MLT both in seconds" in note for note in table(report, "table5").notes)
    assert "Units are mixed" in report.page.read_text(encoding="utf-8")
    assert_nothing_silent(report)


# -- what was fine-tuned otherwise ------------------------------------------------------------------------------------


def test_seeds_fine_tuned_differently_have_a_mark_and_neither_interval_nor_verdict(
    tmp_path: Path, tuning: Suite
) -> None:
    for seed in range(3):
        write_tuned(tmp_path, tuning, "mae", seed, gain=40 + seed)
        finetune = simulated_finetune("lmd-cs", seed, gain=40 + seed, train_s=1.0)
        recipe = {**finetune.settings["recipe"], "batch_size": 32 if seed else 64}
        changed = finetune.model_copy(update={"settings": {**finetune.settings, "recipe": recipe}})
        write_run(tmp_path, tuning, "lmd-cs", seed, finetune=changed)
    report = build_tables(tmp_path, tuning)
    cells = row(table(report, "table2"), "LMD-CS")
    assert "seeds fine-tuned differently: batch_size" in cells["row"].lines
    assert cells["mat_at_1_s"].lines[1] == "no interval: seeds fine-tuned differently"
    assert cells["mat_at_1_s"].parts["mat_at_1_verdict"] == "no interval"
    assert " / lr 0.001, batch 32" in cells["setup"].lines[1]
    assert "interval: Student t over 3 seeds" in row(table(report, "table2"), "MAE")["row"].lines
    assert "seeds fine-tuned differently: batch_size" in row(table(report, "table5"), "LMD-CS")["row"].lines
    assert any("alike: batch 32, 64." in note for note in table(report, "table2").notes)
    assert_nothing_silent(report)


def test_a_source_or_a_probe_that_differs_does_not_set_seeds_apart(tmp_path: Path, tuning: Suite) -> None:
    for seed in range(3):
        finetune = simulated_finetune("mae", seed)
        recipe = {**finetune.settings["recipe"], "source": f"page {seed}"}
        settings = {**finetune.settings, "recipe": recipe, "probe_images": 100 + seed}
        write_run(tmp_path, tuning, "mae", seed, finetune=finetune.model_copy(update={"settings": settings}))
    assert (
        "interval: Student t over 3 seeds" in row(table(build_tables(tmp_path, tuning), "table2"), "MAE")["row"].lines
    )


@pytest.mark.parametrize(
    ("changes", "data", "reason"),
    [
        ({"num_val": 100}, {}, "validation images"),
        ({"num_classes": 4}, {}, "labels"),
        ({}, {"name": "scenes", "labels": "colour"}, "images, labels"),
        ({"notes": [f"{TUNED_ELSEWHERE}nvidia-h200"]}, {}, "machine"),
        ({"notes": [f"{TUNED_ON_OTHERS}photos"]}, {}, "images"),
    ],
)
def test_a_row_measured_otherwise_than_the_reference_has_no_ratio(
    changes: dict[str, Any], data: dict[str, Any], reason: str, tmp_path: Path, tuning: Suite
) -> None:
    for seed in range(3):
        write_tuned(tmp_path, tuning, "mae", seed, gain=40 + seed)
        record = write_tuned(tmp_path, tuning, "lmd-cs", seed, gain=40 + seed, train_s=1.0)
        assert record.finetune is not None
        changed = record.finetune.model_copy(update=changes)
        write_run(tmp_path, tuning, "lmd-cs", seed, finetune=changed, config={**record.config, "data": data})
    report = build_tables(tmp_path, tuning)
    cell = row(table(report, "table2"), "LMD-CS")["mat_at_1_s"]
    assert cell.lines[-1] == f"no ratio: mae: fine-tuned otherwise ({reason})"
    assert cell.parts["mat_at_1_verdict"] == cell.lines[-1]
    assert row(table(report, "table5"), "LMD-CS")["mit_ms"].parts["mit_verdict"] != cell.lines[-1]
    assert_nothing_silent(report)


def test_other_steps_alone_are_warned_of_and_keep_the_ratio(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae")
    finetune = simulated_finetune("lmd-cs").model_copy(update={"num_steps": 80})
    write_run(tmp_path, tuning, "lmd-cs", finetune=finetune)
    two = table(build_tables(tmp_path, tuning), "table2")
    assert row(two, "LMD-CS")["mat_at_1_s"].parts["mat_at_1_ratio"] == pytest.approx(1.0)
    assert any(note.startswith("Mind: not all were fine-tuned alike: steps 60, 80.") for note in two.notes)


def test_caveats_on_mat_stand_in_every_table_that_shows_it(tmp_path: Path, tuning: Suite) -> None:
    little = "MAT@1 says little: the gain of 1.0 points is within two standard errors (4.3 points among 500 images)"
    for seed in range(2):
        finetune = simulated_finetune("lmd-cs", seed)
        notes = [little] if seed else ["invalid: 2.00% of the wall time is missing"]
        write_run(tmp_path, tuning, "lmd-cs", seed, finetune=finetune.model_copy(update={"notes": notes}))
    report = build_tables(tmp_path, tuning)
    for stem in ("table2", "table5", "fine-tuning"):
        lines = row(table(report, stem), "LMD-CS")["row"].lines
        assert "MAT@1 says little (seed 1)" in lines
        assert not any(line.startswith("invalid: ") for line in lines)
        assert f"LMD-CS: {little}" in table(report, stem).notes
    assert not any("says little" in line for line in row(table(report, "details"), "LMD-CS")["row"].lines)


def test_figures_of_some_seeds_alone_say_of_how_many(tmp_path: Path, tuning: Suite) -> None:
    for seed in range(2):
        write_tuned(tmp_path, tuning, "mae", seed)
    write_run(tmp_path, tuning, "mae", 2, not_measured={"finetune": "step 3: the loss is not finite"})
    report = build(tmp_path, tuning)
    cells = row(table(report, "fine-tuning"), "MAE")
    for name in ("top1_best_percent", "finetune_mit_ms", "mat_at_1_s", "linear_top1_percent"):
        assert cells[name].lines[-1] == "2 of 3 seeds"
    assert row(table(report, "table2"), "MAE")["top1_first_percent"].lines[-1] == "2 of 3 seeds"
    frame = pd.read_csv(report.folder / "fine-tuning.csv", comment="#").set_index("row")
    assert [int(frame.loc["mae", name]) for name in ("seeds", "top1_seeds", "linear_seeds")] == [3, 2, 2]


# -- the table of fine-tuning -----------------------------------------------------------------------------------------


def test_the_table_shows_accuracies_cost_probes_and_the_recipe_in_words(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae", gain=40)
    report = build(tmp_path, tuning)
    cells = row(table(report, "fine-tuning"), "MAE")
    assert cells["top1_best_percent"].lines == ("50.0", "10.0 at the start", "46.0 at the end")
    assert cells["top5_best_percent"].lines[0] == "70.0"
    assert cells["finetune_mit_ms"].lines == (number(2000 / 60),)
    assert cells["linear_top1_percent"].lines == ("41.0", "top-5 90.0")
    assert cells["num_train"].lines == ("2000 to train", "500 to measure", "10 classes")
    assert cells["finetune_setup"].lines == (
        "2.70 M trained",
        "lr 0.001, batch 32, 60 steps, layer decay 0.75, drop path 0.1, mixup 0.8, mean of tokens",
    )
    notes = " ".join(table(report, "fine-tuning").notes)
    assert cells["top1_best_percent"].parts["top1_seeds"] == 1
    for text in (
        "Chance is 10 % of 10 classes",
        "votes of the 20 nearest by cosine; 1000 images to fit, 500 to measure",
        "MAE: 3 of 500 validation images could not be used",
        "Recipe of fine-tuning: one recipe to tune all.",
    ):
        assert text in notes
    assert "tune (fine-tuning)" in report.page.read_text(encoding="utf-8")
    frame = pd.read_csv(report.folder / "fine-tuning.csv", comment="#").set_index("row")
    assert float(frame.loc["mae", "mat_at_1_s"]) == pytest.approx(0.05)
    assert frame.loc["mae", "mat_at_1_s_low"] == "no interval: one seed"
    assert_nothing_silent(report)


def test_the_recipe_in_words_names_what_is_on() -> None:
    recipe = {
        **FINETUNE_RECIPE, "optimizer": {"name": "adamw", "weight_decay": 0.05}, "clip_grad_norm": 5.0,
        "ema_decay": 0.999, "augmentation": {"crop": "random_resized", "scale": [0.08, 1.0]},
    }  # fmt: skip
    finetune = simulated_finetune("mae")
    settings = {**finetune.settings, "recipe": recipe, "lr_warmup_steps": 6}
    text = recipe_text(finetune.model_copy(update={"settings": settings}))
    for part in (
        "60 steps, 6 of them warm-up",
        "weight decay 0.05",
        "gradients clipped to a norm of 5",
        "weights averaged (0.999)",
        "crops of 8 to 100 %",
    ):
        assert f", {part}," in f"{text},"


def test_several_seeds_are_shown_as_mean_and_range(tmp_path: Path, tuning: Suite) -> None:
    for seed in range(3):
        write_tuned(tmp_path, tuning, "mae", seed, gain=40 + seed)
    cells = row(table(build_tables(tmp_path, tuning), "fine-tuning"), "MAE")
    assert cells["top1_best_percent"].lines[:2] == ("51.1", "50.0 to 52.2")
    assert cells["linear_top1_percent"].lines == ("42.0", "41.0 to 43.0", "top-5 90.0")
    assert cells["row"].lines[2] == "interval: Student t over 3 seeds"


def test_probes_alone_and_different_validation_sets_are_said(tmp_path: Path, tuning: Suite) -> None:
    probes = simulated_probes()[:1]
    write_run(tmp_path, tuning, "mae", probes=probes, not_measured={"finetune": "step 3: the loss is not finite"})
    write_tuned(tmp_path, tuning, "lmd-cs", num_val=100)
    write_tuned(tmp_path, tuning, "lmd-ps")
    report = build_tables(tmp_path, tuning)
    cells = row(table(report, "fine-tuning"), "MAE")
    assert cells["top1_best_percent"].lines == ("not measured: step 3: the loss is not finite",)
    assert cells["linear_top1_percent"].lines == ("41.0", "top-5 90.0")
    mind = "Mind: not all were fine-tuned alike: validation images 100, 500. There is no ratio"
    assert any(note.startswith(mind) for note in table(report, "fine-tuning").notes)


# -- the figure and the terminal --------------------------------------------------------------------------------------


def test_accuracy_is_drawn_over_time_and_steps(tmp_path: Path, tuning: Suite) -> None:
    for name in ("mae", "lmd-cs"):
        write_tuned(tmp_path, tuning, name)
    report = build(tmp_path, tuning)
    assert brightness_spread(report.folder / "fine-tuning-accuracy.png") > 10
    frame = pd.read_csv(report.folder / "fine-tuning-accuracy.csv", comment="#")
    assert list(frame[frame.row == "mae"].step) == [0, 15, 30, 45, 60]
    assert frame.top1_percent.max() == 50.0
    assert "The same validation images for every row, looked at off the clock" in page_text(report)


def test_the_figure_says_where_rows_saw_other_validation_images(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae")
    write_tuned(tmp_path, tuning, "lmd-cs", num_val=100)
    text = page_text(build(tmp_path, tuning))
    assert "Mind: not the same validation images for every row, looked at off the clock" in text
    assert "The same validation images for every row" not in text


def page_text(report: Report) -> str:
    return report.page.read_text(encoding="utf-8")


def test_the_terminal_has_a_second_table_that_fits(tmp_path: Path, tuning: Suite) -> None:
    write_tuned(tmp_path, tuning, "mae")
    flat = {"mat_at_1": "no increase", "mat_at_5": "no increase"}
    write_run(tmp_path, tuning, "lmd-cs", finetune=simulated_finetune("lmd-cs", gain=0), not_measured=flat)
    write_run(tmp_path, tuning, "ddpm")
    found: Report = build_tables(tmp_path, tuning)
    worth = terminal_tables(found)[1]
    assert worth.columns == ("Method", "Top-1, %", "MAT@1, s per point", "Linear, %", "k-NN, %")
    assert {line[0]: line[1:] for line in worth.rows} == {
        "MAE": ("50.0", "0.0500", "41.0", "33.0"),
        "LMD-CS": ("10.0", "no increase", "-", "-"),
        "DDPM": ("-", "-", "-", "-"),
    }
