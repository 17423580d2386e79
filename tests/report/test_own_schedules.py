"""Figure 5 with schedules of one's own."""

import copy
from pathlib import Path

import pandas as pd

from lmd_bench.report import build_report
from tests.report.conftest import SUITE, MakeSuite, write_run

POINTS = [[0.0, 0.15], [0.5, 0.6], [1.0, 0.75]]


def test_the_points_of_a_schedule_stand_in_the_figures_table_beside_what_was_recorded(
    tmp_path: Path, make_suite: MakeSuite
) -> None:
    methods = copy.deepcopy(SUITE["methods"])
    for row, schedule in (("lmd-us", POINTS), ("lmd-ps", [[i / 256, 0.5] for i in range(257)]), ("lmd-cs", "cosine")):
        methods[row]["options"] = {"mask_schedule": schedule}
    suite = make_suite(methods=methods)
    for row in ("lmd-us", "lmd-ps", "lmd-cs"):
        write_run(tmp_path, suite, row)
    report = build_report(tmp_path / suite.name, suite, command="lmd-bench report")
    path = next(path for path in report.paths if path.name == "mask-schedules.csv")
    table = pd.read_csv(path, comment="#", dtype=str, keep_default_na=False)
    drawn = table[table["kind"] == "points"]
    assert drawn[["row", "progress", "mask_ratio"]].values.tolist() == [
        ["lmd-us", str(progress), str(ratio)] for progress, ratio in POINTS
    ], "rings for a handful of points, none for a sampled function"
    assert set(table[table["kind"] == "recorded"]["row"]) == {"lmd-us", "lmd-ps", "lmd-cs"}
