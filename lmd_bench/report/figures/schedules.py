"""Mask ratios over a run: the paper's figure 5 as it was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lmd_bench.lmd.mask_schedule import MaskScheduleName, mask_ratio
from lmd_bench.report.figures.sheet import Sheet, add_legend, finite, new_canvas, thin
from lmd_bench.report.load import Run

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

PAPER_SCHEDULES: Final[tuple[MaskScheduleName, ...]] = ("uniform", "piecewise", "cosine")
_FORMULA_POINTS: Final = 240
_MOST_RINGS: Final = 32  # more would hide the line; a sampled function has up to 257


def draw_schedules(sheet: Sheet, runs: Sequence[Run]) -> None:
    """Mask ratios of the rows that mask, on the paper's formulas, and what they come to in tokens."""
    by_row = {run.record.row: run for run in reversed(runs)}  # a schedule is the same for every seed
    first = [by_row[row] for row in dict.fromkeys(run.record.row for run in runs)]
    shrinks = any(_varies(run.steps["tokens"]) for run in first)
    canvas, panels = new_canvas(1, 2 if shrinks else 1, height=4.4)
    for group in _of_equal_ratios(first):
        _draw_schedule(sheet, group, *panels)
    formulas = _formula_points()
    _draw_formulas(formulas, panels[0])
    panels[0].set(xlabel="share of all steps", ylabel="mask ratio", xlim=(0, 1), ylim=(0, 1))
    if shrinks:
        panels[1].set(xlabel="share of all steps", ylabel="tokens the encoder sees / most in the run", xlim=(0, 1))
        panels[1].set_ylim(0, 1.05)
    add_legend(canvas, panels[0])
    table = [line for run in first for line in _schedule_lines(run)]
    table += [(name, "formula", "none", u, value, "none") for name, u, value in formulas]
    right = (
        " Right: what it comes to, the whole tokens that the encoder sees as a share of the most in the run; rows "
        "whose input keeps its length are left out."
    )
    sheet.save(
        canvas,
        "mask-schedules",
        "Mask schedules (the paper's figure 5)",
        "Left: the mask ratio recorded in each step (lines; rows of equal ratios are drawn once) on the paper's "
        "three formulas (dots; section 3.2.3: uniform, piecewise, cosine, from 0.15 to 0.75). Rings: the points of "
        f"a schedule of one's own.{right if shrinks else ''}",
        ["row", "kind", "step", "progress", "mask_ratio", "tokens"],
        table,
    )


def _draw_schedule(sheet: Sheet, group: Sequence[Run], ratios: Axes, lengths: Axes | None = None) -> None:
    """Rows of equal mask ratios as one line, and what it comes to in tokens of each."""
    look, run = sheet.looks[group[0].record.row], group[0]
    names = ", ".join(sheet.labels[run.record.row] for run in group)
    ratios.plot(_progress(run), run.steps["mask_ratio"], color=look.colour, linestyle=look.dash, label=names)
    for run in group:
        if points := _own_points(run):
            places = zip(*points, strict=True)
            ratios.plot(*places, color=look.colour, linestyle="none", marker="o", markersize=5, fillstyle="none")
        if lengths is not None and _varies(run.steps["tokens"]):
            lengths.plot(
                _progress(run), _token_share(run), color=look.colour, linestyle=look.dash, drawstyle="steps-post"
            )


def _own_points(run: Run) -> list[tuple[float, float]]:
    """The (progress, ratio) points of a schedule that is no named one, where they are few enough to be drawn."""
    schedule = (run.record.config.get("options") or {}).get("mask_schedule")
    if not isinstance(schedule, list) or len(schedule) > _MOST_RINGS:
        return []
    return [(float(progress), float(ratio)) for progress, ratio in schedule]


def _formula_points() -> list[tuple[str, float, float]]:
    """(schedule, progress, ratio) of the paper's formulas."""
    return [
        (name, i / _FORMULA_POINTS, mask_ratio(name, i + 1, _FORMULA_POINTS, start=0.15, mid=0.40, end=0.75))
        for name in PAPER_SCHEDULES
        for i in range(_FORMULA_POINTS)
    ]


def _draw_formulas(formulas: Sequence[tuple[str, float, float]], axes: Axes) -> None:
    for schedule in PAPER_SCHEDULES:
        dots = [(progress, ratio) for name, progress, ratio in formulas if name == schedule][::8]
        places = zip(*dots, strict=True)
        axes.plot(*places, color="#333333", linestyle="none", marker=".", markersize=3.5, zorder=3)


def _progress(run: Run) -> NDArray[np.float64]:
    return (run.steps["step"] - 1) / run.record.num_steps


def _token_share(run: Run) -> NDArray[np.float64]:
    """Tokens that the encoder sees in each step, over the most that it sees in any."""
    import numpy as np

    tokens = run.steps["tokens"]
    return np.asarray(tokens / finite(tokens).max())


def _varies(values: NDArray[np.float64]) -> bool:
    found = finite(values)
    return found.size > 0 and bool(found.min() < found.max())


def _of_equal_ratios(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose mask ratios are the same in every step, together."""
    groups: dict[bytes, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.steps["mask_ratio"].round(6).tobytes(), []).append(run)
    return list(groups.values())


def _schedule_lines(run: Run) -> list[Sequence[object]]:
    """Lines of the schedules' table: what a run recorded, and the points of a schedule of its own."""
    row, progress = run.record.row, _progress(run)
    steps, ratios, tokens = (run.steps[name] for name in ("step", "mask_ratio", "tokens"))
    lines: list[Sequence[object]] = [
        (row, "recorded", int(steps[i]), float(progress[i]), _or_none(ratios[i]), _or_none(tokens[i]))
        for i in thin(steps.size)
    ]
    return lines + [(row, "points", "none", u, ratio, "none") for u, ratio in _own_points(run)]


def _or_none(value: float) -> float | str:
    """For tables, where an empty field would say nothing."""
    return float(value) if value == value else "none"
