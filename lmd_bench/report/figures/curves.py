"""Losses and the common yardstick over steps and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmd_bench.metrics.efficiency import smoothed_loss
from lmd_bench.records import Check
from lmd_bench.report.figures.sheet import Sheet, add_legend, logarithmic_if_wide, new_canvas, note_level, thin
from lmd_bench.report.load import Run
from lmd_bench.report.quality import resolve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def draw_loss_curves(sheet: Sheet, runs: Sequence[Run]) -> None:
    """Smoothed losses over their own first value."""
    canvas, (left, right) = new_canvas(1, 2, height=4.4, sharey=True)
    table: list[Sequence[object]] = []
    half_life = int(sheet.suite.estimator.half_life_steps)
    for run in runs:
        points = _relative_loss(run, half_life)
        look = sheet.looks[run.record.row]
        for axes, along in ((left, "step"), (right, "train_s")):
            axes.plot(
                points[along], points["relative"], color=look.colour, linestyle=look.dash,
                label=sheet.label(run, runs),
            )  # fmt: skip
        columns = zip(*(points[name].tolist() for name in points), strict=True)
        table += [(run.record.row, run.record.seed, *values) for values in columns]
    left.set(xlabel="optimizer step", ylabel="smoothed loss / its first value")
    right.set(xlabel="training time, s (pauses left out)")
    logarithmic_if_wide(left, [row[-1] for row in table])
    add_legend(canvas, left)
    sheet.save(
        canvas,
        "loss-curves",
        "Loss over steps and over seconds",
        f"Each loss is smoothed (half-life {half_life} steps) and divided by its own first smoothed value, because "
        "the methods minimise different quantities: the heights of two curves say nothing about which model is "
        "better. The common yardstick below does.",
        ["row", "seed", "step", "train_s", "loss", "smoothed_loss", "relative_loss"],
        table,
    )


def draw_yardstick(sheet: Sheet, runs: Sequence[Run]) -> None:
    """PSNR over hidden pixels at every check, with its floor and the targets."""
    canvas, (axes,) = new_canvas(1, 1, height=4.4)
    checks: list[Check] = []
    table: list[Sequence[object]] = []
    for run in runs:
        record, look = run.record, sheet.looks[run.record.row]
        yardstick = record.yardstick
        assert yardstick is not None
        mark = " (own mask)" if yardstick.own_mask else ""
        axes.plot(
            [check.train_s for check in yardstick.checks],
            [check.psnr_db for check in yardstick.checks],
            color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4,
            label=sheet.label(run, runs) + mark,
        )  # fmt: skip
        checks += yardstick.checks
        table += [
            (record.row, record.seed, c.step, c.train_s, c.psnr_db, c.ssim, c.num_images) for c in yardstick.checks
        ]
    common = [y for run in runs if (y := run.record.yardstick) and not y.own_mask]
    floors = [yardstick.mean_colour_psnr_db for yardstick in common if yardstick.mean_colour_psnr_db]
    if floors:
        note_level(axes, "mean colour of what is visible: no learning", floors[0], 0.5, "center", dashed=True)
    for target in sheet.suite.evaluation.targets:
        level = resolve(target, sheet.rows)
        if isinstance(level, float) and target.metric == "psnr":
            note_level(axes, f"target: {100 * target.fraction:g} % of the gain of {target.of}", level, 0.995, "right")
    names = ["row", "seed", "step", "train_s", "psnr_db", "ssim", "num_images"]
    if any(check.lpips is not None for check in checks):
        names.append("lpips")
        lpips = ["not measured" if check.lpips is None else check.lpips for check in checks]
        table = [(*line, value) for line, value in zip(table, lpips, strict=True)]
    own = len(common) < len(runs)
    but = " but those with masks of their own (own mask), which cannot be ranked with others," if own else ""
    axes.set(xlabel="training time, s (pauses left out)", ylabel="PSNR over hidden pixels, dB")
    add_legend(canvas, axes)
    sheet.save(
        canvas,
        "yardstick",
        "The common yardstick over training time",
        f"All methods{but} fill the same hidden parts of the same held-out images, off the clock. Higher is better.",
        names,
        table,
    )


def _relative_loss(run: Run, half_life: int) -> dict[str, NDArray[np.float64]]:
    """At most a thousand points of a run's loss: raw, smoothed, and smoothed over its first smoothed value."""
    import numpy as np

    loss = run.steps["loss"]
    count = int(np.argmax(~np.isfinite(loss))) if not np.isfinite(loss).all() else loss.size
    smoothed = smoothed_loss(loss[:count], half_life)
    first = smoothed[min(half_life, count) - 1]
    kept = thin(count)
    return {
        "step": run.steps["step"][:count][kept],
        "train_s": run.seconds[:count][kept],
        "loss": loss[:count][kept],
        "smoothed": smoothed[kept],
        "relative": (smoothed / first)[kept],
    }
