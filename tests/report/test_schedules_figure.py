"""Figure 5 with many rows: every line once, and no panel of lines that do not move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure as Canvas

from lmd_bench.config import Suite
from lmd_bench.report.figures import Drawing
from lmd_bench.report.load import load_results
from lmd_bench.report.rows import row_results
from tests.report.conftest import SUITE, MakeSuite, write_run


class Kept(Drawing):
    """Keeps the canvases that it saves, by stem."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.canvases: dict[str, Canvas] = {}

    def save(
        self,
        canvas: Canvas,
        stem: str,
        title: str,
        caption: str,
        names: Sequence[str],
        table: Sequence[Sequence[object]],
        *,
        dpi: int = 150,
    ) -> None:
        self.canvases[stem] = canvas
        super().save(canvas, stem, title, caption, names, table, dpi=dpi)


def drawn(out: Path, suite: Suite, *rows: str) -> Kept:
    """All figures of runs of these rows."""
    for row in rows:
        write_run(out, suite, row)
    results = load_results(out / suite.name, suite)
    drawing = Kept(suite, results, row_results(suite, results), out, [])
    drawing.draw()
    return drawing


def test_rows_of_equal_ratios_are_one_line_under_all_their_names(tmp_path: Path, suite: Suite) -> None:
    canvas = drawn(tmp_path, suite, *suite.methods).canvases["mask-schedules"]
    left, right = canvas.axes
    named = {str(line.get_label()): line for line in left.lines if not str(line.get_label()).startswith("_")}
    # lmd-ps, lmd-cs and lmd-cs-adan share the fixtures' schedule; MAE's is constant, DDPM masks nothing
    assert list(named) == ["LMD-US", "LMD-PS, LMD-CS, LMD-CS (Adan)", "MAE"]
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == list(named)
    assert len({(line.get_color(), str(line.get_linestyle())) for line in named.values()}) == 3
    shares = [line.get_ydata() for line in right.lines]
    assert len(shares) == 4  # MAE's input keeps its length
    assert all(max(share) == 1 and min(share) < 1 for share in shares)
    table = pd.read_csv(tmp_path / "mask-schedules.csv", comment="#")
    assert set(table[table["kind"] == "recorded"]["row"]) == set(suite.methods) - {"ddpm"}


def test_without_a_schedule_there_is_one_panel(tmp_path: Path, suite: Suite) -> None:
    assert len(drawn(tmp_path, suite, "mae").canvases["mask-schedules"].axes) == 1


@pytest.mark.parametrize("num_rows", [3, 16])
def test_figures_of_many_rows_tell_them_apart_and_grow_with_their_legend(
    num_rows: int, tmp_path: Path, make_suite: MakeSuite
) -> None:
    row = SUITE["methods"]["mae"]
    methods: dict[str, Any] = {f"row-{i}": {**copy.deepcopy(row), "label": f"Row number {i}"} for i in range(num_rows)}
    suite = make_suite(methods=methods, reference=None, evaluation={"num_checks": 6, "unit_px": 16, "targets": []})
    drawing = drawn(tmp_path, suite, *methods)
    assert len({(look.colour, str(look.dash)) for look in drawing.looks.values()}) == num_rows
    for stem in ("loss-curves", "yardstick"):
        canvas = drawing.canvases[stem]
        canvas.draw_without_rendering()
        legend = canvas.legends[0].get_window_extent()
        assert legend.width <= canvas.bbox.width
        assert canvas.axes[0].get_window_extent().height > 0.6 * 4.4 * canvas.dpi, "the legend takes the curves' room"
