"""Table 4, the table of image quality and its evaluators: real and scenes columns, floors, and what is not ranked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lmd_bench.config import Suite
from lmd_bench.records import QUALITY_BOUNDS, RunRecord
from lmd_bench.report import Report, terminal_tables
from lmd_bench.report.rows import in_short
from lmd_bench.suite_files import parse_suite
from tests.report.conftest import (
    QUALITY_PART,
    SUITE,
    MakeSuite,
    evaluator_facts,
    simulated_quality,
    write_bounds,
    write_run,
)
from tests.report.test_build import assert_nothing_silent, build, build_tables, row, table

NO_ALEXNET = "no AlexNet weights: put alexnet-owt-7be5be79.pth into --weights DIR"
NO_SD = (
    "no Stable Diffusion weights: put the folder stable-diffusion-v1-4 into --weights DIR (lmd-bench doctor lists all)"
)


def brightness_spread(path: Path) -> float:
    """Standard deviation of a picture's grey values: 0 of a blank one."""
    with Image.open(path) as image:
        return float(np.asarray(image.convert("L")).std())


def filling_suite() -> Suite:
    """A suite with Table 4, whose row of Stable Diffusion has no weights."""
    values = copy.deepcopy(SUITE)
    values["methods"]["sd"] = {
        "label": "SD-v1.4", "method": "stable-diffusion", "published": "SD-v1.4", "missing": NO_SD
    }  # fmt: skip
    return parse_suite({**values, "tables": ["table4"], "image_quality": QUALITY_PART}, "suite demo")


@pytest.fixture
def filling() -> Suite:
    return filling_suite()


def write_filled(out: Path, suite: Suite, name: str, level: float, seed: int = 0, **changes: Any) -> RunRecord:
    return write_run(out, suite, name, seed, image_quality=simulated_quality(level, seed, **changes))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """LMD-CS and MAE measured with the scenes evaluators, with floor and ceiling."""
    out, suite = tmp_path_factory.mktemp("out"), filling_suite()
    write_filled(out, suite, "lmd-cs", 1.0)
    write_filled(out, suite, "mae", 2.0)
    write_bounds(out, suite)
    return build(out, suite)


def titles(of_report: Report, stem: str) -> list[str]:
    return [column.title for column in table(of_report, stem).columns]


# -- Table 4 ----------------------------------------------------------------------------------------------------------


def test_table_4_shows_published_rows_without_ratio_or_verdict(report: Report) -> None:
    four = table(report, "table4")
    lmd = row(four, "LMD-CS")
    assert [lmd[f"published_{key}"].lines for key in ("fid", "clip_score", "lpips")] == [("6.2",), ("0.26",), ("0.27",)]
    assert not any("ratio" in name or "verdict" in name for column in four.columns for name in column.csv)
    assert "neither ratios nor verdicts are given" in four.notes[0]
    assert_nothing_silent(report)


def test_scenes_figures_never_stand_under_a_real_metrics_name(report: Report) -> None:
    measured = [c.title for c in table(report, "table4").columns if c.group and c.group.startswith("Measured")]
    assert measured == ["FID (scenes features)", "KID (scenes features)", "CLIP-score (scenes)", "LPIPS", "Images"]
    assert titles(report, "image-quality")[1:] == [
        "FID (scenes features)", "KID (scenes features)", "Precision (scenes features)", "Recall (scenes features)",
        "CLIP-score (scenes)", "LPIPS", "PSNR", "SSIM", "Images",
    ]  # fmt: skip
    assert any("cannot be compared with any published number" in note for note in table(report, "table4").notes)
    frame = pd.read_csv(report.folder / "table4.csv", comment="#")
    assert {"fid_scenes", "kid_scenes", "kid_std_scenes", "clip_score_scenes"} <= set(frame.columns)
    assert not {"fid", "kid", "clip_score"} & set(frame.columns)


def test_rows_sections_and_their_order(report: Report) -> None:
    names = [(s.heading, [cells[0].lines[0] for cells in s.rows]) for s in table(report, "table4").sections]
    assert names[0] == (None, ["SD-v1.4", "Muse-base", "LMD-CS"])
    assert names[1][0] == "Rows that are not in the paper"
    assert {"MAE", "DDPM", "LMD-US"} <= set(names[1][1])
    assert names[2][1] == ["Ground truth", "Hidden part grey"]
    cells = row(table(report, "table4"), "Hidden part grey")
    assert cells["fid_scenes"].lines == ("90.0",)
    assert cells["kid_scenes"].lines == ("0.0900", "± 0.00100")
    assert row(table(report, "table4"), "Muse-base")["fid_scenes"].lines == ("no such row in this suite",)
    assert row(table(report, "table4"), "Muse-base")["published_fid"].lines == ("6.8",)


def test_missing_weights_are_named_in_the_cell_and_explained_below(report: Report) -> None:
    four = table(report, "table4")
    assert row(four, "SD-v1.4")["fid_scenes"].lines == ("not measured: no Stable Diffusion weights",)
    assert row(four, "LMD-CS")["lpips"].lines == ("not measured: no AlexNet weights",)
    assert row(four, "MAE")["num_images"].lines == ("N = 200", "64 px")
    assert f"LPIPS: not measured: {NO_ALEXNET}." in four.notes
    assert f"SD-v1.4: not measured: {NO_SD}." in four.notes
    assert NO_SD in report.page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        (NO_ALEXNET, "no AlexNet weights"),
        ("stopped: the disk is full", "stopped"),
        ("/w/a.pth: wrong hash: expected 1, found 2", "/w/a.pth: wrong hash: expected 1, found 2"),
    ],
)
def test_a_reason_is_cut_before_what_can_be_done_but_never_to_a_path(reason: str, short: str) -> None:
    assert in_short(reason) == short


def test_under_the_table_stand_n_evaluators_resize_rule_seed_and_masks(report: Report) -> None:
    notes = " ".join(table(report, "table4").notes)
    facts = evaluator_facts("features", "_scenes")
    assert "N = 200 images; real images 0123456789abcdef (digest of their pixels); seed 0." in notes
    assert f"{facts.name}, 2048 numbers an image; weights {facts.weights} (SHA-256 {facts.sha256[:12]})" in notes
    assert "images: antialiased bicubic to 64 px." in notes
    assert "Compared: filled against real, 75 % hidden in units of 16 px." in notes
    assert "KID has no such bias and stands beside it" in notes


def test_published_evaluators_have_columns_of_their_own_names(tmp_path: Path, filling: Suite) -> None:
    values = {**simulated_quality(1.0, suffix="").values, "lpips": 0.21}
    write_filled(tmp_path, filling, "lmd-cs", 1.0, suffix="", num_images=10_000, values=values)
    report = build_tables(tmp_path, filling)
    measured = [c.title for c in table(report, "table4").columns if c.group and c.group.startswith("Measured")]
    assert measured == ["FID", "KID", "CLIP-score", "LPIPS", "Images"]
    assert row(table(report, "table4"), "LMD-CS")["clip_score"].lines == ("0.2900",)
    assert row(table(report, "table4"), "LMD-CS")["lpips"].lines == ("0.210",)
    assert not any("scenes" in note or "biased" in note for note in table(report, "table4").notes)
    assert len(table(report, "table4").sections) == 2  # no bounds were measured


def test_both_kinds_of_evaluators_stand_side_by_side_and_never_in_one_column(tmp_path: Path, filling: Suite) -> None:
    write_filled(tmp_path, filling, "lmd-cs", 1.0, suffix="")
    write_filled(tmp_path, filling, "mae", 2.0)
    report = build_tables(tmp_path, filling)
    lmd, mae = (row(table(report, "table4"), name) for name in ("LMD-CS", "MAE"))
    assert lmd["fid"].lines == ("10.0",)
    assert lmd["fid_scenes"].lines == ("not measured: measured with the published evaluator",)
    assert mae["fid"].lines == ("not measured: measured with the scenes evaluator",)
    assert mae["fid_scenes"].lines == ("20.0",)
    assert_nothing_silent(report)


@pytest.mark.parametrize(("evaluators", "title"), [("real", "FID"), ("scenes", "FID (scenes features)")])
def test_without_any_figure_the_column_is_the_one_that_was_asked_for(
    evaluators: str, title: str, tmp_path: Path, make_suite: MakeSuite
) -> None:
    suite = make_suite(tables=["table4"], image_quality={**QUALITY_PART, "evaluators": evaluators})
    write_run(tmp_path, suite, "lmd-cs", not_measured={"image_quality": "stopped: the disk is full"})
    report = build_tables(tmp_path, suite)
    assert title in titles(report, "table4")
    cells = row(table(report, "table4"), "LMD-CS")
    assert next(iter(cells[key] for key in ("fid", "fid_scenes") if key in cells)).lines == ("not measured: stopped",)
    assert "LMD-CS: not measured: stopped: the disk is full." in table(report, "table4").notes
    assert "image-quality" not in {one.stem for one in report.tables}
    assert_nothing_silent(report)


# -- several seeds, and what cannot be compared -----------------------------------------------------------------------


def test_a_clip_score_under_other_captions_is_not_ranked_and_other_figures_are(tmp_path: Path, filling: Suite) -> None:
    for name in ("lmd-cs", "lmd-ps"):
        write_filled(tmp_path, filling, name, 1.0)
    changed = simulated_quality(2.0).model_copy(update={"captions_digest": "f" * 16})
    write_run(tmp_path, filling, "mae", image_quality=changed)
    cells = row(table(build_tables(tmp_path, filling), "image-quality"), "MAE")
    assert cells["clip_score_scenes"].lines[-1] == "other captions: not ranked"
    assert len(cells["fid_scenes"].lines) == 1


def test_several_seeds_are_shown_as_mean_and_range(tmp_path: Path, filling: Suite) -> None:
    for seed in range(3):
        write_filled(tmp_path, filling, "mae", 2.0, seed)
    cells = row(table(build_tables(tmp_path, filling), "image-quality"), "MAE")
    assert cells["fid_scenes"].lines == ("20.1", "20.0 to 20.2")
    assert cells["psnr_db"].lines == ("17.99", "17.98 to 18.00")
    parts = {"fid_scenes": pytest.approx(20.1), "fid_scenes_ranked": "yes", "fid_scenes_seeds": 3}
    assert cells["fid_scenes"].parts == parts


def test_a_mean_of_some_seeds_alone_says_of_how_many(tmp_path: Path, filling: Suite) -> None:
    for seed in range(2):
        write_filled(tmp_path, filling, "mae", 2.0, seed)
    write_run(tmp_path, filling, "mae", 2, not_measured={"image_quality": "stopped"})
    for stem in ("image-quality", "table4"):
        cell = row(table(build_tables(tmp_path, filling), stem), "MAE")["fid_scenes"]
        assert cell.lines[-1] == "2 of 3 seeds"
        assert cell.parts["fid_scenes_seeds"] == 2


def test_other_neighbours_concern_precision_and_recall_alone(tmp_path: Path, filling: Suite) -> None:
    for name, neighborhood in (("lmd-cs", 3), ("lmd-ps", 3), ("mae", 5)):
        write_filled(tmp_path, filling, name, 1.0, settings={"neighborhood": neighborhood})
    cells = row(table(build_tables(tmp_path, filling), "image-quality"), "MAE")
    assert cells["recall_scenes"].lines[-1] == "balls of 5 neighbours: not ranked"
    assert cells["fid_scenes"].parts["fid_scenes_ranked"] == "yes"


def test_the_terminal_marks_what_is_not_ranked(tmp_path: Path, filling: Suite) -> None:
    for name in ("lmd-cs", "lmd-ps"):
        write_filled(tmp_path, filling, name, 1.0)
    write_filled(tmp_path, filling, "mae", 2.0, num_images=100)
    lines = {line[0]: line for line in terminal_tables(build_tables(tmp_path, filling))[1].rows}
    assert lines["MAE"][1] == "20.0 (N = 100)"
    assert lines["LMD-CS"][1] == "10.0"


def test_real_images_in_place_of_filled_ones_are_of_no_other_masks(tmp_path: Path, filling: Suite) -> None:
    write_filled(tmp_path, filling, "mae", 2.0)
    write_bounds(tmp_path, filling, what="the real images in place of filled ones")
    cells = row(table(build_tables(tmp_path, filling), "table4"), "Ground truth")
    assert cells["fid_scenes"].parts["fid_scenes_ranked"] == "yes"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_images": 100}, "N = 100"),
        ({"image_size": 32}, "32 px"),
        ({"real_digest": "f" * 16}, "other real images"),
        ({"evaluators": {"features": evaluator_facts("features", "_other")}}, "other weights of the evaluator"),
        ({"what": "filled against real, 50 % hidden in units of 16 px"}, "other masks"),
        ({"what": "filled against real, 75 % hidden in units of 32 px"}, "other masks"),
        ({"what": "filled against real, own masks: one of every 2 x 2"}, "own mask"),
    ],
)
def test_a_row_measured_otherwise_than_most_is_not_ranked(
    changes: dict[str, Any], text: str, tmp_path: Path, filling: Suite
) -> None:
    for name in ("lmd-cs", "lmd-ps"):
        write_filled(tmp_path, filling, name, 1.0)
    write_run(tmp_path, filling, "mae", image_quality=simulated_quality(2.0).model_copy(update=changes))
    report = build_tables(tmp_path, filling)
    odd, usual = (row(table(report, "table4"), name)["fid_scenes"] for name in ("MAE", "LMD-CS"))
    assert odd.lines[-1] == f"{text}: not ranked"
    assert odd.parts["fid_scenes_ranked"] == f"no: {text}"
    assert usual.lines == ("10.0",)
    warned = any(note.startswith("Mind: N differs between rows (100, 200)") for note in table(report, "table4").notes)
    assert warned == ("num_images" in changes)
    assert_nothing_silent(report)


def test_bounds_of_another_number_of_images_are_marked_too(tmp_path: Path, filling: Suite) -> None:
    write_filled(tmp_path, filling, "mae", 2.0)
    write_bounds(tmp_path, filling, num_images=50)
    cells = row(table(build_tables(tmp_path, filling), "table4"), "Ground truth")
    assert cells["fid_scenes"].lines[-1] == "N = 50: not ranked"


def test_damaged_bounds_are_a_problem_and_not_fatal(tmp_path: Path, filling: Suite) -> None:
    write_filled(tmp_path, filling, "mae", 2.0)
    (tmp_path / "demo" / QUALITY_BOUNDS).write_text("{", encoding="utf-8")
    report = build_tables(tmp_path, filling)
    assert any(QUALITY_BOUNDS in problem and "not a readable record" in problem for problem in report.problems)
    assert len(table(report, "table4").sections) == 2


# -- evaluators, rows that come trained, the terminal -----------------------------------------------------------------


def test_the_table_of_evaluators_holds_whole_hashes_and_their_rows(report: Report) -> None:
    evaluators = table(report, "evaluators")
    cells = row(evaluators, "Features (FID, KID, precision, recall)")
    assert cells["sha256"].lines == (evaluator_facts("features", "_scenes").sha256,)
    assert cells["rows"].lines == ("LMD-CS, MAE",)
    assert [line[0].lines[0] for line in evaluators.rows] == ["Features (FID, KID, precision, recall)", "CLIP-score"]


def test_the_page_defines_the_figures_only_where_there_are_any(report: Report, tmp_path: Path, suite: Suite) -> None:
    assert "raw: neither scaled nor clipped" in report.page.read_text(encoding="utf-8")
    write_run(tmp_path / "old", suite, "mae")
    old = build(tmp_path / "old", suite)
    assert "CLIP-score" not in old.page.read_text(encoding="utf-8")
    assert not {"table4", "image-quality", "evaluators", "fine-tuning"} & {one.stem for one in old.tables}


def test_a_row_that_comes_trained_says_so_instead_of_figures_of_training(
    tmp_path: Path, make_suite: MakeSuite, filling: Suite
) -> None:
    methods = {name: config.model_dump(exclude_none=True) for name, config in filling.methods.items()}
    del methods["sd"]["missing"]
    methods["sd"] |= {"label": "SD", "published": None}
    suite = make_suite(tables=["table1", "table4"], image_quality=QUALITY_PART, methods=methods)
    write_filled(tmp_path, suite, "mae", 2.0)
    reason = {"efficiency": "comes trained: no training was measured"}
    write_run(
        tmp_path, suite, "sd", image_quality=simulated_quality(1.0), num_steps=0, timing=None, phases=None,
        efficiency=None, not_measured=reason,
    )  # fmt: skip
    (tmp_path / "demo" / "sd" / "seed-0" / "steps.csv").unlink()
    report = build_tables(tmp_path, suite)
    assert report.problems == ()
    assert report.warnings == ()
    one = row(table(report, "table1"), "SD")
    assert one["mit_ms"].lines == ("not measured: comes trained: no training was measured",)
    assert one["projector_share"].lines == ("not measured: comes trained: no training was measured",)
    assert one["setup"].lines[0] == "2.60 M, comes trained"
    assert one["setup"].lines[1] == "64 px, fp32, nothing trained"
    assert row(table(report, "details"), "SD")["untimed_s"].lines == one["mit_ms"].lines
    assert row(table(report, "table4"), "SD")["fid_scenes"].lines == ("10.0",)
    last = next(line for line in terminal_tables(report)[0].rows if line[0] == "SD")
    assert (last[1], last[-1]) == ("not measured", "comes trained")
    assert_nothing_silent(report)


def test_the_terminal_names_the_kind_that_was_measured(report: Report) -> None:
    worth = terminal_tables(report)[1]
    assert worth.columns == ("Method", "FID (scenes features)", "KID (scenes features)", "CLIP-score (scenes)", "LPIPS")
    assert worth.rows == (("LMD-CS", "10.0", "0.0100", "0.2900", "-"), ("MAE", "20.0", "0.0200", "0.2800", "-"))


def test_a_distance_of_rounding_size_is_shown_as_zero_of_no_sign(tmp_path: Path, filling: Suite) -> None:
    values = {"fid_scenes": -5.87e-6, "kid_scenes": -2.5}
    write_filled(tmp_path, filling, "mae", 2.0, values=values)
    cells = row(table(build_tables(tmp_path, filling), "table4"), "MAE")
    assert cells["fid_scenes"].lines == ("0.0000",)
    assert cells["kid_scenes"].lines == ("-2.50",)
    assert cells["fid_scenes"].parts["fid_scenes"] == -5.87e-6
