"""Whole reports from simulated records: exact cells, no silent cells, one page that stands alone."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lmd_bench.config import Suite
from lmd_bench.errors import RecordError
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Interval, over_seeds, ratio
from lmd_bench.records import YARDSTICK_BOUNDS, Yardstick, read_run, write_json
from lmd_bench.report import Report, build_report, terminal_tables
from lmd_bench.report.build import _OWN_FILES, make_tables
from lmd_bench.report.cells import Cell, Table, number, to_csv
from lmd_bench.report.load import load_results
from lmd_bench.report.origin import origin
from lmd_bench.report.rows import row_results
from tests.report.conftest import SUITE, MakeSuite, make_profile, write_failure, write_run

COMMAND = "lmd-bench report reports/local/demo"


def build(out: Path, suite: Suite) -> Report:
    return build_report(out / suite.name, suite, command=COMMAND)


def build_tables(out: Path, suite: Suite) -> Report:
    """A report of tables alone, without figures and page: most of what a report costs is drawing."""
    folder = out / suite.name
    results = load_results(folder, suite)
    rows = row_results(suite, results)
    tables = make_tables(suite, results, rows)
    paths = []
    for one in tables:
        path = folder / f"{one.stem}.csv"
        path.write_text(to_csv(one, []), encoding="utf-8")
        paths.append(path)
    warnings = origin(suite, results, COMMAND).warnings
    problems = tuple(results.problems)
    return Report(suite, folder, folder / "index.html", tuple(paths), problems, warnings, tuple(tables), rows)


def table(report: Report, stem: str) -> Table:
    return next(one for one in report.tables if one.stem == stem)


def row(of: Table, label: str) -> dict[str, Cell]:
    """A row's cells by the name of the first CSV column of each."""
    cells = next(cells for cells in of.rows if cells[0].lines[0] == label)
    return {column.csv[0]: cell for column, cell in zip(of.columns, cells, strict=True)}


def assert_nothing_silent(report: Report) -> None:
    """No empty, NaN or infinite cell in any table or CSV file."""
    for one in report.tables:
        for cells in one.rows:
            for cell in cells:
                assert not re.search(r"\b(nan|inf|None)\b", cell.text), (one.stem, cell)
    for path in report.paths:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, comment="#", dtype=str, keep_default_na=False)
            assert len(frame) > 0, path
            assert not frame.isin(["", "nan", "inf", "-inf", "None"]).any().any(), path


@pytest.fixture(scope="module")
def report(demo: tuple[Suite, Path]) -> Report:
    suite, folder = demo
    return build_report(folder, suite, command=COMMAND)


# -- the demo ---------------------------------------------------------------------------------------------------------


def test_every_file_says_suite_machine_commit_and_command(report: Report) -> None:
    wanted = (
        "Suite: demo",
        "Machine: Test CPU 2.0 GHz, 2 cores",
        "Commit: 0123456789ab",
        "Command: lmd-bench run",
        COMMAND,
    )
    for path in report.paths:
        if path.suffix in (".csv", ".md"):
            text = path.read_text(encoding="utf-8")
            assert all(words in text for words in wanted), path
    page = report.page.read_text(encoding="utf-8")
    assert all(words.split(": ", 1)[-1] in page for words in wanted)


def test_the_demo_leaves_tables_figures_and_their_numbers(report: Report) -> None:
    names = {path.name for path in report.paths}
    tables = ("table1", "table3", "ttq", "estimators", "details", "step-cost")
    figures = ("loss-curves", "mask-schedules", "yardstick", "phases", "profile-phases")
    assert names == {
        "index.html",
        *(f"{stem}.{ending}" for stem in tables for ending in ("md", "csv")),
        *(f"{stem}.{ending}" for stem in figures for ending in ("png", "csv")),
    }
    assert all(path.is_file() and path.stat().st_size > 100 for path in report.paths)
    assert report.problems == ()
    assert report.warnings == ()


def test_no_cell_of_the_demo_is_silent(report: Report) -> None:
    assert_nothing_silent(report)


def test_table1_shows_published_values_with_their_ratio_to_mae(report: Report) -> None:
    cells = row(table(report, "table1"), "LMD-CS")
    assert cells["published_mlt"].lines == ("6.92", "0.404 × MAE")
    assert cells["published_mit"].lines == ("2.61", "0.996 × MAE")
    assert cells["published_mask_ratio"].lines == ("cosine-based values",)
    assert row(table(report, "table1"), "MAE")["published_mlt"].lines == ("17.11", "reference")


def test_measured_ratios_carry_the_verdict_of_the_metrics(report: Report, demo: tuple[Suite, Path]) -> None:
    _, folder = demo
    lmd, mae = (
        RunEfficiency.from_dict(read_run(folder / name / "seed-0" / "record.json").efficiency or {})
        for name in ("lmd-cs", "mae")
    )
    against: Any = ratio(lmd.mit_ms, mae.mit_ms)
    assert against.verdict == "faster"
    assert isinstance(lmd.mit_ms, Interval)
    lines = row(table(report, "table1"), "LMD-CS")["mit_ms"].lines
    assert lines[0] == number(lmd.mit_ms.value)
    assert lines[2] == f"{number(against.value)} × mae"
    assert lines[-1] == "faster"
    assert row(table(report, "table1"), "MAE")["mit_ms"].lines[-1] == "reference"


def test_rows_stand_in_the_tables_their_published_row_is_in(report: Report) -> None:
    names = {
        stem: [[cells[0].lines[0] for cells in section.rows] for section in table(report, stem).sections]
        for stem in ("table1", "table3")
    }
    assert names["table1"] == [["MAE", "LMD-PS", "LMD-CS"], ["LMD-US", "LMD-CS (Adan)"]]
    assert names["table3"] == [["DDPM", "LMD-CS"], ["LMD-US", "LMD-CS (Adan)"]]


def test_a_row_that_is_not_in_the_paper_says_so_and_is_never_given_published_numbers(report: Report) -> None:
    cells = row(table(report, "table1"), "LMD-CS (Adan)")
    for name, cell in cells.items():
        if name.startswith("published"):
            assert cell.lines == ("not in the paper",)
    assert cells["mit_ms"].kind == "value"


def test_table3_takes_ddpm_as_reference_and_counts_mask_levels(report: Report) -> None:
    lmd, ddpm = (row(table(report, "table3"), name) for name in ("LMD-CS", "DDPM"))
    assert lmd["published_mit"].lines == ("2.45", "0.450 × DDPM")
    assert lmd["published_row"].lines[0] == "LMD (2023)"
    assert lmd["published_diffusion_steps"].lines == ("29",)
    assert lmd["diffusion_steps"].lines == ("9 mask levels",)
    assert lmd["diffusion_steps"].parts["mask_levels"] == 9
    assert lmd["mit_ms"].lines[2].endswith("× ddpm")
    assert ddpm["diffusion_steps"].lines == ("1000 in training", "20 to reconstruct")
    assert ddpm["diffusion_steps"].parts["diffusion_steps"] == 1000
    assert ddpm["diffusion_steps"].parts["reverse_steps"] == 20
    note = next(note for note in table(report, "table3").notes if note.startswith("Diffusion steps"))
    assert "T in training, and the reverse steps" in note
    assert "mask levels walked" in note
    assert ddpm["mit_ms"].lines[-1] == "reference"


def test_shares_windows_and_marks_stand_beside_the_figures(report: Report) -> None:
    cells = row(table(report, "table1"), "LMD-CS")
    assert re.fullmatch(r"2\d\.\d %", cells["projector_share"].lines[0])
    assert re.fullmatch(r"stall 1\.\d\d %", cells["projector_share"].lines[1])
    assert re.fullmatch(r"t90: step \d+", cells["num_decreases"].lines[1])
    assert cells["row"].lines[2] == "interval: within this run"
    assert "still falling: lower bound" in cells["row"].lines


def test_mit_times_mli_is_mlt_in_the_csv(report: Report) -> None:
    frame = pd.read_csv(report.folder / "table1.csv", comment="#")
    assert (frame.mit_ms * frame.mli / 1e3 - frame.mlt_s).abs().max() < 1e-9
    assert list(frame.row) == ["mae", "lmd-ps", "lmd-cs", "lmd-us", "lmd-cs-adan"]


def test_the_yardstick_table_brackets_and_bounds_its_times(report: Report) -> None:
    cells = row(table(report, "ttq"), "LMD-CS")
    assert cells["psnr_first_db"].lines == ("11.00",)
    assert cells["ceiling_psnr_db"].lines == ("15.20",)
    assert cells["latent_leak_db"].lines == ("0.41",)
    assert cells["mean_colour_psnr_db"].lines == ("13.10",)
    assert cells["ttq_50_of_mae_s"].lines[1].startswith("between ")
    assert cells["ttq_90_of_mae_s"].lines == ("above its projector's ceiling",)
    ddpm = row(table(report, "ttq"), "DDPM")
    assert ddpm["ttq_50_of_mae_s"].text.startswith("not reached in ")
    assert ddpm["function_evaluations"].lines == ("20",)
    assert ddpm["ceiling_psnr_db"].lines == ("none: works on pixels",)


def test_the_page_shows_every_row_and_stands_alone(report: Report, demo: tuple[Suite, Path]) -> None:
    page = report.page.read_text(encoding="utf-8")
    for name, config in demo[0].methods.items():
        assert config.label in page
        assert f"{name}/seed-0/record.json" in page
    assert page.count('src="data:image/png;base64,') == 5
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "What was measured, and what was not" in page
    assert "not distinguishable" in page


def test_the_page_lists_the_recipes_that_rows_name_and_no_others(tmp_path: Path, make_suite: MakeSuite) -> None:
    recipes = copy.deepcopy(SUITE["recipes"])
    recipes["unused"] = {**recipes["equal"], "source": "a recipe of no row"}
    suite = make_suite(recipes=recipes)
    write_run(tmp_path, suite, "mae")
    page = build(tmp_path, suite).page.read_text(encoding="utf-8")
    assert "one recipe for all" in page
    assert "a recipe of no row" not in page


def test_text_from_records_cannot_become_markup(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae", notes=["<script>alert(1)</script>"])
    page = build(tmp_path, suite).page.read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_terminal_tables_are_plain_words(report: Report) -> None:
    runs, speed = terminal_tables(report)
    assert runs.title == "Demo: 64 px scenes (95 % intervals within one run)"
    assert [line[0] for line in runs.rows] == ["LMD-US", "LMD-PS", "LMD-CS", "LMD-CS (Adan)", "MAE", "DDPM"]
    assert dict(zip(runs.columns, runs.rows[4], strict=True))["MLT / mae"] == "reference"
    assert all(isinstance(text, str) and text for line in (*runs.rows, *speed.rows) for text in line)
    assert all(len(line) == len(speed.columns) for line in speed.rows)


def test_a_report_is_the_same_when_made_again(demo: tuple[Suite, Path]) -> None:
    suite, folder = demo
    files = [path for path in build_report(folder, suite, command=COMMAND).paths if path.suffix != ".png"]
    before = [path.read_bytes() for path in files]
    build_report(folder, suite, command=COMMAND)
    assert [path.read_bytes() for path in files] == before


def test_reports_need_no_torch_and_are_quick(demo: tuple[Suite, Path]) -> None:
    suite, folder = demo
    code = (
        "import sys, json; from pathlib import Path; from lmd_bench.config import Suite;"
        "from lmd_bench.report import build_report, terminal_tables;"
        f"suite = Suite.model_validate_json({suite.model_dump_json()!r});"
        f"terminal_tables(build_report(Path({str(folder)!r}), suite, command='test'));"
        "assert not {'torch', 'pandas'} & set(sys.modules), 'heavy import'"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 5  # seconds of processor time, which other work on the machine does not lengthen


# -- several seeds ----------------------------------------------------------------------------------------------------


def test_three_seeds_give_an_interval_over_seeds(tmp_path: Path, suite: Suite) -> None:
    records = [write_run(tmp_path, suite, name, seed) for name in ("mae", "lmd-cs") for seed in range(3)]
    report = build(tmp_path, suite)
    mae = [RunEfficiency.from_dict(record.efficiency or {}) for record in records[:3]]
    expected = over_seeds([one.headline.mli for one in mae])
    assert isinstance(expected, Interval)
    cells = row(table(report, "table1"), "MAE")
    assert cells["mli"].lines[0] == number(expected.value)
    assert cells["row"].lines[1:3] == ("mae, 3 seeds", "interval: Student t over 3 seeds")
    assert cells["mli"].parts["mli_low"] == expected.low
    assert_nothing_silent(report)


def test_two_seeds_show_points_and_no_interval(tmp_path: Path, suite: Suite) -> None:
    for name in ("mae", "lmd-cs"):
        for seed in range(2):
            write_run(tmp_path, suite, name, seed)
    report = build(tmp_path, suite)
    cells = row(table(report, "table1"), "LMD-CS")
    assert cells["mli"].lines[1].startswith("points: ")
    assert cells["mli"].parts["mli_verdict"] == "no interval"
    assert row(table(report, "ttq"), "LMD-CS")["ttq_50_of_mae_s"].lines[0].endswith("(2 of 2 reached)")
    assert_nothing_silent(report)


def test_a_failed_seed_is_named_beside_the_others(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae", 0)
    write_failure(tmp_path, suite, "mae", 1)
    cells = row(table(build(tmp_path, suite), "table1"), "MAE")
    assert cells["row"].lines[1] == "mae, 1 of 2 seeds"
    assert "seed 1 failed: step 12: the loss is not finite" in cells["row"].lines


# -- what is missing says why -----------------------------------------------------------------------------------------


def test_missing_cells_say_not_run_failed_or_listed_only(tmp_path: Path, make_suite: MakeSuite, suite: Suite) -> None:
    methods = {name: config.model_dump() for name, config in suite.methods.items()}
    methods["lmd-ps"]["listed_only"] = "too heavy for this suite"
    changed = make_suite(methods=methods)
    write_run(tmp_path, changed, "mae")
    write_failure(tmp_path, changed, "lmd-cs")
    report = build(tmp_path, changed)
    cells = {name: row(table(report, "table1"), name) for name in ("LMD-PS", "LMD-CS", "LMD-US")}
    assert cells["LMD-PS"]["mlt_s"].lines == ("not measured: too heavy for this suite",)
    assert cells["LMD-CS"]["mlt_s"].lines == ("failed: step 12: the loss is not finite",)
    assert cells["LMD-US"]["mlt_s"].lines == ("not run",)
    assert cells["LMD-CS"]["published_mlt"].lines == ("6.92", "0.404 × MAE")
    assert_nothing_silent(report)


def test_a_yardstick_that_was_not_read_gives_the_records_reason(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae", yardstick=None, not_measured={"yardstick": "normalised targets"})
    report = build(tmp_path, suite)
    assert row(table(report, "ttq"), "MAE")["psnr_best_db"].lines == ("not measured: normalised targets",)
    assert "no target: the reference mae has no checks." in " ".join(table(report, "ttq").notes)


def test_diffusion_steps_without_a_yardstick_give_the_records_reason(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "ddpm", yardstick=None, not_measured={"yardstick": "turned off"})
    report = build(tmp_path, suite)
    cell = row(table(report, "table3"), "DDPM")["diffusion_steps"]
    assert cell.lines == ("1000 in training", "reverse: not measured: turned off")
    assert_nothing_silent(report)


def test_invalid_timing_is_marked(tmp_path: Path, suite: Suite) -> None:
    record = write_run(tmp_path, suite, "mae")
    assert record.timing is not None
    timing = record.timing.model_copy(update={"valid": False, "residual_share": 0.012})
    write_run(tmp_path, suite, "mae", timing=timing)
    cells = row(table(build(tmp_path, suite), "table1"), "MAE")
    assert "timing invalid: 1.20 % of wall time not accounted for (seed 0)" in cells["row"].lines


def test_a_run_of_three_steps_has_no_window_and_says_so(tmp_path: Path, suite: Suite) -> None:
    for name in suite.methods:
        write_run(tmp_path, suite, name, steps=3)
    report = build(tmp_path, suite)
    reason = "not measured: run of 3 steps is no longer than the smoothing half-life (20)"
    assert row(table(report, "table1"), "MAE")["mlt_s"].lines == (reason,)
    whole = row(table(report, "details"), "MAE")["mit_whole_ms"].lines
    assert whole[1] == "no interval: under 50 steps"
    assert terminal_tables(report)[0].rows[4][1].endswith("(whole run)")
    assert_nothing_silent(report)


def test_only_failed_cells_still_make_a_report(tmp_path: Path, suite: Suite) -> None:
    for name in suite.methods:
        write_failure(tmp_path, suite, name)
    report = build(tmp_path, suite)
    assert not [path for path in report.paths if path.suffix == ".png"]
    assert "No figure" in report.page.read_text(encoding="utf-8")
    assert terminal_tables(report)[0].rows[0][-1].startswith("failed: ")
    assert_nothing_silent(report)


def test_a_speed_run_alone_makes_a_report(tmp_path: Path, suite: Suite) -> None:
    write_json(tmp_path / "demo" / "profile-b16-fp32.json", make_profile(suite))
    report = build(tmp_path, suite)
    assert [one.stem for one in report.tables if not one.stem.startswith("step-cost")] == []  # nothing was trained
    assert [one.title.split(":")[0] for one in terminal_tables(report)] == ["Step cost"]
    assert_nothing_silent(report)
    page = report.page.read_text(encoding="utf-8")
    assert page.count("timed in speed runs, not trained") == len(set(make_profile(suite).rows) & set(suite.methods))


def test_two_speed_runs_get_tables_of_their_own(tmp_path: Path, suite: Suite) -> None:
    write_json(tmp_path / "demo" / "profile-b16-fp32.json", make_profile(suite))
    write_json(tmp_path / "demo" / "profile-b64-bf16.json", make_profile(suite, batch_size=64, precision="bf16"))
    stems = [one.stem for one in build(tmp_path, suite).tables if one.stem.startswith("step-cost")]
    assert stems == ["step-cost-b16-fp32", "step-cost-b64-bf16"]
    (tmp_path / "demo" / "profile-b64-bf16.json").unlink()
    build(tmp_path, suite)
    assert not list((tmp_path / "demo" / "report").glob("step-cost-b64*")), "left over from a speed run that is gone"


def test_tables_and_figures_that_the_suite_no_longer_has_are_removed_and_other_files_stay(
    tmp_path: Path, make_suite: MakeSuite, suite: Suite
) -> None:
    write_run(tmp_path, suite, "mae")
    folder = build(tmp_path, suite).folder
    (folder / "notes.md").write_text("mine")
    assert (folder / "table3.csv").is_file()
    (folder / "mask-schedules.png").rename(folder / "reconstructions.png")
    build(tmp_path, make_suite(tables=["table1"], evaluation={"num_checks": 0}))
    names = {path.name for path in folder.iterdir()}
    assert not {"table3.csv", "table3.md", "reconstructions.png"} & names
    assert {"table1.csv", "mask-schedules.png", "notes.md"} <= names


def test_every_file_of_a_report_is_known_as_its_own(report: Report) -> None:
    own = {path for pattern in _OWN_FILES for path in report.folder.glob(pattern)}
    assert set(report.paths) - own == {report.page}


def test_a_yardstick_of_which_only_the_checks_are_there_says_why(tmp_path: Path, suite: Suite) -> None:
    full = write_run(tmp_path, suite, "lmd-cs").yardstick
    assert full is not None
    bare = Yardstick(image_size=64, unit_px=16, checks=full.checks)
    reason = {YARDSTICK_BOUNDS: "RuntimeError: no such kernel"}
    write_run(tmp_path, suite, "lmd-cs", yardstick=bare, not_measured=reason)
    cells = row(table(build_tables(tmp_path, suite), "ttq"), "LMD-CS")
    for name in ("mean_colour_psnr_db", "nearest_unit_psnr_db", "ceiling_psnr_db", "latent_leak_db"):
        assert cells[name].lines == ("not measured: RuntimeError: no such kernel",)
    assert cells["psnr_last_db"].kind == "value"


def test_one_row_alone_has_no_reference_to_compare_with(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "lmd-cs")
    report = build(tmp_path, suite)
    assert row(table(report, "table1"), "LMD-CS")["mit_ms"].lines[-1] == "no ratio: mae: not run"
    assert_nothing_silent(report)


# -- records that cannot be used --------------------------------------------------------------------------------------


def test_damaged_foreign_and_stray_records_are_listed_not_fatal(
    tmp_path: Path, suite: Suite, make_suite: MakeSuite
) -> None:
    write_run(tmp_path, suite, "mae")
    damaged = tmp_path / "demo" / "lmd-us" / "seed-0" / "record.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{", encoding="utf-8")
    write_run(tmp_path / "demo", make_suite(name="other"), "ddpm")
    write_run(tmp_path, suite, "mine", label="My method")
    report = build(tmp_path, suite)
    text = "\n".join(report.problems)
    assert "not a readable record" in text
    assert "a record of suite 'other'" in text
    assert "row 'mine' is not in the suite" in text
    assert str(tmp_path) not in text
    assert str(tmp_path) not in report.page.read_text(encoding="utf-8")
    assert "My method" in report.page.read_text(encoding="utf-8")


def test_no_readable_record_is_an_error_that_names_the_folder(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(RecordError, match="demo: no readable record"):
        build(tmp_path, suite)


def test_records_of_two_machines_are_warned_of(tmp_path: Path, suite: Suite) -> None:
    first = write_run(tmp_path, suite, "mae")
    other = {**first.environment, "cpu": {"model": "Another CPU", "cores_available": 8}}
    write_run(tmp_path, suite, "lmd-cs", environment=other)
    assert "Records come from 2 machines: times cannot be compared across them." in build(tmp_path, suite).warnings


def test_a_diverged_loss_in_steps_does_not_break_the_curves(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae")
    steps = tmp_path / "demo" / "mae" / "seed-0" / "steps.csv"
    lines = steps.read_text(encoding="utf-8").splitlines()
    cells = lines[-1].split(",")
    cells[2] = "nan"
    steps.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n", encoding="utf-8")
    assert_nothing_silent(build(tmp_path, suite))


def test_a_network_that_sees_all_tokens_still_walks_the_mask_levels_of_its_ratios(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "lmd-cs")
    steps = tmp_path / "demo" / "lmd-cs" / "seed-0" / "steps.csv"
    before = row(table(build(tmp_path, suite), "table3"), "LMD-CS")["diffusion_steps"].lines
    frame = pd.read_csv(steps)
    frame["tokens"] = 16
    frame.to_csv(steps, index=False)
    again = row(table(build(tmp_path, suite), "table3"), "LMD-CS")["diffusion_steps"].lines
    assert again == before == ("9 mask levels",)
    frame["mask_ratio"] = 0.75
    frame.to_csv(steps, index=False)
    assert row(table(build(tmp_path, suite), "table3"), "LMD-CS")["diffusion_steps"].lines == ("0 mask levels",)
