"""The report's figures, each with the numbers behind it. Colours are Okabe and Ito's, one a row in every figure."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from lmd_bench.config import Suite
from lmd_bench.lmd.mask_schedule import MaskScheduleName, mask_ratio
from lmd_bench.metrics.efficiency import smoothed_loss
from lmd_bench.records import CALIBRATOR, PHASES, RECONSTRUCTIONS
from lmd_bench.report.cells import number, rows_to_csv
from lmd_bench.report.load import Profile, Results, Run
from lmd_bench.report.quality import resolve
from lmd_bench.report.rows import RowResult
from lmd_bench.report.step_cost import phase_ms

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

# M. Okabe, K. Ito, "Color Universal Design" (2002): eight colours told apart by colour-blind readers; yellow is left
# out, too light for lines on white. Rows beyond the seventh repeat colours with another dash.
_ROW_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: Final = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKERS: Final = "osD^vPX*<>"
# P. Tol's "bright" scheme, another set than the rows', so that a phase is not taken for a row.
_PHASE_COLOURS: Final = {
    "data": "#BBBBBB",
    "projector": "#EE6677",
    "forward": "#66CCEE",
    "backward": "#4477AA",
    "optimizer": "#228833",
}
_MOST_POINTS: Final = 1000
_DPI: Final = 150
_LEGEND_LINE_INCHES: Final = 0.19


@dataclass(frozen=True)
class Look:
    """How a row is drawn."""

    colour: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str


@dataclass(frozen=True)
class Figure:
    """A figure on disk with the table it was drawn from."""

    stem: str
    title: str
    caption: str
    png: Path
    csv: Path


def looks(rows: Sequence[str]) -> dict[str, Look]:
    """One look for each row, the same in every figure."""
    count = len(_ROW_COLOURS)
    return {
        row: Look(_ROW_COLOURS[i % count], _DASHES[(i // count) % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, row in enumerate(rows)
    }


class Drawing:
    """Draws what the records allow; a figure without data is left out."""

    def __init__(
        self, suite: Suite, results: Results, rows: Mapping[str, RowResult], folder: Path, provenance: Sequence[str]
    ) -> None:
        self.suite = suite
        self.results = results
        self.folder = folder
        self.rows = rows
        self.labels = {row: found.label for row, found in rows.items()}
        self.provenance = list(provenance)
        self.looks = looks(list(rows))
        self.figures: list[Figure] = []

    def draw(self) -> list[Figure]:
        """All figures that have data, in the order of the page."""
        curves = [run for run in self.results.all_runs if run.steps and run.steps["step"].size >= 2]
        if curves:
            self._loss_curves(curves)
        masked = [run for run in curves if _finite(run.steps["mask_ratio"]).size]
        if masked:
            self._schedules(masked)
        checked = [run for run in self.results.all_runs if run.record.yardstick and run.record.yardstick.checks]
        if checked:
            self._yardstick(checked)
        phased = [run for run in self.results.all_runs if run.record.phases]
        if phased:
            self._phases(phased)
        for profile in self.results.profiles:
            self._profile_phases(profile)
        for row in self.labels:
            self._masking(row)
        return self.figures

    # -- one figure each ------------------------------------------------------------------------------------------

    def _loss_curves(self, runs: Sequence[Run]) -> None:
        canvas, (left, right) = _canvas(1, 2, height=4.4, sharey=True)
        table: list[Sequence[object]] = []
        half_life = int(self.suite.estimator.half_life_steps)
        for run in runs:
            points = _relative_loss(run, half_life)
            look = self.looks[run.record.row]
            for axes, along in ((left, "step"), (right, "train_s")):
                axes.plot(
                    points[along], points["relative"], color=look.colour, linestyle=look.dash,
                    label=self._label(run, runs),
                )  # fmt: skip
            columns = zip(*(points[name].tolist() for name in points), strict=True)
            table += [(run.record.row, run.record.seed, *values) for values in columns]
        left.set(xlabel="optimizer step", ylabel="smoothed loss / its first value")
        right.set(xlabel="training time, s (pauses left out)")
        _logarithmic_if_wide(left, [row[-1] for row in table])
        _legend(canvas, left)
        self._save(
            canvas,
            "loss-curves",
            "Loss over steps and over seconds",
            f"Each loss is smoothed (half-life {half_life} steps) and divided by its own first smoothed value, because "
            "the methods minimise different quantities: the heights of two curves say nothing about which model is "
            "better. The common yardstick below does.",
            ["row", "seed", "step", "train_s", "loss", "smoothed_loss", "relative_loss"],
            table,
        )

    def _schedules(self, runs: Sequence[Run]) -> None:
        by_row = {run.record.row: run for run in reversed(runs)}  # a schedule is the same for every seed
        first = [by_row[row] for row in dict.fromkeys(run.record.row for run in runs)]
        shrinks = any(_varies(run.steps["tokens"]) for run in first)
        canvas, panels = _canvas(1, 2 if shrinks else 1, height=4.4)
        for group in _of_equal_ratios(first):
            self._schedule(group, *panels)
        formulas = _formula_points()
        _draw_formulas(formulas, panels[0])
        panels[0].set(xlabel="share of all steps", ylabel="mask ratio", xlim=(0, 1), ylim=(0, 1))
        if shrinks:
            panels[1].set(xlabel="share of all steps", ylabel="tokens the encoder sees / most in the run", xlim=(0, 1))
            panels[1].set_ylim(0, 1.05)
        _legend(canvas, panels[0])
        table = [line for run in first for line in _schedule_lines(run)]
        table += [(name, "formula", "none", u, value, "none") for name, u, value in formulas]
        right = (
            " Right: what it comes to, the whole tokens that the encoder sees as a share of the most in the run; rows "
            "whose input keeps its length are left out."
        )
        self._save(
            canvas,
            "mask-schedules",
            "Mask schedules (the paper's figure 5)",
            "Left: the mask ratio recorded in each step (lines; rows of equal ratios are drawn once) on the paper's "
            "three formulas (dots; section 3.2.3: uniform, piecewise, cosine, from 0.15 to 0.75). Rings: the points of "
            f"a schedule of one's own.{right if shrinks else ''}",
            ["row", "kind", "step", "progress", "mask_ratio", "tokens"],
            table,
        )

    def _schedule(self, group: Sequence[Run], ratios: Axes, lengths: Axes | None = None) -> None:
        """Rows of equal mask ratios as one line, and what it comes to in tokens of each."""
        look, run = self.looks[group[0].record.row], group[0]
        names = ", ".join(self.labels[run.record.row] for run in group)
        ratios.plot(_progress(run), run.steps["mask_ratio"], color=look.colour, linestyle=look.dash, label=names)
        for run in group:
            if points := _own_points(run):
                places = zip(*points, strict=True)
                ratios.plot(*places, color=look.colour, linestyle="none", marker="o", markersize=5, fillstyle="none")
            if lengths is not None and _varies(run.steps["tokens"]):
                lengths.plot(
                    _progress(run), _token_share(run), color=look.colour, linestyle=look.dash, drawstyle="steps-post"
                )

    def _yardstick(self, runs: Sequence[Run]) -> None:
        canvas, (axes,) = _canvas(1, 1, height=4.4)
        table: list[Sequence[object]] = []
        for run in runs:
            record, look = run.record, self.looks[run.record.row]
            yardstick = record.yardstick
            assert yardstick is not None
            mark = " (own mask)" if yardstick.own_mask else ""
            axes.plot(
                [check.train_s for check in yardstick.checks],
                [check.psnr_db for check in yardstick.checks],
                color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4,
                label=self._label(run, runs) + mark,
            )  # fmt: skip
            table += [
                (record.row, record.seed, c.step, c.train_s, c.psnr_db, c.ssim, c.num_images) for c in yardstick.checks
            ]
        common = [y for run in runs if (y := run.record.yardstick) and not y.own_mask]
        floors = [yardstick.mean_colour_psnr_db for yardstick in common if yardstick.mean_colour_psnr_db]
        if floors:
            axes.axhline(floors[0], color="#777777", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                "mean colour of what is visible: no learning", (0.5, floors[0]), fontsize=8, color="#555555",
                xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="center",
            )  # fmt: skip
        for target in self.suite.evaluation.targets:
            level = resolve(target, self.rows)
            if isinstance(level, float):
                axes.axhline(level, color="#777777", linewidth=1, zorder=1)
                axes.annotate(
                    f"target: {100 * target.fraction:g} % of the gain of {target.of}", (0.995, level), fontsize=8,
                    color="#555555", xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                    ha="right",
                )  # fmt: skip
        own = len(common) < len(runs)
        but = " but those with masks of their own (own mask), which cannot be ranked with others," if own else ""
        axes.set(xlabel="training time, s (pauses left out)", ylabel="PSNR over hidden pixels, dB")
        _legend(canvas, axes)
        self._save(
            canvas,
            "yardstick",
            "The common yardstick over training time",
            f"All methods{but} fill the same hidden parts of the same held-out images, off the clock. Higher is "
            "better.",
            ["row", "seed", "step", "train_s", "psnr_db", "ssim", "num_images"],
            table,
        )

    def _masking(self, row: str) -> None:
        """Figure 6 of the paper for a row's first run for which `lmd-bench reconstruct --figure6` has drawn it.

        A picture drawn from other weights than the record's is left out.
        """
        for run in self.results.finished(row):
            source = (self.results.folder / run.path).parent / RECONSTRUCTIONS
            drawn, numbers = source / "figure6.png", source / "figure6.csv"
            weights = run.record.weights
            if weights is None or not drawn.is_file() or not numbers.is_file():
                continue
            text = numbers.read_text(encoding="utf-8")
            if weights.sha256 not in text:
                continue
            stem, title = f"figure6-{row}", f"Masks along the schedule: {self.labels[row]}"
            png, data = self.folder / f"{stem}.png", self.folder / f"{stem}.csv"
            shutil.copyfile(drawn, png)
            comments = "".join(f"# {' '.join(line.split())}\n" for line in (title, *self.provenance))
            data.write_text(comments + text, encoding="utf-8")
            caption = (
                f"The trained weights of seed {run.record.seed}: what the network sees of an image at 0 to 100 % of "
                "the training (grey is hidden) and beside it what it makes of that."
            )
            self.figures.append(Figure(stem, title, caption, png, data))
            return

    def _phases(self, runs: Sequence[Run]) -> None:
        rows: dict[str, dict[str, float]] = {}
        for row in self.labels:
            own = [run.record.phases for run in runs if run.record.row == row and run.record.phases]
            if own:
                rows[row] = {p: sum(getattr(part, f"{p}_ms") for part in own) / len(own) for p in PHASES}
        self._bars(
            rows,
            "phases",
            "Where a step's time goes (runs)",
            "Mean milliseconds of each phase over all measured steps; the parts add up to the step. Several seeds: "
            "their mean.",
        )

    def _profile_phases(self, profile: Profile) -> None:
        rows: dict[str, dict[str, float]] = {}
        for row in profile.record.rows:
            rounds = [part for part in profile.record.rounds if part.row == row and part.period_ms]
            if rounds and row != CALIBRATOR:
                rows[row] = {phase: fmean(phase_ms(part, phase) for part in rounds) for phase in PHASES}
        if rows:
            labels = {row: profile.record.rows[row].label for row in rows}
            self._bars(
                rows,
                f"profile-phases{profile.tag}",
                f"Where a step's time goes (speed run, {profile.record.batch_text}, {profile.record.precision})",
                f"Mean milliseconds over all rounds; {profile.record.progress}. The calibrator is left out.",
                labels,
            )

    def _bars(
        self,
        rows: Mapping[str, Mapping[str, float]],
        stem: str,
        title: str,
        caption: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        names = labels or self.labels
        canvas, (axes,) = _canvas(1, 1, height=1.3 + 0.42 * len(rows))
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
        _legend(canvas, axes)
        table = [(row, phase, parts[phase]) for row, parts in rows.items() for phase in PHASES]
        self._save(canvas, stem, title, caption, ["row", "phase", "milliseconds"], table)

    # -- shared ---------------------------------------------------------------------------------------------------

    def _label(self, run: Run, runs: Sequence[Run]) -> str:
        """A row's label once: further seeds of the row are drawn without one."""
        first = next(other for other in runs if other.record.row == run.record.row)
        return self.labels[run.record.row] if first is run else "_nolegend_"

    def _save(
        self,
        canvas: Canvas,
        stem: str,
        title: str,
        caption: str,
        names: Sequence[str],
        table: Sequence[Sequence[object]],
    ) -> None:
        png, data = self.folder / f"{stem}.png", self.folder / f"{stem}.csv"
        canvas.savefig(png, dpi=_DPI, metadata={"Title": title, "Description": " | ".join(self.provenance)})
        data.write_text(rows_to_csv([title, *self.provenance], names, table), encoding="utf-8")
        self.figures.append(Figure(stem, title, caption, png, data))


PAPER_SCHEDULES: Final[tuple[MaskScheduleName, ...]] = ("uniform", "piecewise", "cosine")
_FORMULA_POINTS: Final = 240
_MOST_RINGS: Final = 32  # more would hide the line; a sampled function has up to 257


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
    return np.asarray(tokens / _finite(tokens).max())


def _varies(values: NDArray[np.float64]) -> bool:
    found = _finite(values)
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
        for i in _thin(steps.size)
    ]
    return lines + [(row, "points", "none", u, ratio, "none") for u, ratio in _own_points(run)]


def _or_none(value: float) -> float | str:
    """For tables, where an empty field would say nothing."""
    return float(value) if value == value else "none"


def _relative_loss(run: Run, half_life: int) -> dict[str, NDArray[np.float64]]:
    """At most a thousand points of a run's loss: raw, smoothed, and smoothed over its first smoothed value."""
    import numpy as np

    loss = run.steps["loss"]
    count = int(np.argmax(~np.isfinite(loss))) if not np.isfinite(loss).all() else loss.size
    smoothed = smoothed_loss(loss[:count], half_life)
    first = smoothed[min(half_life, count) - 1]
    kept = _thin(count)
    return {
        "step": run.steps["step"][:count][kept],
        "train_s": run.seconds[:count][kept],
        "loss": loss[:count][kept],
        "smoothed": smoothed[kept],
        "relative": (smoothed / first)[kept],
    }


def _thin(count: int) -> list[int]:
    """Evenly spread indices, first and last included."""
    if count <= _MOST_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)})


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.asarray(values[np.isfinite(values)])


def _canvas(rows: int, columns: int, *, height: float, sharey: bool = False) -> tuple[Canvas, list[Axes]]:
    """A figure 9.5 inches wide and its axes, without pyplot and so without global state."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9.5, height), layout="constrained")
    axes = list(canvas.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())
    for one in axes:
        one.grid(color="#E4E4E4", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _legend(canvas: Canvas, axes: Axes) -> None:
    """One legend above the axes, where it hides no data; the figure grows by the lines it takes."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    inches = 0.6 + 0.07 * max(map(len, names))  # handle, gaps, and letters of 9 points
    columns = max(1, min(len(names), 6, int((canvas.get_figwidth() - 0.2) / inches)))
    canvas.set_figheight(canvas.get_figheight() + _LEGEND_LINE_INCHES * (-(-len(names) // columns) - 1))
    canvas.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _logarithmic_if_wide(axes: Axes, values: Sequence[object]) -> None:
    numbers = [value for value in values if isinstance(value, float) and value > 0]
    if numbers and max(numbers) / min(numbers) > 10:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
