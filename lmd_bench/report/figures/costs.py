"""Where the time of a step goes, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

from lmd_bench.records import CALIBRATOR, PHASES
from lmd_bench.report.cells import number
from lmd_bench.report.figures.sheet import Sheet, add_legend, new_canvas
from lmd_bench.report.load import Profile, Run
from lmd_bench.report.step_cost import phase_ms

# P. Tol's "bright" scheme, another set than the rows', so that a phase is not taken for a row.
_PHASE_COLOURS: Final = {
    "data": "#BBBBBB",
    "projector": "#EE6677",
    "forward": "#66CCEE",
    "backward": "#4477AA",
    "optimizer": "#228833",
}


def draw_phases(sheet: Sheet, runs: Sequence[Run]) -> None:
    """Mean milliseconds of each phase of every row that was trained."""
    rows: dict[str, dict[str, float]] = {}
    for row in sheet.labels:
        own = [run.record.phases for run in runs if run.record.row == row and run.record.phases]
        if own:
            rows[row] = {p: sum(getattr(part, f"{p}_ms") for part in own) / len(own) for p in PHASES}
    _bars(
        sheet,
        rows,
        "phases",
        "Where a step's time goes (runs)",
        "Mean milliseconds of each phase over all measured steps; the parts add up to the step. Several seeds: "
        "their mean.",
    )


def draw_profile_phases(sheet: Sheet, profile: Profile) -> None:
    """The same of a speed run."""
    rows: dict[str, dict[str, float]] = {}
    for row in profile.record.rows:
        rounds = [part for part in profile.record.rounds if part.row == row and part.period_ms]
        if rounds and row != CALIBRATOR:
            rows[row] = {phase: fmean(phase_ms(part, phase) for part in rounds) for phase in PHASES}
    if rows:
        labels = {row: profile.record.rows[row].label for row in rows}
        _bars(
            sheet,
            rows,
            f"profile-phases{profile.tag}",
            f"Where a step's time goes (speed run, {profile.record.batch_text}, {profile.record.precision})",
            f"Mean milliseconds over all rounds; {profile.record.progress}. The calibrator is left out.",
            labels,
        )


def _bars(
    sheet: Sheet,
    rows: Mapping[str, Mapping[str, float]],
    stem: str,
    title: str,
    caption: str,
    labels: Mapping[str, str] | None = None,
) -> None:
    names = labels or sheet.labels
    canvas, (axes,) = new_canvas(1, 1, height=1.3 + 0.42 * len(rows))
    places = list(range(len(rows)))
    start = [0.0] * len(rows)
    for phase in PHASES:
        widths = [parts[phase] for parts in rows.values()]
        axes.barh(places, widths, left=start, color=_PHASE_COLOURS[phase], label=phase, height=0.62)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for place, total in zip(places, start, strict=True):
        axes.annotate(
            f"{number(total)} ms", (total, place), fontsize=8, va="center",
            xytext=(4, 0), textcoords="offset points",
        )  # fmt: skip
    axes.set_yticks(places, [names.get(row, row) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step", xlim=(0.0, (float(max(start)) or 1.0) * 1.12))
    axes.grid(axis="y", visible=False)
    add_legend(canvas, axes)
    table = [(row, phase, parts[phase]) for row, parts in rows.items() for phase in PHASES]
    sheet.save(canvas, stem, title, caption, ["row", "phase", "milliseconds"], table)
